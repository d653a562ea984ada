"""Writes new shards: of each its tar, its table of samples, its counts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog.captions import ORIGINAL
from tailwise.catalog.catalog import Catalog
from tailwise.catalog.files import digest, read_json, write_json, write_table
from tailwise.export.shuffled import COPY_FIELDS, pieces, read_positions
from tailwise.loader.captions import CaptionMix, Chosen
from tailwise.shards.fingerprint import comparable_shards
from tailwise.shards.members import MemberChoice, json_caption
from tailwise.shards.ranges import ADJACENT_BYTES, ShardStore, open_shards
from tailwise.storage.local import replacing

Members = tuple[bytes | None, ...]
Content = bytes | memoryview | OSError
_NEVER = np.iinfo(np.int64).max
BLOCK_BYTES = 512
RECORD_BYTES = 20 * BLOCK_BYTES  # a tar's size is a multiple
MAX_MEMBER_BYTES = 8**11 - 1  # 11 octal digits
_MODE_OWNER_GROUP = b"0000644\0" + 2 * b"0000000\0"
_TIME = b"00000000000\0"
_BLANK_CHECKSUM = b" " * 8
# A regular file, no link; owner and group without names; no device; no prefix of the name.
_REST = b"0" + bytes(100) + b"ustar\x0000" + bytes(64 + 16 + 167)
_FIXED_SUM = sum(_MODE_OWNER_GROUP + _TIME + _BLANK_CHECKSUM + _REST)
READ_BYTES = 64 << 20  # of members in the memory of one process
CACHE_BYTES = 16 * READ_BYTES  # on disk, per process; for remote shards only
MEMBERS = ("image", "caption", "json")  # image and caption are adjacent, so that one read gets both
SCRATCH = ".scratch"
SUCCESS = "success"

SIDECAR_FIELDS = (
    pa.field("key", pa.string(), nullable=False),
    pa.field("uid", pa.string(), nullable=False),  # 32 hexadecimal digits
    pa.field("caption", pa.string()),
    pa.field("status", pa.string(), nullable=False),  # as img2dataset's: "success", or why the sample is not in the tar
    pa.field("error_message", pa.string()),
    pa.field("width", pa.int32()),  # pixels, if known
    pa.field("height", pa.int32()),
    pa.field("source_shard", pa.int32(), nullable=False),
    pa.field("source_key", pa.string(), nullable=False),
    pa.field("copy", pa.uint8(), nullable=False),
)


def member_ranges(
    shards: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the byte ranges to read for samples of m members each; nearby members of a sample share a range.

    Args:
        shards: int64 [n], the shard of each sample.
        starts: int64 [n, m], first byte of each member.
        sizes: int64 [n, m], bytes; −1 for a missing member. Every sample has at least one member.

    Returns:
        int64 [r, 3] of (shard, start, stop); and int64 [n, m], the range of each member (meaningless if it is missing).
    """
    there = sizes >= 0
    order = np.argsort(np.where(there, starts, _NEVER), axis=1, kind="stable")
    known = np.take_along_axis(there, order, axis=1)
    start: npt.NDArray[np.int64] = np.take_along_axis(starts, order, axis=1)
    size: npt.NDArray[np.int64] = np.take_along_axis(sizes, order, axis=1)
    reach = np.maximum.accumulate(np.where(known, start + size, -1), axis=1)
    begins = known.copy()
    begins[:, 1:] &= start[:, 1:] - reach[:, :-1] > ADJACENT_BYTES
    first = np.flatnonzero(begins)
    last = np.append(first[1:], begins.size) - 1  # missing members are last, and extend no range
    shard = np.repeat(shards, starts.shape[1])
    ranges = np.stack([shard[first], start.ravel()[first], reach.ravel()[last]], axis=1)
    number = np.empty_like(starts)
    np.put_along_axis(number, order, np.cumsum(begins).reshape(starts.shape) - 1, axis=1)
    return ranges, number


