"""DataComp's subset file: the uids of an epoch's samples, for its resharder.

The resharder reads the uid in each sample's .json and writes every sample whose uid is in the file. So each uid of the file must be in the
tars, and must belong to one sample only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.files import file_stamp, read_array
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.base import KERNEL, Task, Worker
from tailwise.export.drawn import DrawnEpoch, DrawnPart, map_drawn
from tailwise.plan.plan import Plan
from tailwise.shards.containers import containers_of
from tailwise.shards.content import hashed_uid

UID = np.dtype("u8,u8")
_REMEDY = "export `to` shards (new tars, with uids in their .json), or `to` parquet or keys"


def write_datacomp(plan: Plan, epoch: int, path: Path, context: Context) -> int:
    """Write a sorted 1-D array of dtype "u8,u8", with one entry per copy; return the number of copies.

    The file format needs all uids sorted, so memory is about 60 bytes per drawn sample. Raise a UserError if a drawn sample has no uid of
    the source, or shares its uid with another sample.
    """
    uids = sorted_uids([*map_drawn(plan, epoch, _given_uids, context)])
    write_subset(uids, path)
    _check_unshared(plan, path, context)
    return len(uids)


def check_uids(plan: Plan, context: Context) -> None:
    """Raise a UserError if a sample of epoch 0 has no uid of the source."""
    for _ in map_drawn(plan, 0, _given_uids, context):
        pass


def _given_uids(epoch: DrawnEpoch, part: Part) -> npt.NDArray[np.uint64]:
    """Return the uids of a part; refuse samples whose uid is tailwise's hash, or whose tar has no .json for it."""
    shards = epoch.plan.catalog.shards(epoch.plan.snapshot)
    paths, containers = shards.column("path"), containers_of(shards)
    drawn = epoch.part(part, ["uid", "shard", "key", "json_bytes"])
    columns = (drawn.samples.column(name).to_pylist() for name in ("uid", "shard", "key", "json_bytes"))
    for uid, shard, key, json_bytes in zip(*columns, strict=True):
        if uid == hashed_uid(shard, key) or (json_bytes is None and containers[shard].has_bytes):
            raise UserError(
                f"DataComp's resharder finds samples by the uid in their .json, and sample {key!r} of {paths[shard]} has none: {_REMEDY}"
            )
    return repeated_uids(drawn)


def repeated_uids(drawn: DrawnPart) -> npt.NDArray[np.uint64]:
    """Return the halves of the uids of drawn samples, once per copy: uint64 [n, 2]."""
    halves = np.frombuffer(b"".join(drawn.samples.column("uid").to_pylist()), ">u8").reshape(-1, 2)
    return np.repeat(halves, drawn.copies, axis=0).astype(np.uint64)


def sorted_uids(pieces: list[npt.NDArray[np.uint64]]) -> npt.NDArray[np.uint64]:
    """Return all uids in ascending order: uint64 [n, 2]."""
    halves = np.concatenate([np.empty((0, 2), np.uint64), *pieces])
    return np.ascontiguousarray(halves[np.lexsort((halves[:, 1], halves[:, 0]))])


def write_subset(uids: npt.NDArray[np.uint64], path: Path) -> None:
    """Write the subset file of sorted uids."""
    with path.open("wb") as stream:
        np.save(stream, uids.view(UID).reshape(-1), allow_pickle=False)


def _check_unshared(plan: Plan, path: Path, context: Context) -> None:
    """Refuse uids of a subset file that several samples of the pool have, drawn or not: the resharder would write all of them."""
    parts, task = plan.catalog.parts(plan.snapshot), _FindUids(plan.catalog, path)
    uids = read_array(path)
    if not len(uids):
        return
    counts = np.zeros(len(uids), np.int64)
    for places in context.executor.map(task, parts, KERNEL):
        np.add.at(counts, places[places >= 0], 1)
    if not (counts > 1).any():
        return
    shared, names = int(np.argmax(counts > 1)), list[str]()
    paths = plan.catalog.shards(plan.snapshot).column("path")
    for part, places in zip(parts, context.executor.map(task, parts, KERNEL), strict=True):
        rows = np.flatnonzero(places == shared)
        samples = plan.catalog.samples_at(part.number, rows, ["shard", "key"]).to_pylist() if len(rows) else []
        names += [f"{sample['key']!r} of {paths[sample['shard']]}" for sample in samples]
    high, low = uids[shared].tolist()
    raise UserError(
        f"{int((counts > 1).sum()):,} uids of the epoch belong to several samples, such as {high:016x}{low:016x} to "
        f"{' and '.join(names[:2])}: DataComp's resharder would write all of them; {_REMEDY}"
    )


@dataclass(frozen=True)
class _FindUids(Task[Part, npt.NDArray[np.int64]]):
    """Find the uid of each row of a part in a subset file: its first place, −1 where it is not drawn, int64 [n]."""

    catalog: Catalog
    path: Path

    def run(self, item: Part, worker: Worker) -> npt.NDArray[np.int64]:
        drawn = worker.cached(file_stamp(self.path), self._read)
        every = np.frombuffer(b"".join(self.catalog.samples(item, ["uid"]).column(0).to_pylist()), "S16")
        at = np.minimum(np.searchsorted(drawn, every), len(drawn) - 1)
        return np.where(drawn[at] == every, at, -1)

    def _read(self) -> npt.NDArray[np.bytes_]:
        """Return the drawn uids as bytes, ascending."""
        return read_array(self.path).view("<u8").astype(">u8").view("S16")
