"""Exports that name samples by their key alone: DynamiCS's JSON of rates, and a list of keys."""

from __future__ import annotations

from functools import partial
from json.encoder import encode_basestring_ascii
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog.catalog import Part
from tailwise.catalog.outputs import scratch_beside
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.base import KERNEL, Apply
from tailwise.execution.keys import KeyIndex
from tailwise.export.drawn import DrawnEpoch, map_drawn, map_epoch
from tailwise.plan.plan import Plan
from tailwise.storage.delimited import line_of


def write_rates_json(plan: Plan, epoch: int, path: Path, context: Context) -> int:
    """Write `{key: rate}` of every sample of the snapshot, with 0 for never-drawn and removed ones; return their number.

    The DynamiCS authors' trainer gives missing keys a rate of 0.5, so the file has all keys. Raise a UserError if two samples share a key.
    """
    _check_unique_keys(plan, path, context)
    with path.open("wb") as stream:
        stream.write(b"{")
        separator = b"\n"
        for lines in map_epoch(plan, epoch, _rate_lines, plan.catalog.parts(plan.snapshot), context):
            stream.write(separator + lines)
            separator = b",\n"
        stream.write(b"\n}\n")
    return plan.rows


def _rate_lines(epoch: DrawnEpoch, part: Part) -> bytes:
    rows, own = _keys(epoch.plan, part)
    rates, at = np.unique(epoch.rates(part.span)[rows - part.first_row], return_inverse=True)  # as many as clusters
    endings = [f": {rate!r}" for rate in rates.tolist()]
    keys = map(encode_basestring_ascii, own)
    return ",\n".join([key + endings[number] for key, number in zip(keys, at.tolist(), strict=True)]).encode()


def rates_above_one(plan: Plan, epoch: int, context: Context) -> dict[str, float]:
    """Return the number of samples with a rate above 1, and the share of the budget that the authors' trainer therefore loses.

    That trainer draws a sample at most once: of a rate of 2.5 it draws 1.
    """
    above, total, once = 0, 0.0, 0.0
    for sums in map_epoch(plan, epoch, _rate_sums, [*plan.spans()], context):
        above, total, once = above + sums[0], total + sums[1], once + sums[2]
    return {"rates_above_one": above, "short_share": 1 - once / total if above else 0.0}


def _rate_sums(epoch: DrawnEpoch, rows: slice) -> tuple[int, float, float]:
    rates = epoch.rates(rows)
    return int((rates > 1).sum()), float(rates.sum()), float(np.minimum(rates, 1.0).sum())


def write_keys(plan: Plan, epoch: int, path: Path, context: Context) -> int:
    """Write the key of every drawn sample, one line per copy (see `delimited`), in catalog order; return the number of lines.

    Raise a UserError if two samples share a key.
    """
    _check_unique_keys(plan, path, context)
    total = 0
    with path.open("wb") as stream:
        for lines, count in map_drawn(plan, epoch, _key_lines, context):
            stream.write(lines)
            total += count
    return total


def _key_lines(epoch: DrawnEpoch, part: Part) -> tuple[bytes, int]:
    drawn = epoch.part(part, ["key"])
    keys = np.repeat(np.array(drawn.samples.column(0).to_pylist(), dtype=object), drawn.copies)
    return "".join([f"{line_of(key)}\n" for key in keys]).encode(), len(keys)


def _keys(plan: Plan, part: Part) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Return the rows of a part, int64 [n], and their keys, without those of a file that is in the snapshot in a later state."""
    rows = np.arange(part.first_row, part.first_row + part.rows)
    rows = np.setdiff1d(rows, plan.catalog.replaced_rows(plan.snapshot), assume_unique=True)
    keys = plan.catalog.samples(part, ["key"]).column(0).take(pa.array(rows - part.first_row))
    return rows, list(keys.to_pylist())


def _index_keys(plan: Plan, index: KeyIndex, part: Part) -> None:
    rows, keys = _keys(plan, part)
    index.add(keys, rows)


def _check_unique_keys(plan: Plan, path: Path, context: Context) -> None:
    with scratch_beside(path) as folder:
        index = KeyIndex(folder / "keys", plan.rows)
        add = Apply(partial(_index_keys, plan, index))
        for _ in context.executor.map(add, plan.catalog.parts(plan.snapshot), KERNEL):
            pass
        clashing = index.seal(context.executor, count_only=True)
    if clashing:
        problem = (
            "share their key with a sample of another shard, and readers of this format distinguish samples by key only"
        )
        raise UserError(
            f"{clashing:,} samples {problem}: export `to` parquet (shard, key and uid) or shards (new keys)"
        )
