"""DataComp's subset file: the uids of an epoch's samples, for its resharder.

The resharder reads the uid in each sample's .json and writes every sample whose uid is in the file. So each uid of the file must be in the
tars, and must belong to one sample only. Uids are regrouped by their leading bits, so that memory does not grow with the pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from tailwise.catalog.catalog import Part
from tailwise.catalog.outputs import scratch_beside
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.keys import BUCKET_ROWS, bits_of_buckets, buckets_of
from tailwise.execution.shuffle import Records, Shuffle
from tailwise.export.drawn import DrawnEpoch, DrawnPart, map_drawn
from tailwise.plan.plan import Plan
from tailwise.shards.containers import with_bytes
from tailwise.shards.content import hashed_uid

UID = np.dtype("u8,u8")
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<i8"), ("copies", "u1")])
_REMEDY = "export `to` shards (new tars, with uids in their .json), or `to` parquet or keys"


def write_datacomp(plan: Plan, epoch: int, path: Path, context: Context) -> int:
    """Write a sorted 1-D array of dtype "u8,u8", with one entry per copy; return the number of copies.

    Raise a UserError if a drawn sample has no uid of the source, or shares its uid with another sample, drawn or not: the resharder would
    write both.
    """
    bits = bits_of_buckets(plan.rows, BUCKET_ROWS)
    with scratch_beside(path) as folder:
        shuffle = Shuffle(folder / "uids", _RECORD, 1 << bits)
        copies = sum(map_drawn(plan, epoch, partial(_spill, shuffle=shuffle, bits=bits), context))
        shared = list[Records]()
        with path.open("wb") as stream:
            header = np.lib.format.header_data_from_array_1_0(np.empty(0, UID))
            np.lib.format.write_array_header_1_0(stream, {**header, "shape": (copies,)})
            for entries in _sorted_buckets(shuffle, plan):
                stream.write(np.repeat(entries[["high", "low"]].astype(UID), entries["copies"]).tobytes())
                shared += _shared(entries)
    if shared:
        _refuse_shared(plan, shared)
    return copies


def check_uids(plan: Plan, context: Context) -> None:
    """Raise a UserError if a sample of epoch 0 has no uid of the source."""
    for _ in map_drawn(plan, 0, _given_uids, context):
        pass


def _given_uids(epoch: DrawnEpoch, part: Part) -> DrawnPart:
    """Return the drawn samples of a part; refuse those whose uid is tailwise's hash, or whose tar has no .json for it."""
    shards = epoch.plan.catalog.shards(epoch.plan.snapshot)
    paths, first_states = shards.column("path"), epoch.plan.catalog.first_states()
    with_files = {*with_bytes(shards.filter(pc.equal(shards["part"], part.number)))["shard"].to_pylist()}
    drawn = epoch.part(part, ["uid", "shard", "key", "json_bytes"])
    columns = (drawn.samples.column(name).to_pylist() for name in ("uid", "shard", "key", "json_bytes"))
    for uid, shard, key, json_bytes in zip(*columns, strict=True):
        if uid == hashed_uid(int(first_states[shard]), key) or (json_bytes is None and shard in with_files):
            raise UserError(
                f"DataComp's resharder finds samples by the uid in their .json, and sample {key!r} of {paths[shard]} has none: {_REMEDY}"
            )
    return drawn


def _spill(epoch: DrawnEpoch, part: Part, *, shuffle: Shuffle, bits: int) -> int:
    """Write the uids of all samples of a part, with the copies of each, by their leading bits; return the number of copies."""
    drawn, catalog = _given_uids(epoch, part), epoch.plan.catalog
    uids = catalog.samples(part, ["uid"]).column(0).to_pylist()
    records = np.zeros(part.rows, _RECORD)
    records["high"], records["low"] = np.frombuffer(b"".join(uids), ">u8").reshape(-1, 2).T
    records["row"] = np.arange(part.first_row, part.first_row + part.rows)
    records["copies"][drawn.rows - part.first_row] = drawn.copies
    records = records[~np.isin(records["row"], catalog.replaced_rows(epoch.plan.snapshot))]  # each has a successor
    shuffle.write(part.name, [(buckets_of(records, bits), records)])
    return int(drawn.copies.sum())


def _sorted_buckets(shuffle: Shuffle, plan: Plan) -> Iterator[Records]:
    """Yield the records of all samples, ascending by uid, those of a uid by row."""
    names = [part.name for part in plan.catalog.parts(plan.snapshot)]
    for bucket in range(shuffle.buckets):
        entries = shuffle.read(names, bucket)
        yield entries[np.lexsort((entries["low"], entries["high"]))]


def _shared(entries: Records) -> list[Records]:
    """Return the records of each uid that several samples have, and one of them is drawn."""
    same = (entries["high"][1:] == entries["high"][:-1]) & (entries["low"][1:] == entries["low"][:-1])
    first = np.flatnonzero(np.r_[True, ~same]) if len(entries) else np.empty(0, np.int64)
    sizes = np.diff(np.r_[first, len(entries)])
    groups = [entries[start : start + size] for start, size in zip(first[sizes > 1], sizes[sizes > 1], strict=True)]
    return [group for group in groups if group["copies"].any()]


def _refuse_shared(plan: Plan, shared: list[Records]) -> None:
    paths, names = plan.catalog.shards(plan.snapshot).column("path"), list[str]()
    for row in shared[0]["row"][:2].tolist():
        part = next(part for part in plan.catalog.parts(plan.snapshot) if row < part.first_row + part.rows)
        rows: npt.NDArray[np.int64] = np.array([row - part.first_row])
        sample = plan.catalog.samples_at(part.number, rows, ["shard", "key"]).to_pylist()[0]
        names.append(f"{sample['key']!r} of {paths[sample['shard']]}")
    high, low = shared[0][["high", "low"]][0].tolist()
    raise UserError(
        f"{len(shared):,} uids of the epoch belong to several samples, such as {high:016x}{low:016x} to {' and '.join(names)}: DataComp's "
        f"resharder would write all of them; {_REMEDY}"
    )