def read_members(
    store: ShardStore, shards: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]
) -> list[Members | OSError]:
    """Return the members of each sample: None for a missing one, an OSError for a sample that cannot be read.

    Reads in ascending order of (shard, offset), in any order of the samples. The arguments are those of `member_ranges`.
    """
    ranges, number = member_ranges(shards, starts, sizes)
    order = np.lexsort((ranges[:, 1], ranges[:, 0]))
    contents: list[Content] = [b""] * len(ranges)
    for at, content in zip(order.tolist(), store.read_many(ranges[order]), strict=True):
        contents[at] = content
    begin = starts - ranges[number, 1]
    cuts = np.stack([number, begin, begin + sizes, sizes], axis=2)
    return [_cut(contents, sample) for sample in cuts.tolist()]


def _cut(contents: list[Content], sample: list[list[int]]) -> Members | OSError:
    members: list[bytes | None] = []
    for number, start, stop, size in sample:
        content = contents[number]
        if size < 0:
            members.append(None)
        elif isinstance(content, OSError):
            return content
        else:
            members.append(bytes(content[start:stop]))
    return tuple(members)


def ustar_header(name: str, size_bytes: int) -> bytes:
    """Return the header of a regular file with mode 644, and owner, group and time 0; `name` has at most 100 ASCII characters."""
    if size_bytes > MAX_MEMBER_BYTES:
        raise ValueError(f"{name} has {size_bytes:,} bytes: a member of a tar holds at most {MAX_MEMBER_BYTES:,}")
    path, size = name.encode("ascii"), b"%011o\0" % size_bytes
    checksum = b"%06o\0 " % (sum(path) + sum(size) + _FIXED_SUM)
    return path.ljust(100, b"\0") + _MODE_OWNER_GROUP + size + _TIME + checksum + _REST


def write_member(stream: BinaryIO, name: str, content: bytes) -> None:
    """Write one regular file (see `ustar_header`)."""
    stream.write(ustar_header(name, len(content)))
    stream.write(content)
    stream.write(bytes(-len(content) % BLOCK_BYTES))


def write_end(stream: BinaryIO) -> None:
    """Write the two blocks of zeros that end a tar, and fill its last record."""
    stream.write(bytes(2 * BLOCK_BYTES))
    stream.write(bytes(-stream.tell() % RECORD_BYTES))


@dataclass(frozen=True)
class Outcome:
    """Result of writing one sample."""

    status: str  # SUCCESS, or why the sample is not in the tar
    caption: str | None = None  # caption, if the sample is in the tar
    detail: str | None = None  # more on the status, if it is not
    caption_name: str = ORIGINAL  # name of the caption


