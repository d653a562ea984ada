"""Byte ranges of shards: stores that read them, and the ranges of samples. Remote shards are read by `remote.py`."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog.schema import FINGERPRINT, PARQUET
from tailwise.shards.content import ParquetLayout
from tailwise.shards.fingerprint import Comparisons, blocks_of_file
from tailwise.shards.members import json_caption
from tailwise.shards.parquet_shards import ParquetShards
from tailwise.shards.remote import RemoteShards, each_or_error
from tailwise.storage.files import local_file
from tailwise.storage.lru import LRUCache
from tailwise.storage.pread import CAN_ADVISE, OpenFile, advise_many, pread_many
from tailwise.storage.ranged_file import FolderFile, is_folder
from tailwise.storage.remote import is_remote

ADJACENT_BYTES = 4096  # largest gap in one read; tar headers and a small JSON lie between image and caption
OPEN_FOLDERS = 16
READ_RANGES = 64  # read in one call; bounds the bytes that are held twice
_CACHED_SECONDS, _CACHED_BYTES = 2e-5, 1e9  # time of a range, and bytes a second, of reads that need no disk, at worst


class LocalShards:
    """Local shards, known by their id; a bounded number of them is open. May be forked, pickled and used by several threads.

    Each process compares a shard with its fingerprint once, when it opens it.
    """

    remote = False  # no shard is, so that `want` is of no use

    def __init__(self, paths: Sequence[str], fingerprints: Sequence[str | None] | None = None) -> None:
        self.paths = paths
        self._comparisons = Comparisons(paths, fingerprints)
        self._waits = False  # whether the latest ranges were read from the disk
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most = 256 if limit == resource.RLIM_INFINITY else max(1, min(256, limit // 4))
        self._files: LRUCache[int, OpenFile] = LRUCache(most)
        self._folders: LRUCache[int, FolderFile] = LRUCache(OPEN_FOLDERS)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": LRUCache(self._files.most), "_folders": LRUCache(OPEN_FOLDERS)}

    def _file(self, shard: int) -> OpenFile:
        return self._files.get(shard, lambda: self._open(shard))

    def _open_folder(self, shard: int) -> FolderFile:
        folder = FolderFile(self.paths[shard])
        self._comparisons.check(shard, folder.size_bytes, lambda ranges: [folder.read_at(*block) for block in ranges])
        return folder

    def _open(self, shard: int) -> OpenFile:
        if is_folder(self.paths[shard]):
            raise IsADirectoryError(f"{self.paths[shard]} is read file by file")  # by `read`
        file = OpenFile(local_file(self.paths[shard]))
        self._comparisons.check(shard, os.fstat(file.handle).st_size, blocks_of_file(file.handle))
        return file

    def read(self, shard: int, start: int, stop: int) -> bytes:
        """Return bytes [start, stop) of a shard; raise an OSError if they cannot be read or the shard ends before."""
        if is_folder(self.paths[shard]):
            return self._folders.get(shard, lambda: self._open_folder(shard)).read_at(start, stop)
        file = self._file(shard)
        content = os.pread(file.handle, stop - start, start)
        while len(content) < stop - start:  # one call gives 2 GiB at most; nothing more is the end
            more = os.pread(file.handle, stop - start - len(content), start + len(content))
            if not more:
                end = os.fstat(file.handle).st_size
                raise OSError(f"{self.paths[shard]} ends at byte {end:,}; bytes {start:,} … {stop:,} were wanted")
            content += more
        return content

    def read_many(self, ranges: npt.NDArray[np.int64]) -> Iterator[bytes | memoryview | OSError]:
        """Yield the bytes of each (shard, start, stop) of int64 [n, 3], in order, or the error why they cannot be read."""
        for first in range(0, len(ranges), READ_RANGES):
            yield from self._read_group(ranges[first : first + READ_RANGES])

    def _read_group(self, ranges: npt.NDArray[np.int64]) -> Iterator[bytes | memoryview | OSError]:
        """Yield ranges that are read in one call; from the first one that cannot be read on, read one by one."""
        ends = np.cumsum(ranges[:, 2] - ranges[:, 1])
        buffer, good = np.empty(ends[-1], np.uint8), 0
        with suppress(OSError):
            files = {shard: self._file(shard) for shard in np.unique(ranges[:, 0]).tolist()}  # open until they are read
            handles = np.array([files[shard].handle for shard in ranges[:, 0].tolist()], np.int32)
            starts, stops = ranges[:, 1].copy(), ranges[:, 2].copy()
            began = time.perf_counter()
            if self._waits and CAN_ADVISE:
                advise_many(handles, starts, stops)
            good = pread_many(handles, starts, stops, buffer)
            self._waits = time.perf_counter() - began > len(ranges) * _CACHED_SECONDS + len(buffer) / _CACHED_BYTES
            del files
        content, at = buffer.data, 0
        for end in ends[:good].tolist():
            yield content[at:end]
            at = end
        yield from each_or_error(self.read, ranges[good:])

    def want(self, ranges: npt.NDArray[np.int64]) -> None:
        """Take a hint that these (shard, start, stop), int64 [n, 3], will be read soon: the kernel reads ahead as it is."""

    def close(self) -> None:
        """Close files and connections; reading opens them again."""
        self._files.clear()
        self._folders.clear()


class MixedShards:
    """Shards of several stores. All stores know all ids; `owners`, int64 [shards], are the positions of the shards' stores."""

    remote = True

    def __init__(self, stores: Sequence[LocalShards | RemoteShards], owners: npt.NDArray[np.int64]) -> None:
        self._stores, self._owners = stores, owners

    def read(self, shard: int, start: int, stop: int) -> bytes:
        """See `LocalShards`."""
        return self._stores[int(self._owners[shard])].read(shard, start, stop)

    def read_many(self, ranges: npt.NDArray[np.int64]) -> Iterator[bytes | memoryview | OSError]:
        """See `LocalShards`."""
        owners = self._owners[ranges[:, 0]]
        contents = [store.read_many(ranges[owners == at]) for at, store in enumerate(self._stores)]
        return (next(contents[at]) for at in owners.tolist())

    def want(self, ranges: npt.NDArray[np.int64]) -> None:
        """Hand the hint on."""
        owners = self._owners[ranges[:, 0]]
        for at, store in enumerate(self._stores):
            if (owners == at).any():
                store.want(ranges[owners == at])

    def close(self) -> None:
        """See `LocalShards`."""
        for store in self._stores:
            store.close()


