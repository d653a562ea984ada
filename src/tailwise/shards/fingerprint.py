"""Fingerprint of a shard's content, from a bounded number of blocks: a shard of the same length may hold other samples.

The `index_checksum` of names, offsets and sizes of members needs a walk over all headers, and does not depend on the content.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog.catalog import Catalog, Snapshot
from tailwise.catalog.removals import Removals
from tailwise.catalog.schema import FINGERPRINT
from tailwise.context import Context
from tailwise.storage.errors import NoRangesError
from tailwise.storage.files import RemoteFile, open_binary
from tailwise.storage.ranged_file import FolderFile
from tailwise.storage.remote import is_remote, read_range, size_of

BLOCK_BYTES = 1 << 16
BLOCKS = 16  # at most, spread evenly over the shard; a shard of up to 1 MiB is covered whole
EVERY, SOME, FIRST = 1, 5, BLOCKS  # steps: all blocks; four of them, where each is a request; the first alone
_DIGITS = 8  # of each block
_SKIPPED = "-" * _DIGITS  # in place of a block that is not compared
_MEMBERS = ("image", "caption", "json")

Range = tuple[int, int]  # start, stop
Read = Callable[[Sequence[Range]], list[bytes]]


class ChangedShardError(OSError):
    """A shard is not the one that was imported."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path} has other content than when it was imported")


