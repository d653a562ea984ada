"""Exports: a plan in other tools' formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tailwise.errors import UserError
from tailwise.export.by_key import write_keys, write_rates_json
from tailwise.export.datacomp import write_datacomp
from tailwise.export.drawn import check_output
from tailwise.export.parquet import write_parquet
from tailwise.plan.plan import Plan
from tailwise.progress import Track, silent

EXPORTS: dict[str, tuple[Callable[[Plan, int, Path, Track], int], str]] = {
    "datacomp": (write_datacomp, "DataComp's subset file (.npy of uids) of one epoch"),
    "rates-json": (write_rates_json, "DynamiCS's {key: rate} of all samples (.json)"),
    "keys": (write_keys, "one key a line, of one epoch (.txt)"),
    "parquet": (write_parquet, "shard, key, uid, cluster, rate, copies of one epoch (.parquet)"),
}


def export(
    plan: Plan, format_name: str, path: Path, *, epoch: int = 0, overwrite: bool = False, track: Track = silent
) -> int:
    """Writes a plan in another tool's format; returns how many entries it wrote.

    Args:
        plan: which plan.
        format_name: a name of EXPORTS.
        path: of the file.
        epoch: whose draw, for the formats that hold one epoch.
        overwrite: whether an existing file may be replaced.
        track: shows progress.

    Raises:
        UserError: unknown format, or the file can't be written there.
    """
    if format_name not in EXPORTS:
        raise UserError(f"unknown export {format_name!r}: use {', '.join(EXPORTS)}")
    return EXPORTS[format_name][0](plan, plan.drawn_epoch(epoch), check_output(path, overwrite), track)