ShardStore: TypeAlias = LocalShards | RemoteShards | MixedShards


def open_store(
    paths: Sequence[str],
    cache_folder: str | Path,
    cache_bytes: int,
    versions: Sequence[str] | None = None,
    sizes: Sequence[int] | None = None,
    fingerprints: Sequence[str | None] | None = None,
    parquet: Sequence[ParquetLayout | None] | None = None,
) -> ShardStore:
    """Return the store for shards, by id, that may be local, remote, Parquet files with images, or all of these.

    Ranges of remote shards and of Parquet files are cached up to `cache_bytes` in a folder that all processes of this machine share; a
    UserError if it cannot be used. `versions`, `sizes`, `fingerprints` and `parquet` are the catalog's `index_checksum`, `size_bytes`,
    `fingerprint` and `parquet`: cached ranges of another version are never used, a remote shard of another size is an error, a shard with
    another fingerprint is not read.
    """
    cached = (cache_folder, cache_bytes, versions, sizes, fingerprints)
    make: tuple[Callable[[], LocalShards | RemoteShards], ...] = (
        lambda: LocalShards(paths, fingerprints),
        lambda: RemoteShards(paths, *cached),
        lambda: ParquetShards(paths, *cached, parquet or ()),
    )
    kinds = np.array([int(is_remote(path)) for path in paths], np.int64)
    kinds[[at for at, layout in enumerate(parquet or ()) if layout is not None]] = 2
    used, owners = np.unique(kinds, return_inverse=True)
    stores = [make[kind]() for kind in used.tolist()] or [make[0]()]
    return MixedShards(stores, owners) if len(stores) > 1 else stores[0]


