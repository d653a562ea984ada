"""Exports: a plan in other tools' formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tailwise.catalog.outputs import check_output, is_array, is_table, is_text
from tailwise.errors import UserError
from tailwise.export.by_key import write_keys, write_rates_json
from tailwise.export.datacomp import UID, write_datacomp
from tailwise.export.parquet import SCHEMA, write_parquet
from tailwise.export.shards import Sharding, write_shards
from tailwise.plan.plan import Plan
from tailwise.progress import Track, silent

__all__ = ["EXPORTS", "ExportOptions", "Sharding", "export"]


@dataclass(frozen=True)
class ExportOptions:
    """What some formats may be told.

    Attributes:
        overwrite: whether an existing file may be replaced.
        sharding: how new shards are made.
    """

    overwrite: bool = False
    sharding: Sharding | None = None


Export = Callable[[Plan, int, Path, ExportOptions, Track], int]


def _to_file(write: Callable[[Plan, int, Path, Track], int], is_ours: Callable[[Path], bool]) -> Export:
    def run(plan: Plan, epoch: int, path: Path, options: ExportOptions, track: Track) -> int:
        if options.sharding is not None:
            raise UserError(
                "shard_samples, workers and max_rejected (--shard-samples, --workers, --max-rejected) are for the export to shards only"
            )
        check_output(path, plan.catalog, overwrite=options.overwrite, is_ours=is_ours)
        return write(plan, epoch, path, track)

    return run


def _to_shards(plan: Plan, epoch: int, path: Path, options: ExportOptions, track: Track) -> int:
    if options.overwrite:
        raise UserError(f"{path}: shards are never overwritten; name a new folder, without --overwrite")
    return write_shards(plan, epoch, path, options.sharding, track).samples


EXPORTS: dict[str, tuple[Export, str]] = {
    "datacomp": (_to_file(write_datacomp, is_array(UID)), "DataComp's subset file (.npy of uids) of one epoch"),
    "rates-json": (_to_file(write_rates_json, is_text("{")), "DynamiCS's {key: rate} of all samples (.json)"),
    "keys": (_to_file(write_keys, is_text("")), "one key a line, of one epoch (.txt)"),
    "parquet": (
        _to_file(write_parquet, is_table(SCHEMA)),
        "shard, key, uid, cluster, rate, copies of one epoch (.parquet)",
    ),
    "shards": (_to_shards, "a webdataset of one epoch, shuffled (a folder)"),
}


def export(
    plan: Plan,
    format_name: str,
    path: Path,
    *,
    epoch: int = 0,
    overwrite: bool = False,
    sharding: Sharding | None = None,
    track: Track = silent,
) -> int:
    """Writes a plan in another tool's format; returns how many entries it wrote.

    Args:
        plan: which plan.
        format_name: a name of EXPORTS.
        path: of the file, or of the folder of new shards.
        epoch: whose draw, for the formats that hold one epoch.
        overwrite: whether an existing file may be replaced.
        sharding: how new shards are made.
        track: shows progress.

    Raises:
        UserError: unknown format, or it can't be written there or with these options.
    """
    if format_name not in EXPORTS:
        raise UserError(f"unknown export {format_name!r}: use {', '.join(EXPORTS)}")
    options = ExportOptions(overwrite, sharding)
    return EXPORTS[format_name][0](plan, plan.drawn_epoch(epoch), path, options, track)