def block_ranges(size_bytes: int) -> list[Range]:
    """Return (start, stop) of each block of a shard of this length."""
    count = min(BLOCKS, -(-size_bytes // BLOCK_BYTES))
    if count < BLOCKS:
        return [(start, min(start + BLOCK_BYTES, size_bytes)) for start in range(0, size_bytes, BLOCK_BYTES)]
    starts = [at * (size_bytes - BLOCK_BYTES) // (BLOCKS - 1) for at in range(BLOCKS)]
    return [(start, start + BLOCK_BYTES) for start in starts]


def fingerprint_of(contents: Sequence[bytes]) -> str:
    """Return the fingerprint of blocks: 8 hexadecimal digits of each."""
    return "".join(hashlib.blake2b(content, digest_size=_DIGITS // 2).hexdigest() for content in contents)


def read_fingerprint(path: str, size_bytes: int, read: Read) -> str:
    """Return the fingerprint of a shard of this length; an OSError if it ends before."""
    return fingerprint_of(_blocks(path, block_ranges(size_bytes), read))


def check_fingerprint(
    path: str, size_bytes: int | None, read: Read, fingerprint: str | None, step: int = EVERY
) -> None:
    """Compare every `step`-th block (EVERY, SOME or FIRST, without skipped ones) of a shard with what was noted at import.

    A shard without fingerprint or of unknown length passes, and one whose server sends whole files only. It is a ChangedShardError if a
    block differs, or there are more or fewer blocks.
    """
    if not fingerprint or size_bytes is None:
        return
    ranges = block_ranges(size_bytes)
    if len(ranges) * _DIGITS != len(fingerprint):
        raise ChangedShardError(path)
    noted = [fingerprint[at : at + _DIGITS] for at in range(0, len(fingerprint), _DIGITS)]
    compared = [pair for pair in zip(ranges, noted, strict=True) if pair[1] != _SKIPPED][::step]
    try:
        contents = _blocks(path, [block for block, _ in compared], read)
    except NoRangesError:
        return
    if fingerprint_of(contents) != "".join(digits for _, digits in compared):
        raise ChangedShardError(path)


def comparable_shards(
    catalog: Catalog, snapshot: Snapshot | None = None, context: Context | None = None, table: pa.Table | None = None
) -> pa.Table:
    """Return shards with fingerprints that skip the blocks of removed samples, whose bytes may be wiped.

    They are the shards of a snapshot, by default the newest; or, of these, those of a `table` (SHARD_SCHEMA).
    """
    context = context or Context()
    table = catalog.shards(snapshot) if table is None else table
    removed = Removals.of(catalog, snapshot, context.progress).rows
    columns = (table.column(name).to_pylist() for name in ("shard", "size_bytes", FINGERPRINT))
    noted = {shard: (size, fingerprint) for shard, size, fingerprint in zip(*columns, strict=True)}
    for part in catalog.parts(snapshot) if len(removed) else ():
        first, last = np.searchsorted(removed, (part.span.start, part.span.stop))
        if first == last:
            continue
        names = [f"{member}_{what}" for what in ("offset", "bytes") for member in _MEMBERS]
        samples = catalog.samples_at(part.number, removed[first:last] - part.first_row, ["shard", *names])
        numbers = np.concatenate([samples.column(name).fill_null(0).to_numpy() for name in names]).reshape(2, -1)
        owners = np.tile(samples.column("shard").to_numpy(), len(_MEMBERS))
        for shard in np.unique(owners).tolist():
            size, fingerprint = noted.get(shard, (0, None))
            if fingerprint:
                noted[shard] = size, _without(fingerprint, size, *numbers[:, owners == shard])
    at = table.schema.get_field_index(FINGERPRINT)
    return table.set_column(at, FINGERPRINT, pa.array([fingerprint for _, fingerprint in noted.values()], pa.string()))


def _without(fingerprint: str, size_bytes: int, starts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> str:
    """Return a fingerprint that skips the blocks with a byte of these spans."""
    touched = [bool(((starts < stop) & (starts + sizes > start)).any()) for start, stop in block_ranges(size_bytes)]
    digits = (fingerprint[at : at + _DIGITS] for at in range(0, len(fingerprint), _DIGITS))
    return "".join(_SKIPPED if skip else block for skip, block in zip(touched, digits, strict=False))


def _blocks(path: str, ranges: Sequence[Range], read: Read) -> list[bytes]:
    contents = read(ranges)
    if any(len(content) != stop - start for content, (start, stop) in zip(contents, ranges, strict=True)):
        raise OSError(f"{path} ended while it was read")
    return contents


def blocks_of_file(handle: int) -> Read:
    """Return a function that reads blocks of an open file."""
    return lambda ranges: [os.pread(handle, stop - start, start) for start, stop in ranges]


def blocks_of_url(url: str) -> Read:
    """Return a function that reads blocks of a remote file, all at once."""

    def read(ranges: Sequence[Range]) -> list[bytes]:
        with ThreadPoolExecutor(BLOCKS) as pool:
            return list(pool.map(lambda block: read_range(url, *block).content, ranges))

    return read


def blocks_of_stream(path: str, stream: BinaryIO) -> Read:
    """Return a function that reads blocks of what `open_binary` opened; some of those are downloaded, and then a file."""
    if isinstance(stream, FolderFile):
        return lambda ranges: [stream.read_at(*block) for block in ranges]
    return blocks_of_url(path) if isinstance(stream, RemoteFile) else blocks_of_file(stream.fileno())


@contextmanager
def shard_blocks(path: str) -> Iterator[tuple[int | None, Read]]:
    """Open a shard, local or remote: its length, if it is known, and a function that reads its blocks."""
    if is_remote(path):
        yield size_of(path), blocks_of_url(path)
        return
    with open_binary(path) as stream:
        yield stream.seek(0, io.SEEK_END), blocks_of_stream(path, stream)


def compare_shard(path: str, fingerprint: str | None, step: int) -> None:
    """Open a shard, local or remote, and compare it with its fingerprint; see `check_fingerprint`."""
    with shard_blocks(path) as (size_bytes, read):
        check_fingerprint(path, size_bytes, read, fingerprint, step)


def unchanged_bytes(path: str, size_bytes: int, fingerprint: str | None) -> int:
    """Return how many bytes of a file are those with which an earlier state of this length and fingerprint began.

    They end with the last block before the first one that differs, or that the file no longer has; 0 where none is known.
    """
    end = 0
    with suppress(OSError), shard_blocks(path) as (found, read):
        ranges = [block for block in block_ranges(size_bytes) if block[1] <= (found or 0)] if fingerprint else []
        for at, ((_, stop), content) in enumerate(zip(ranges, _blocks(path, ranges, read), strict=True)):
            noted = str(fingerprint)[_DIGITS * at : _DIGITS * (at + 1)]
            if noted not in {_SKIPPED, fingerprint_of([content])}:
                break
            end = end if noted == _SKIPPED else stop
    return end


class Comparisons:
    """Compares shards, known by their id, with their fingerprints, unless these are None.

    One that passed is not read again, one that failed is refused without reading.
    """

    def __init__(self, paths: Sequence[str], fingerprints: Sequence[str | None] | None) -> None:
        self._paths, self._fingerprints = paths, fingerprints
        self._passed: dict[int, bool] = {}

    def check(self, shard: int, size_bytes: int | None, read: Read, step: int = EVERY, *, again: bool = False) -> None:
        """Compare a shard as `check_fingerprint` does, if it was not compared before, or `again`."""
        if self._fingerprints is None or size_bytes is None or (self._passed.get(shard) and not again):
            return
        path = self._paths[shard]
        if shard in self._passed and not again:
            raise ChangedShardError(path)
        try:
            check_fingerprint(path, size_bytes, read, self._fingerprints[shard], step)
        except ChangedShardError:
            self._passed[shard] = False
            raise
        self._passed[shard] = True