def open_shards(shards: pa.Table, cache_folder: str | Path, cache_bytes: int, *, compare: bool = True) -> ShardStore:
    """Return the store of shards (of `comparable_shards`); `compare` them with their fingerprints."""
    names = ("path", "index_checksum", "size_bytes", FINGERPRINT, PARQUET)
    paths, versions, sizes, fingerprints, parquet = (shards.column(name).to_pylist() for name in names)
    return open_store(paths, cache_folder, cache_bytes, versions, sizes, fingerprints if compare else None, parquet)


def sample_ranges(
    shards: npt.NDArray[np.int32], locations: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the ranges to read for samples, by shards, int32 [n], and locations, LOCATION [n].

    Image and caption have one range if they are close, else one each. The ranges are (shard, start, stop), int64 [n + m, 3]: of the n
    samples, or their images, then of the captions of the m samples whose image and caption are apart; with a mask of these m, bool [n].
    """
    image, caption = locations["image_offset"], locations["caption_offset"]
    image_end, caption_end = image + locations["image_bytes"], caption + np.abs(locations["caption_bytes"])
    apart = np.maximum(image, caption) - np.minimum(image_end, caption_end) > ADJACENT_BYTES
    ranges = np.empty((len(shards), 3), np.int64)
    ranges[:, 0] = shards
    ranges[:, 1] = np.where(apart, image, np.minimum(image, caption))
    ranges[:, 2] = np.where(apart, image_end, np.maximum(image_end, caption_end))
    if not apart.any():
        return ranges, apart
    alone = np.stack([shards[apart].astype(np.int64), caption[apart], caption_end[apart]], axis=1)
    return np.concatenate([ranges, alone]), apart


def read_samples(
    store: ShardStore, shards: npt.NDArray[np.int32], locations: npt.NDArray[Any], fields: tuple[str, ...] = ()
) -> list[tuple[bytes, bytes] | OSError]:
    """Return the encoded image and the caption of each sample, or the error why they cannot be read.

    `shards`, int32 [n], and `locations`, LOCATION [n], are those of the samples, which may be in any order: they are read in ascending
    order of (shard, offset). `fields` are those of JSON that are captions.
    """
    caption_bytes = np.abs(locations["caption_bytes"])
    ranges, apart = sample_ranges(shards, locations)
    count = len(shards)
    order = np.lexsort((ranges[:, 1], ranges[:, 0]))
    cuts = np.zeros((len(ranges), 5), np.int64)  # place, and begin and end of image and caption in the range
    cuts[:, 0] = np.arange(len(ranges))
    first = ranges[:count, 1]
    cuts[:count, 1] = locations["image_offset"] - first
    cuts[:count, 2] = cuts[:count, 1] + locations["image_bytes"]
    cuts[:count, 3] = locations["caption_offset"] - first
    cuts[:count, 4] = cuts[:count, 3] + caption_bytes
    cuts[:count][apart, 3:] = 0
    cuts[count:, 2] = caption_bytes[apart]
    parts: list[Any] = [None] * len(ranges)
    reads = zip(cuts[order].tolist(), store.read_many(ranges[order]), strict=True)
    for (place, image_at, image_end, caption_at, caption_end), content in reads:
        if isinstance(content, OSError):
            parts[place] = content
        else:
            parts[place] = (bytes(content[image_at:image_end]), bytes(content[caption_at:caption_end]))
    samples: list[tuple[bytes, bytes] | OSError] = parts[:count]
    for sample, caption in zip(np.flatnonzero(apart).tolist(), parts[count:], strict=True):
        image = samples[sample]
        if isinstance(image, tuple):
            samples[sample] = (image[0], caption[0]) if isinstance(caption, tuple) else caption
    for at in np.flatnonzero(locations["caption_bytes"] < 0).tolist():
        found = samples[at]
        if isinstance(found, tuple):
            try:
                samples[at] = (found[0], json_caption(found[1], fields))
            except OSError as error:
                samples[at] = error
    return samples
