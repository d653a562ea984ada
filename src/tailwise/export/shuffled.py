"""An epoch's copies, shuffled and divided among new shards, through files on disk.

The samples of an output shard are spread over the whole catalog. So the copies are first written to a scratch folder, in runs, each in the
order of the shuffle; an output shard is then a short slice of every run.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from tailwise.catalog.catalog import Part
from tailwise.catalog.schema import SAMPLE_SCHEMA
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.export.drawn import DrawnEpoch, RemovedMeanwhileError, map_drawn, map_epoch
from tailwise.kernels.keyed import MAX_PERMUTED, permute_range, stream_key
from tailwise.plan.plan import Plan

RUN_COPIES = 1 << 20
COPY_FIELDS = (
    pa.field("position", pa.int64(), nullable=False),
    pa.field("copy", pa.uint8(), nullable=False),
    pa.field("row", pa.int64(), nullable=False),
)
_CAPTION = "caption"  # read from the tar


@dataclass(frozen=True)
class Epoch:
    """Size and content of an epoch."""

    digest: str  # 128-bit hash of rows and copies
    by_shard: npt.NDArray[np.int64]  # copies from each source shard, int64 [shards]
    by_part: npt.NDArray[np.int64]  # copies from each part, int64 [parts]
    scores: list[str]  # score columns of the samples, sorted

    @property
    def copies(self) -> int:
        """Number of copies of all samples."""
        return int(self.by_shard.sum())


def survey(plan: Plan, epoch: int, context: Context) -> Epoch:
    """Count the copies of an epoch. Raise a UserError if there are more copies than can be shuffled."""
    state = hashlib.blake2b(digest_size=16)
    by_shard = np.zeros(plan.snapshot.shards, np.int64)
    by_part, scores = list[int](), set[str]()
    for rows, copies, shards, columns in map_drawn(plan, epoch, _survey, context):
        by_shard += shards
        by_part.append(int(shards.sum()))
        scores |= columns
        state.update(rows.data)
        state.update(copies.data)
    held = Epoch(state.hexdigest(), by_shard, np.array(by_part, np.int64), sorted(scores))
    if held.copies > MAX_PERMUTED:
        raise UserError(
            f"the epoch holds {held.copies:,} copies, and at most {MAX_PERMUTED:,} can be shuffled: plan fewer"
        )
    return held


def _survey(
    epoch: DrawnEpoch, part: Part
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8], npt.NDArray[np.int64], set[str]]:
    """Return the drawn rows of a part, their copies, the copies from each shard, and the columns of scores."""
    plan, drawn = epoch.plan, epoch.part(part, ["shard"])
    shards = np.bincount(drawn.samples.column("shard").to_numpy(), drawn.copies, plan.snapshot.shards)
    schema = pq.read_schema(plan.catalog.samples_path(part.number))
    scores = {item.name for item in schema if pa.types.is_float64(item.type)} - {*SAMPLE_SCHEMA.names}
    return drawn.rows.astype("<i8"), drawn.copies, shards.astype(np.int64), scores


def run_schema(scores: list[str]) -> pa.Schema:
    """Return the columns of the runs: position in the shuffle, number of the copy, row, and all of the sample but its caption."""
    fields = [item for item in SAMPLE_SCHEMA if item.name != _CAPTION]
    return pa.schema([*COPY_FIELDS, *fields, *(pa.field(name, pa.float64()) for name in scores)])


def write_runs(plan: Plan, epoch: int, held: Epoch, folder: Path, context: Context) -> None:
    """Write the copies of an epoch into runs: Arrow files of about RUN_COPIES rows, each in ascending order of position.

    Raise a RemovedMeanwhileError if the epoch no longer holds these copies.
    """
    write = partial(_write_runs, held=held, folder=folder)
    for _ in map_epoch(plan, epoch, write, plan.catalog.parts(plan.snapshot), context):
        pass


def _write_runs(epoch: DrawnEpoch, part: Part, *, held: Epoch, folder: Path) -> None:
    schema = run_schema(held.scores)
    there = pq.read_schema(epoch.plan.catalog.samples_path(part.number)).names  # scores differ from part to part
    drawn = epoch.part(part, [name for name in schema.names if name in there])
    if drawn.copies.sum() != held.by_part[part.number]:
        raise RemovedMeanwhileError
    samples = pa.concat_tables([drawn.samples, schema.empty_table()], promote_options="default")
    key = stream_key(epoch.plan.config["seed"], "shards", epoch.number)
    first = int(held.by_part[: part.number].sum())
    for number, rows in enumerate(pieces(drawn.copies, RUN_COPIES)):
        counts = drawn.copies[rows]
        index = np.repeat(np.arange(rows.start, rows.stop), counts)
        begins = np.repeat(np.cumsum(counts, dtype=np.int64) - counts, counts)
        copy = (np.arange(len(index)) - begins).astype(np.uint8)
        position = permute_range(key, held.copies, first, len(index))
        order = np.argsort(position)
        run = samples.select(schema.names[len(COPY_FIELDS) :]).take(pa.array(index[order]))
        for item, values in zip(COPY_FIELDS[::-1], (drawn.rows[index], copy, position), strict=True):
            run = run.add_column(0, item, pa.array(values[order]))
        run = run.cast(schema).combine_chunks()
        with pyarrow.ipc.new_file(folder / f"run-{part.number:06d}-{number:06d}.arrow", schema) as writer:
            writer.write_table(run, max_chunksize=run.num_rows)
        first += len(index)


def pieces(sizes: npt.NDArray[Any], size: int) -> list[slice]:
    """Return consecutive slices that cover all items, whose sizes [n] sum to about `size` in each."""
    ends = np.cumsum(sizes, dtype=np.int64)
    marks = np.searchsorted(ends, np.arange(size, int(ends[-1]) if len(ends) else 0, size)) + 1
    return [slice(*cut) for cut in pairwise(np.unique([0, *marks.tolist(), len(ends)]).tolist())]


def read_positions(folder: Path, start: int, stop: int) -> pa.Table:
    """Return the copies with positions start … stop − 1 of the shuffle, in that order.

    It maps the runs, and reads only its result and a few pages of each.
    """
    pieces = []
    for path in sorted(folder.glob("run-*.arrow")):
        with pa.memory_map(str(path)) as source:
            run = pyarrow.ipc.open_file(source).read_all()
            positions = run.column("position").chunk(0).to_numpy() if run.num_rows else np.empty(0, np.int64)
            low, high = np.searchsorted(positions, (start, stop))
            pieces.append(run.take(pa.array(np.arange(low, high))))  # a copy: the file can be closed
    table = pa.concat_tables(pieces)
    return table.take(pa.array(np.argsort(table.column("position").to_numpy())))