@dataclass(frozen=True)
class ShardWriter:
    """Writes shards, in any process."""

    catalog: Catalog  # catalog of the samples
    snapshot: int  # number of the snapshot
    folder: Path  # output folder
    identity: Mapping[str, Any]  # all that decides the bytes
    damaged: Mapping[int, str]  # reasons by id of tars that are not read
    cache_bytes: int  # cache of remote tars, for all processes together
    export_id: str  # differs from export to export, so that no open file is used by a later export
    captions: CaptionMix | None = None  # of several captions; None: samples' own

    @property
    def runs(self) -> Path:
        """Return the folder of the shuffled copies (see `shuffled.py`)."""
        return self.folder / SCRATCH

    @property
    def shards(self) -> int:
        """Return the number of shards."""
        return shard_count(self.identity)

    def paths(self, number: int) -> tuple[Path, Path, Path]:
        """Return the paths of a shard: its tar, its table of samples, and its counts, which are written last."""
        stem = f"{number:08d}"
        return self.folder / f"{stem}.tar", self.folder / f"{stem}.parquet", self.folder / f"{stem}_stats.json"

    def lacking(self) -> list[int | None]:
        """Return the number of samples that each shard lacks; None for one that is not finished."""
        return [self._lacking(number) for number in range(self.shards)]

    def _lacking(self, number: int) -> int | None:
        tar, _, stats = paths = self.paths(number)
        if not all(path.exists() for path in paths):
            return None
        found = read_json(stats)
        if found.get("export") != digest(self.identity) or found.get("tar_bytes") != tar.stat().st_size:
            return None
        return int(found["count"]) - int(found["successes"])

    def _store(self) -> ShardStore:
        return _opened(self.export_id, self.catalog.folder, self.snapshot, self.runs / "cache", self.cache_bytes)

    def close(self) -> None:
        """Close the source's tars, if this process has opened any."""
        if _opened.cache_info().currsize:
            self._store().close()
            _opened.cache_clear()

    def __call__(self, numbers: range) -> list[int]:
        """Write some consecutive shards, whose samples are held in memory; return the number of samples that each of them lacks."""
        start = self._first(numbers.start)
        samples = read_positions(self.runs, start, self._first(numbers.stop))
        cuts = [(number, self._first(number) - start, self._first(number + 1) - start) for number in numbers]
        return [self._write(number, samples.slice(first, stop - first)) for number, first, stop in cuts]

    def _first(self, number: int) -> int:
        """Return the position of the first copy of a shard."""
        return number * int(self.identity["copies"]) // self.shards

    def _write(self, number: int, samples: pa.Table) -> int:
        """Write one shard; return the number of samples that it lacks."""
        tar, sidecar, counts_path = self.paths(number)
        counts_path.unlink(missing_ok=True)
        copies = self.identity["copies"]
        digits = max(4, len(str(-(-copies // self.shards) - 1)))  # those of the largest shard, in all keys
        keys = [f"{number:08d}{at:0{digits}d}" for at in range(samples.num_rows)]
        with replacing(tar) as temporary:
            with temporary.open("wb", buffering=1 << 20) as stream:
                outcomes = list(self._write_samples(stream, keys, samples))
                write_end(stream)
            tar_bytes = temporary.stat().st_size
        write_table(sidecar, _sidecar(keys, samples, outcomes, named=self.captions is not None))
        counts = Counter(outcome.status for outcome in outcomes)
        stats = {"count": len(keys), "successes": counts[SUCCESS], "status_dict": dict(counts)}
        write_json(counts_path, {**stats, "tar_bytes": tar_bytes, "export": digest(self.identity)})
        return len(keys) - counts[SUCCESS]

    def _write_samples(self, stream: BinaryIO, keys: list[str], samples: pa.Table) -> Iterator[Outcome]:
        """Write the samples that can be read; yield the outcome of every sample."""
        columns = ("shard", "key", "uid", "copy", "image_extension", "caption_offset", "json_offset")
        fields = MemberChoice.of(self.catalog).fields
        rows = zip(*(samples.column(name).to_pylist() for name in columns), strict=True)
        whole = ~np.isin(samples.column("shard").to_numpy(), list(self.damaged))
        contents = self._read(samples.filter(pa.array(whole)))
        chosen = self._chosen(samples)
        for key, (shard, source_key, uid, copy, extension, *places), there, other, name in zip(
            keys, rows, whole.tolist(), chosen.texts, chosen.names, strict=True
        ):
            members = next(contents) if there else OSError(self.damaged[shard])
            if not isinstance(members, OSError) and places[0] == places[1]:
                members = _with_caption(members, fields)
            if isinstance(members, OSError):
                yield Outcome("unreadable", detail=str(members))
                continue
            image, text, description = members
            try:
                caption = (text or b"").decode() if other is None else other
            except UnicodeDecodeError as error:
                yield Outcome("caption is not UTF-8", detail=str(error))
                continue
            added = {"key": key, "uid": uid.hex(), "source_shard": shard, "source_key": source_key, "copy": copy}
            write_member(stream, f"{key}.{extension}", image or b"")
            write_member(stream, f"{key}.txt", caption.encode())
            write_member(stream, f"{key}.json", _described(description, added))
            yield Outcome(SUCCESS, caption, None, name)

    def _chosen(self, samples: pa.Table) -> Chosen:
        """Return the captions of copies: those of the loader's draws, with the plan's seed."""
        rows = samples.column("row").to_numpy()
        if self.captions is None:
            return Chosen([None] * len(rows), [ORIGINAL] * len(rows), 0)
        return self.captions.of(rows, np.full(len(rows), self.identity["epoch"], np.int32))

    def _read(self, samples: pa.Table) -> Iterator[Members | OSError]:
        """Yield the members of each sample, about READ_BYTES at a time; the next ones of remote tars are fetched meanwhile."""
        store = self._store()
        shards = samples.column("shard").to_numpy().astype(np.int64)
        starts, sizes = (
            np.stack([samples.column(f"{name}_{what}").fill_null(-1).to_numpy() for name in MEMBERS], axis=1)
            for what in ("offset", "bytes")
        )
        read = pieces(np.maximum(sizes, 0).sum(axis=1), READ_BYTES)
        for at, piece in enumerate(read):
            if store.remote:
                for wanted in read[at : at + 2]:
                    store.want(member_ranges(shards[wanted], starts[wanted], sizes[wanted])[0])
            yield from read_members(store, shards[piece], starts[piece], sizes[piece])


def shard_count(identity: Mapping[str, Any]) -> int:
    """Return the number of shards of an export."""
    return -(-int(identity["copies"]) // int(identity["shard_samples"]))


@lru_cache(maxsize=1)
def _opened(export_id: str, catalog: Path, snapshot: int, cache: Path, cache_bytes: int) -> ShardStore:  # noqa: ARG001
    """Return the store of a snapshot's tars; one for all shards that a process writes in one export."""
    source = Catalog.open(catalog)
    return open_shards(comparable_shards(source, source.snapshot(snapshot)), cache, cache_bytes)


def _with_caption(members: Members, fields: tuple[str, ...]) -> Members | OSError:
    """Return the members of a sample whose caption is a field of its JSON, with the caption alone."""
    image, text, description = members
    try:
        return image, json_caption(text or b"", fields), description
    except OSError as error:
        return error


def _described(source: bytes | None, added: dict[str, Any]) -> bytes:
    """Return a sample's JSON: the source's object, if it is one, with the values of `added`."""
    if source is not None:
        try:
            value = json.loads(source)
            if isinstance(value, dict):
                return json.dumps({**value, **added}).encode()
        except (ValueError, RecursionError):  # a broken JSON is left out
            pass
    return json.dumps(added).encode()


def _sidecar(keys: list[str], samples: pa.Table, outcomes: list[Outcome], *, named: bool) -> pa.Table:
    own, more = {field.name for field in SIDECAR_FIELDS}, [*samples.schema][len(COPY_FIELDS) :]
    scores = [field.name for field in more if pa.types.is_float64(field.type) and field.name not in own]
    columns = {
        "key": keys,
        "uid": [uid.hex() for uid in samples.column("uid").to_pylist()],
        "caption": [outcome.caption for outcome in outcomes],
        "status": [outcome.status for outcome in outcomes],
        "error_message": [outcome.detail for outcome in outcomes],
        **{
            name: samples.column(name.removeprefix("source_"))
            for name in ("width", "height", "source_shard", "source_key", "copy")
        },
    }
    names = [pa.field("caption_name", pa.string())] * named
    used = [None if outcome.caption is None else outcome.caption_name for outcome in outcomes]
    columns |= {item.name: used for item in names}
    fields = [*SIDECAR_FIELDS, *names, *(pa.field(name, pa.float64()) for name in scores)]
    return pa.table({**columns, **{name: samples.column(name) for name in scores}}, pa.schema(fields))
