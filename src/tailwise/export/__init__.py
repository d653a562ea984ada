"""Exports of a plan in other tools' formats: one table."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tailwise.catalog.outputs import is_array, is_table, is_text, writing_output
from tailwise.catalog.removals import Removals
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.export.by_key import rates_above_one, write_keys, write_rates_json
from tailwise.export.datacomp import UID, check_uids, write_datacomp
from tailwise.export.drawn import RemovedMeanwhileError, nothing_removed_since
from tailwise.export.parquet import SCHEMA, write_parquet
from tailwise.export.shards import write_shards
from tailwise.export.urls import SCHEMA as URL_SCHEMA
from tailwise.export.urls import write_urls
from tailwise.plan.plan import Plan
from tailwise.requests import ShardsRequest, caption_weights
from tailwise.text import did_you_mean

__all__ = ["EXPORTS", "ExportFormat", "export", "export_figures"]

logger = logging.getLogger(__name__)
ATTEMPTS = 3  # to write a file while samples are removed
Export = Callable[[Plan, int, Path, bool, ShardsRequest | None, Context], int]


def _to_file(write: Callable[..., int], is_ours: Callable[[Path], bool], *, captions: bool = False) -> Export:
    """Return an export to one file; with `captions`, `write` takes the weights of joined ones as last argument."""

    def run(
        plan: Plan, epoch: int, path: Path, overwrite: bool, sharding: ShardsRequest | None, context: Context
    ) -> int:
        asked = sharding or ShardsRequest()
        if replace(asked, captions=None) != ShardsRequest():
            raise UserError("`shard_samples`, `workers` and `max_rejected` are for the export to shards only")
        if asked.captions is not None and not captions:
            raise UserError("`captions` are for the exports to shards and urls only: others name samples alone")
        mixed = [caption_weights(asked.captions)] if captions else []
        attempts = 0
        while True:
            guard = partial(nothing_removed_since, plan, Removals.of(plan.catalog, plan.snapshot).id)
            try:
                with writing_output(path, plan.catalog, overwrite=overwrite, is_ours=is_ours, guard=guard) as temporary:
                    return write(plan, epoch, temporary, context, *mixed)
            except RemovedMeanwhileError:
                if (attempts := attempts + 1) == ATTEMPTS:
                    raise
                logger.info("samples were removed from the catalog: %s is written again", path)

    return run


def _to_shards(
    plan: Plan, epoch: int, path: Path, overwrite: bool, sharding: ShardsRequest | None, context: Context
) -> int:
    if overwrite:
        raise UserError(f"{path}: shards are never overwritten; name a new folder, without `overwrite`")
    return write_shards(plan, epoch, path, sharding, context).samples


@dataclass(frozen=True)
class ExportFormat:
    """A format."""

    write: Export  # writes the export, and returns its number of entries
    by_epoch: Callable[[Plan], bool] = lambda plan: (
        plan.changes
    )  # returns True if the export differs from epoch to epoch
    # figures to report to the user
    figures: Callable[[Plan, int, Context], Mapping[str, float]] = lambda _plan, _epoch, _context: {}
    # refuses plans that the format cannot hold in any epoch
    check: Callable[[Plan, Context], None] = lambda _plan, _context: None


EXPORTS: dict[str, ExportFormat] = {
    "datacomp": ExportFormat(_to_file(write_datacomp, is_array(UID)), check=check_uids),
    "rates-json": ExportFormat(_to_file(write_rates_json, is_text("{")), lambda plan: plan.annealed, rates_above_one),
    "keys": ExportFormat(_to_file(write_keys, is_text(""))),
    "parquet": ExportFormat(_to_file(write_parquet, is_table(SCHEMA))),
    "urls": ExportFormat(_to_file(write_urls, is_table(URL_SCHEMA), captions=True), lambda _: False),
    "shards": ExportFormat(_to_shards),
}


def export(
    plan: Plan,
    format_name: str,
    path: Path,
    *,
    epoch: int | None = None,
    overwrite: bool = False,
    sharding: ShardsRequest | None = None,
    context: Context | None = None,
) -> int:
    """Write a plan in another tool's format, a name of EXPORTS; return the number of entries.

    `path` is the file, or the folder of new shards. `epoch` may be None where all epochs are the same.

    Raises:
        UserError: the format is unknown, the epoch is missing, or the file cannot be written there or with these options.
    """
    context = context or Context()
    chosen, epoch = _format(format_name, plan, epoch, context)
    try:
        return chosen.write(plan, epoch, path, overwrite, sharding, context)
    finally:
        context.executor.forget()


def export_figures(
    plan: Plan, format_name: str, epoch: int | None = None, context: Context | None = None
) -> Mapping[str, float]:
    """Return figures of an export to report; for "rates-json": rates_above_one (samples), short_share (of the budget)."""
    context = context or Context()
    chosen, epoch = _format(format_name, plan, epoch, context)
    return chosen.figures(plan, epoch, context)


def _format(name: str, plan: Plan, epoch: int | None, context: Context) -> tuple[ExportFormat, int]:
    """Return the format of a name, and the epoch to draw."""
    if name not in EXPORTS:
        raise UserError(f"unknown export {name!r}: {did_you_mean(name, EXPORTS)}")
    chosen = EXPORTS[name]
    if epoch is None and chosen.by_epoch(plan):
        chosen.check(plan, context)
        raise UserError(f"the epochs of plan {plan.name!r} differ: name the one to write with `epoch` (0, 1, …)")
    return chosen, plan.drawn_epoch(epoch or 0)
