"""DataComp's subset file: the uids of an epoch's samples, for its resharder.

The resharder reads the uid in each sample's .json and writes every sample whose uid is in the file. So each uid of the file must be in the
tars, and must belong to one sample only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog.catalog import Part
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.export.drawn import DrawnPart, drawn_parts
from tailwise.plan.plan import Plan
from tailwise.shards.containers import Container, containers_of
from tailwise.shards.content import hashed_uid

UID = np.dtype("u8,u8")
_REMEDY = "export `to` shards (new tars, with uids in their .json), or `to` parquet or keys"


def write_datacomp(plan: Plan, epoch: int, path: Path, context: Context) -> int:
    """Write a sorted 1-D array of dtype "u8,u8", with one entry per copy; return the number of copies.

    The file format needs all uids sorted, so memory is about 60 bytes per drawn sample. Raise a UserError if a drawn sample has no uid of
    the source, or shares its uid with another sample.
    """
    uids = sorted_uids(
        [repeated_uids(part.samples.column("uid"), part.copies) for part in _given(plan, epoch, context)]
    )
    _check_unshared(plan, uids)
    write_subset(uids, path)
    return len(uids)


def check_uids(plan: Plan) -> None:
    """Raise a UserError if a sample of epoch 0 has no uid of the source."""
    for _ in _given(plan, 0, Context()):
        pass


def _given(plan: Plan, epoch: int, context: Context) -> Iterator[DrawnPart]:
    """Yield the drawn samples, and refuse those without a uid in their tar."""
    shards = plan.catalog.shards(plan.snapshot)
    paths, containers = shards.column("path").to_pylist(), containers_of(shards)
    for part in drawn_parts(plan, epoch, ["uid", "shard", "key", "json_bytes"], context):
        _check_given(part.samples, paths, containers)
        yield part


def repeated_uids(uids: pa.ChunkedArray, copies: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Return the halves of uids, once per copy: uint64 [n, 2]."""
    halves = np.frombuffer(b"".join(uids.to_pylist()), ">u8").reshape(-1, 2)
    return np.repeat(halves, copies, axis=0).astype(np.uint64)


def sorted_uids(pieces: list[npt.NDArray[np.uint64]]) -> npt.NDArray[np.uint64]:
    """Return all uids in ascending order: uint64 [n, 2]."""
    halves = np.concatenate([np.empty((0, 2), np.uint64), *pieces])
    return np.ascontiguousarray(halves[np.lexsort((halves[:, 1], halves[:, 0]))])


def write_subset(uids: npt.NDArray[np.uint64], path: Path) -> None:
    """Write the subset file of sorted uids."""
    with path.open("wb") as stream:
        np.save(stream, uids.view(UID).reshape(-1), allow_pickle=False)


def _check_given(samples: pa.Table, paths: list[str], containers: list[Container]) -> None:
    """Refuse samples whose uid is tailwise's hash, or whose tar has no .json for it."""
    columns = (samples.column(name).to_pylist() for name in ("uid", "shard", "key", "json_bytes"))
    for uid, shard, key, json_bytes in zip(*columns, strict=True):
        if uid == hashed_uid(shard, key) or (json_bytes is None and containers[shard].has_bytes):
            raise UserError(
                f"DataComp's resharder finds samples by the uid in their .json, and sample {key!r} of {paths[shard]} has none: {_REMEDY}"
            )


def _check_unshared(plan: Plan, uids: npt.NDArray[np.uint64]) -> None:
    """Refuse uids that several samples of the pool have, drawn or not: the resharder would write all of them."""
    if not len(uids):
        return
    drawn = np.unique(uids.astype(">u8").view("S16").reshape(-1))
    counts = np.zeros(len(drawn), np.int64)
    for part in plan.catalog.parts(plan.snapshot):
        every, at = _places(plan, part, drawn)
        counts += np.bincount(at[drawn[at] == every], minlength=len(drawn))
    if not (counts > 1).any():
        return
    shared = drawn[np.argmax(counts > 1)]
    paths = plan.catalog.shards(plan.snapshot).column("path").to_pylist()
    names = []
    for part in plan.catalog.parts(plan.snapshot):
        every, _ = _places(plan, part, drawn)
        samples = plan.catalog.samples(part, ["shard", "key"]).take(np.flatnonzero(every == shared)).to_pylist()
        names += [f"{sample['key']!r} of {paths[sample['shard']]}" for sample in samples]
    text = bytes(shared).ljust(16, b"\0").hex()  # NumPy cuts zeros at the end
    raise UserError(
        f"{int((counts > 1).sum()):,} uids of the epoch belong to several samples, such as {text} to "
        f"{' and '.join(names[:2])}: DataComp's resharder would write all of them; {_REMEDY}"
    )


def _places(
    plan: Plan, part: Part, drawn: npt.NDArray[np.bytes_]
) -> tuple[npt.NDArray[np.bytes_], npt.NDArray[np.int64]]:
    """Return the uids of a part's rows, and the place of each among the drawn ones, as of `searchsorted`."""
    every = np.frombuffer(b"".join(plan.catalog.samples(part, ["uid"]).column(0).to_pylist()), "S16")
    return every, np.minimum(np.searchsorted(drawn, every), len(drawn) - 1)
