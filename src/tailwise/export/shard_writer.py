"""Writes one new shard: its tar, its table of samples, its counts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog.catalog import Catalog
from tailwise.catalog.files import read_json, write_json, write_table
from tailwise.export.members import Members, member_ranges, read_members
from tailwise.export.shuffled import COPY_FIELDS, read_positions
from tailwise.export.tar_file import write_end, write_member
from tailwise.shards.fingerprint import comparable_shards
from tailwise.shards.ranges import ShardStore, open_shards
from tailwise.storage.local import replacing

READ_BYTES = 64 << 20  # of members that one process holds at a time
CACHE_BYTES = 16 * READ_BYTES  # on disk, for each process; of remote shards only
MEMBERS = ("image", "caption", "json")  # image and caption adjoin, so that one read gets both
SUCCESS = "success"

SIDECAR_FIELDS = (
    pa.field("key", pa.string(), nullable=False),
    pa.field("uid", pa.string(), nullable=False),  # 32 hexadecimal digits
    pa.field("caption", pa.string()),
    pa.field("status", pa.string(), nullable=False),  # as img2dataset's: "success", or why the sample isn't in the tar
    pa.field("error_message", pa.string()),
    pa.field("width", pa.int32()),  # pixels, if the source says
    pa.field("height", pa.int32()),
    pa.field("source_shard", pa.int32(), nullable=False),
    pa.field("source_key", pa.string(), nullable=False),
    pa.field("copy", pa.uint8(), nullable=False),
)


@dataclass(frozen=True)
class Outcome:
    """What became of one sample.

    Attributes:
        status: SUCCESS, or why it isn't in the tar.
        caption: if it is.
        detail: if it isn't.
    """

    status: str
    caption: str | None = None
    detail: str | None = None


@dataclass(frozen=True)
class ShardWriter:
    """Writes one shard after another, in any process.

    Attributes:
        catalog: whose samples.
        snapshot: its number.
        folder: where to.
        runs: folder of the shuffled copies (see `shuffled.py`).
        identity: hash of all that decides the bytes.
        copies: in all shards.
        shards: how many.
        damaged: reasons by id of tars that aren't read.
        cache_bytes: for ranges of remote tars, of all processes together.
        export_id: differs from export to export, so that no open file outlives its own.
    """

    catalog: Catalog
    snapshot: int
    folder: Path
    runs: Path
    identity: str
    copies: int
    shards: int
    damaged: dict[int, str]
    cache_bytes: int
    export_id: str

    def tar_path(self, number: int) -> Path:
        """Of one shard."""
        return self.folder / f"{number:08d}.tar"

    def sidecar_path(self, number: int) -> Path:
        """The table of its samples."""
        return self.folder / f"{number:08d}.parquet"

    def stats_path(self, number: int) -> Path:
        """Its counts, written last."""
        return self.folder / f"{number:08d}_stats.json"

    def rejected(self, number: int) -> int | None:
        """How many samples a finished shard lacks; None if it isn't finished."""
        tar, stats = self.tar_path(number), self.stats_path(number)
        if not (stats.exists() and tar.exists() and self.sidecar_path(number).exists()):
            return None
        found = read_json(stats)
        if found.get("export") != self.identity or found.get("tar_bytes") != tar.stat().st_size:
            return None
        return int(found["count"]) - int(found["successes"])

    def _store(self) -> ShardStore:
        return _opened(self.export_id, self.catalog.folder, self.snapshot, self.runs / "cache", self.cache_bytes)

    def close(self) -> None:
        """Lets go of the source's tars, if this process has opened any."""
        if _opened.cache_info().currsize:
            self._store().close()
            _opened.cache_clear()

    def __call__(self, number: int) -> int:
        """Writes one shard; returns how many samples it lacks."""
        self.stats_path(number).unlink(missing_ok=True)
        first, stop = (at * self.copies // self.shards for at in (number, number + 1))
        samples = read_positions(self.runs, first, stop)
        digits = max(
            4, len(str(-(-self.copies // self.shards) - 1))
        )  # of the greatest shard, so that all keys are alike
        keys = [f"{number:08d}{at:0{digits}d}" for at in range(samples.num_rows)]
        with replacing(self.tar_path(number)) as temporary:
            with temporary.open("wb", buffering=1 << 20) as stream:
                outcomes = list(self._write_samples(stream, keys, samples))
                write_end(stream)
            tar_bytes = temporary.stat().st_size
        write_table(self.sidecar_path(number), _sidecar(keys, samples, outcomes))
        counts = Counter(outcome.status for outcome in outcomes)
        stats = {"count": len(keys), "successes": counts[SUCCESS], "status_dict": dict(counts)}
        write_json(self.stats_path(number), {**stats, "tar_bytes": tar_bytes, "export": self.identity})
        return len(keys) - counts[SUCCESS]

    def _write_samples(self, stream: BinaryIO, keys: list[str], samples: pa.Table) -> Iterator[Outcome]:
        """Writes those that can be read; all that is said of each is what became of it."""
        columns = ("shard", "key", "uid", "copy", "image_extension")
        rows = zip(*(samples.column(name).to_pylist() for name in columns), strict=True)
        whole = ~np.isin(samples.column("shard").to_numpy(), list(self.damaged))
        contents = self._read(samples.filter(pa.array(whole)))
        for key, (shard, source_key, uid, copy, extension), there in zip(keys, rows, whole.tolist(), strict=True):
            members = next(contents) if there else OSError(self.damaged[shard])
            if isinstance(members, OSError):
                yield Outcome("unreadable", detail=str(members))
                continue
            image, text, description = members
            try:
                caption = (text or b"").decode()
            except UnicodeDecodeError as error:
                yield Outcome("caption is not UTF-8", detail=str(error))
                continue
            added = {"key": key, "uid": uid.hex(), "source_shard": shard, "source_key": source_key, "copy": copy}
            write_member(stream, f"{key}.{extension}", image or b"")
            write_member(stream, f"{key}.txt", text or b"")
            write_member(stream, f"{key}.json", _described(description, added))
            yield Outcome(SUCCESS, caption)

    def _read(self, samples: pa.Table) -> Iterator[Members | OSError]:
        """The members of each sample, about READ_BYTES at a time; of remote ones the next are fetched meanwhile."""
        store = self._store()
        shards = samples.column("shard").to_numpy().astype(np.int64)
        starts, sizes = (
            np.stack([_filled(samples, f"{name}_{what}") for name in MEMBERS], axis=1) for what in ("offset", "bytes")
        )
        ends = np.cumsum(np.maximum(sizes, 0).sum(axis=1))
        marks = np.searchsorted(ends, np.arange(READ_BYTES, int(ends[-1]) if len(ends) else 0, READ_BYTES)) + 1
        pieces = [slice(*cut) for cut in pairwise(np.unique([0, *marks.tolist(), len(ends)]).tolist())]
        for at, piece in enumerate(pieces):
            if store.remote:
                for wanted in pieces[at : at + 2]:
                    store.want(member_ranges(shards[wanted], starts[wanted], sizes[wanted])[0])
            yield from read_members(store, shards[piece], starts[piece], sizes[piece])


@lru_cache(maxsize=1)
def _opened(export_id: str, catalog: Path, snapshot: int, cache: Path, cache_bytes: int) -> ShardStore:  # noqa: ARG001
    """The store of a snapshot's tars; one for all shards that a process writes in one export."""
    source = Catalog.open(catalog)
    return open_shards(comparable_shards(source, source.snapshot(snapshot)), cache, cache_bytes)


def _filled(samples: pa.Table, name: str) -> npt.NDArray[np.int64]:
    """A column as int64, −1 where it is null."""
    values: npt.NDArray[np.int64] = samples.column(name).fill_null(-1).to_numpy()
    return values


def _described(source: bytes | None, added: dict[str, Any]) -> bytes:
    """A sample's JSON: what the source says of it, if that is an object, and `added`."""
    if source is not None:
        try:
            value = json.loads(source)
            if isinstance(value, dict):
                return json.dumps({**value, **added}).encode()
        except (ValueError, RecursionError):  # a broken one says nothing
            pass
    return json.dumps(added).encode()


def _sidecar(keys: list[str], samples: pa.Table, outcomes: list[Outcome]) -> pa.Table:
    scores = [
        name
        for name in samples.schema.names[len(COPY_FIELDS) :]
        if pa.types.is_float64(samples.schema.field(name).type)
    ]
    scores = [name for name in scores if name not in {field.name for field in SIDECAR_FIELDS}]
    columns = {
        "key": keys,
        "uid": [uid.hex() for uid in samples.column("uid").to_pylist()],
        "caption": [outcome.caption for outcome in outcomes],
        "status": [outcome.status for outcome in outcomes],
        "error_message": [outcome.detail for outcome in outcomes],
        "width": samples.column("width"),
        "height": samples.column("height"),
        "source_shard": samples.column("shard"),
        "source_key": samples.column("key"),
        "copy": samples.column("copy"),
    }
    fields = [*SIDECAR_FIELDS, *(pa.field(name, pa.float64()) for name in scores)]
    return pa.table({**columns, **{name: samples.column(name) for name in scores}}, pa.schema(fields))
