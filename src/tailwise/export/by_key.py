"""Exports that name samples by their key alone: DynamiCS's JSON of rates, and a list of keys."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tailwise.catalog.outputs import scratch_beside
from tailwise.catalog.removals import Removals
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.keys import KeyIndex
from tailwise.export.drawn import drawn_parts, tracked_parts
from tailwise.plan.plan import Plan
from tailwise.storage.delimited import line_of


def write_rates_json(plan: Plan, epoch: int, path: Path, context: Context) -> int:
    """Write `{key: rate}` of every sample of the snapshot, with 0 for never-drawn and removed ones; return their number.

    The DynamiCS authors' trainer gives missing keys a rate of 0.5, so the file has all keys. Raise a UserError if two samples share a key.
    """
    _check_unique_keys(plan, path)
    written = 0
    with path.open("w", encoding="utf-8") as stream:
        removals = Removals.of(plan.catalog, plan.snapshot, context.progress)
        stream.write("{")
        for part in tracked_parts(plan, context):
            keys = plan.catalog.samples(part, ["key"]).column(0).to_pylist()
            rates = (plan.rate(part.span, epoch) * removals.keeps(part.span)).tolist()
            lines = [f"{json.dumps(key)}: {rate!r}" for key, rate in zip(keys, rates, strict=True)]
            stream.write((",\n" if written else "\n") + ",\n".join(lines))
            written += len(lines)
        stream.write("\n}\n")
    return written


def rates_above_one(plan: Plan, epoch: int) -> dict[str, float]:
    """Return the number of samples with a rate above 1, and the share of the budget that the authors' trainer therefore loses.

    That trainer draws a sample at most once: of a rate of 2.5 it draws 1.
    """
    removals = Removals.of(plan.catalog, plan.snapshot)
    above, total, once = 0, 0.0, 0.0
    for span in plan.spans():
        rates = plan.rate(span, epoch) * removals.keeps(span)
        above += int((rates > 1).sum())
        total += float(rates.sum())
        once += float(np.minimum(rates, 1.0).sum())
    return {"rates_above_one": above, "short_share": 1 - once / total if above else 0.0}


def write_keys(plan: Plan, epoch: int, path: Path, context: Context) -> int:
    """Write the key of every drawn sample, one line per copy (see `delimited`), in catalog order; return the number of lines.

    Raise a UserError if two samples share a key.
    """
    _check_unique_keys(plan, path)
    total = 0
    with path.open("w", encoding="utf-8") as stream:
        for part in drawn_parts(plan, epoch, ["key"], context):
            keys = np.repeat(np.array(part.samples.column(0).to_pylist(), dtype=object), part.copies)
            stream.writelines(f"{line_of(key)}\n" for key in keys)
            total += len(keys)
    return total


def _check_unique_keys(plan: Plan, path: Path) -> None:
    with scratch_beside(path) as folder:
        index = KeyIndex(folder / "keys", plan.rows)
        for part in plan.catalog.parts(plan.snapshot):
            keys = plan.catalog.samples(part, ["key"]).column(0).to_pylist()
            index.add(keys, np.arange(part.first_row, part.first_row + part.rows))
        clashing = index.seal()
    if clashing:
        problem = (
            "share their key with a sample of another shard, and readers of this format distinguish samples by key only"
        )
        raise UserError(
            f"{clashing:,} samples {problem}: export `to` parquet (shard, key and uid) or shards (new keys)"
        )
