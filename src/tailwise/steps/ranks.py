"""Ranks of rows in their groups, part by part: by appearance (two passes), or by value (regrouped by group, and back by part)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog.catalog import Part
from tailwise.catalog.columns import PartColumn, RowsByPart
from tailwise.catalog.layout import SPILL
from tailwise.context import Context
from tailwise.execution.base import KERNEL, Apply, Fill, Task, Worker
from tailwise.execution.shuffle import BUCKET_ROWS, Records, Shuffle, cluster_buckets
from tailwise.kernels.ranks import appearance_ranks, rank_dtype, value_ranks
from tailwise.storage.local import scratch

_VALUE = np.dtype([("row", "<i8"), ("group", "<i4"), ("value", "<f4")])


@dataclass(frozen=True)
class Rank(Task[tuple[Part, npt.NDArray[np.int64]], None]):
    """Write the rank of each row by appearance. Items: a part, and the members of each group in the parts before, int64 [K]."""

    groups: PartColumn  # int32; negative for rows of no group, whose rank is 0
    ranks: PartColumn  # to write, see `appearance_ranks`

    def files(self, item: tuple[Part, npt.NDArray[np.int64]]) -> Sequence[Path]:
        """Return the file of a part."""
        return (self.ranks.path(item[0]),)

    def run(self, item: tuple[Part, npt.NDArray[np.int64]], worker: Worker) -> None:  # noqa: ARG002
        """Rank the rows of a part."""
        part, before = item
        self.ranks.write(part, appearance_ranks(np.asarray(self.groups.read(part)), before.copy()))


def _count(groups: PartColumn, count: int, part: Part) -> npt.NDArray[np.int64]:
    """Count the members of each group: int64 [K]."""
    of_rows = groups.read(part)
    return np.bincount(of_rows[of_rows >= 0], minlength=count)


def write_appearance_ranks(
    groups: PartColumn, ranks: PartColumn, count: int, parts: Sequence[Part], context: Context
) -> None:
    """Write the rank of every row in its group by row: uint32, or uint64 (see `appearance_ranks`).

    `groups`: int32, below `count`; negative for rows of no group, whose rank is 0. `count`: K, of groups.
    """
    seen = np.zeros(count, np.int64)
    task = Rank(groups, ranks)

    def items() -> Iterator[tuple[Part, npt.NDArray[np.int64]]]:
        sizes = context.executor.map(Apply(partial(_count, groups, count)), parts, KERNEL)
        for part, size in zip(context.progress(parts, "ranks of rows", len(parts)), sizes, strict=True):
            if not task.is_done((part, seen)):
                yield part, seen.copy()
            seen[:] += size

    for _ in context.executor.map(task, items(), KERNEL):
        pass


@dataclass(frozen=True, eq=False)
class _ByValue:
    groups: PartColumn  # int32; negative for rows of no group
    values: PartColumn  # float32
    sign: int  # −1 to rank the greatest value first, else 1
    parts: Sequence[Part]
    buckets: npt.NDArray[np.int64]  # int64 [K], bucket of each group
    bucket_rows: int  # rows ranked at a time
    by_bucket: Shuffle  # values, _VALUE, one file a part
    by_part: Shuffle  # ranks, see `_rank_records`, one file a bucket

    def spill(self, part: Part) -> None:
        groups, values = self.groups.read(part), self.values.read(part)
        members = np.flatnonzero(groups >= 0)
        records = np.empty(len(members), _VALUE)
        records["row"], records["group"] = part.first_row + members, groups[members]
        records["value"] = np.float32(self.sign) * values[members]
        self.by_bucket.write(part.name, [(self.buckets[records["group"]], records)])

    def rank(self, bucket: int) -> None:
        rows, names = RowsByPart(self.parts), [part.name for part in self.parts]
        ranked = _ranked(self.by_bucket, names, bucket, self.bucket_rows, self.by_part.dtype)
        self.by_part.write(str(bucket), ((rows.numbers_of(found["row"]), found) for found in ranked))

    def collect(self, part: Part, worker: Worker) -> npt.NDArray[Any]:  # noqa: ARG002
        ranks = np.zeros(part.rows, self.by_part.dtype["rank"])
        found = self.by_part.read([*map(str, range(self.by_bucket.buckets))], part.number)
        ranks[found["row"] - part.first_row] = found["rank"]
        return ranks


def write_value_ranks(
    groups: PartColumn,
    values: PartColumn,
    sign: int,
    ranks: PartColumn,
    sizes: npt.NDArray[np.int64],
    parts: Sequence[Part],
    context: Context,
    *,
    bucket_rows: int = BUCKET_ROWS,
) -> None:
    """Write the rank of every row in its group by ascending sign · value, ties by row: of the type of `rank_dtype`.

    Rows are regrouped by group, those of a group of more than `bucket_rows` again by value. Memory is bounded by `bucket_rows`, at
    about 60 bytes a row.

    Args:
        groups: int32; negative for rows of no group, whose rank is 0.
        values: float32.
        sign: 1 or −1.
        ranks: to write.
        sizes: int64 [K], members of each group.
        parts: of the snapshot.
        context: runs the tasks and shows progress.
        bucket_rows: rows ranked at a time; the result doesn't depend on it.
    """
    with scratch(ranks.folder / (ranks.name + SPILL)) as folder:  # also removes that of an interrupted run
        if all(ranks.path(part).exists() for part in parts):
            return
        buckets = cluster_buckets(sizes, bucket_rows)
        by_bucket = Shuffle(folder / "values", _VALUE, int(buckets.max(initial=0)) + 1)
        by_part = Shuffle(folder / "ranks", _rank_records(int(sizes.max(initial=0))), len(parts))
        work = _ByValue(groups, values, sign, parts, buckets, bucket_rows, by_bucket, by_part)
        context.run(Apply(work.spill), parts, "ranking samples: regrouping", KERNEL)
        context.run(Apply(work.rank), range(work.by_bucket.buckets), "ranking samples", KERNEL)
        context.run(Fill(ranks, work.collect), parts, "ranks of rows", KERNEL)


def _rank_records(members: int) -> np.dtype[Any]:
    """Return the type of records of ranks in groups of at most `members` rows."""
    return np.dtype([("row", "<i8"), ("rank", rank_dtype(members).newbyteorder("<"))])


def _ranked(
    shuffle: Shuffle,
    names: Sequence[str],
    bucket: int,
    bucket_rows: int,
    dtype: np.dtype[Any],
    first: int = 0,
    shift: int = 16,
) -> Iterator[Records]:
    """Yield the ranks of a bucket, of `dtype`, from `first` on.

    A group that is too large is split by 16 bits of its values, from `shift` on.
    """
    if shuffle.rows(names, bucket) <= bucket_rows:
        records = shuffle.read(names, bucket)
        yield _ranks(records, first + value_ranks(records["group"], records["value"]).astype(np.int64), dtype)
        return
    if shift < 0:  # equal values, which come by row
        for chunk in shuffle.chunks(names, bucket, bucket_rows):
            yield _ranks(chunk, first + np.arange(len(chunk)), dtype)
            first += len(chunk)
        return
    sizes = np.zeros(1 << 16, np.int64)
    for chunk in shuffle.chunks(names, bucket, bucket_rows):
        sizes += np.bincount(_digits(chunk["value"], shift), minlength=len(sizes))
    pieces = cluster_buckets(sizes, bucket_rows)
    finer = Shuffle(shuffle.folder / str(bucket), _VALUE, int(pieces[-1]) + 1)
    chunks = shuffle.chunks(names, bucket, bucket_rows)
    finer.write("rows", ((pieces[_digits(chunk["value"], shift)], chunk) for chunk in chunks))
    for piece in range(finer.buckets):
        several = np.count_nonzero(sizes[pieces == piece]) > 1  # then it isn't too large
        yield from _ranked(finer, ("rows",), piece, bucket_rows, dtype, first, shift if several else shift - 16)
        first += int(sizes[pieces == piece].sum())


def _ranks(records: Records, ranks: npt.NDArray[np.int64], dtype: np.dtype[Any]) -> Records:
    ranked = np.empty(len(records), dtype)
    ranked["row"], ranked["rank"] = records["row"], ranks
    return ranked


def _digits(values: npt.NDArray[np.float32], shift: int) -> npt.NDArray[np.int64]:
    """Return 16 bits of each value, from `shift` on, of the number that orders floats as they are: int64 [n]."""
    bits = (values + np.float32(0)).view(np.uint32)  # −0 is 0
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    digits: npt.NDArray[np.int64] = ((ordered >> shift) & 0xFFFF).astype(np.int64)
    return digits
