"""Exports of a plan in other tools' formats: one table."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from tailwise.catalog.outputs import is_array, is_table, is_text, writing_output
from tailwise.catalog.removals import Removals
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.export.drawn import RemovedMeanwhileError, nothing_removed_since
from tailwise.export.embedding_atlas import SCHEMA as ATLAS_SCHEMA
from tailwise.export.embedding_atlas import write_embedding_atlas
from tailwise.export.files import (
    SCHEMA,
    URL_SCHEMA,
    check_uids,
    rates_above_one,
    write_datacomp,
    write_keys,
    write_parquet,
    write_rates_json,
    write_urls,
)
from tailwise.export.plan_bundle import write_plan_bundle
from tailwise.export.shards import write_shards
from tailwise.plan.plan import Plan
from tailwise.requests import ExportRequest
from tailwise.sources.datacomp import UID
from tailwise.text import did_you_mean

__all__ = ["EXPORTS", "ExportFormat", "export", "export_figures"]

logger = logging.getLogger(__name__)
ATTEMPTS = 3  # to write a file while samples are removed
Export = Callable[[Plan, int, Path, bool, ExportRequest, Context], int]


def _to_file(write: Callable[..., int], is_ours: Callable[[Path], bool], *, asks: bool = False) -> Export:
    """Return an export to one file; if it `asks`, `write` takes the request as last argument."""

    def run(plan: Plan, epoch: int, path: Path, overwrite: bool, request: ExportRequest, context: Context) -> int:
        asked = [request] if asks else []
        attempts = 0
        while True:
            guard = partial(nothing_removed_since, plan, Removals.of(plan.catalog, plan.snapshot).id)
            try:
                with writing_output(path, plan.catalog, overwrite=overwrite, is_ours=is_ours, guard=guard) as temporary:
                    return write(plan, epoch, temporary, context, *asked)
            except RemovedMeanwhileError:
                if (attempts := attempts + 1) == ATTEMPTS:
                    raise
                logger.info("samples were removed from the catalog: %s is written again", path)

    return run


def _to_shards(plan: Plan, epoch: int, path: Path, overwrite: bool, request: ExportRequest, context: Context) -> int:
    if overwrite:
        raise UserError(f"{path}: shards are never overwritten; name a new folder, without `overwrite`")
    return write_shards(plan, epoch, path, request, context).samples


@dataclass(frozen=True)
class ExportFormat:
    """A format."""

    write: Export  # writes the export, and returns its number of entries
    # returns True if the export differs from epoch to epoch
    by_epoch: Callable[[Plan], bool] = lambda plan: plan.changes
    # figures to report to the user
    figures: Callable[[Plan, int, Context], Mapping[str, float]] = lambda _plan, _epoch, _context: {}
    # refuses plans that the format cannot hold in any epoch
    check: Callable[[Plan, Context], None] = lambda _plan, _context: None
    options: Collection[str] = ()  # fields of ExportRequest that have an effect
    # says, with these options, why an epoch would do nothing; "" if it decides
    idle_epoch: Callable[[ExportRequest], str] = lambda _request: ""


EXPORTS: dict[str, ExportFormat] = {
    "datacomp": ExportFormat(_to_file(write_datacomp, is_array(UID)), check=check_uids),
    "rates-json": ExportFormat(_to_file(write_rates_json, is_text("{")), lambda plan: plan.annealed, rates_above_one),
    "keys": ExportFormat(_to_file(write_keys, is_text(""))),
    "parquet": ExportFormat(_to_file(write_parquet, is_table(SCHEMA))),
    "urls": ExportFormat(
        _to_file(write_urls, is_table(URL_SCHEMA), asks=True),
        lambda _: False,
        options=["captions"],
        idle_epoch=lambda request: "" if request.captions else " without `captions`",
    ),
    "shards": ExportFormat(_to_shards, options=["shard_samples", "workers", "max_rejected", "captions"]),
    "plan-bundle": ExportFormat(
        write_plan_bundle, lambda _: False, options=["licence"], idle_epoch=lambda _: ", which is of all epochs"
    ),
    "embedding-atlas": ExportFormat(
        _to_file(write_embedding_atlas, is_table(ATLAS_SCHEMA), asks=True),
        lambda plan: plan.annealed,
        options=["limit", "projection"],
    ),
}


def export(
    plan: Plan,
    format_name: str,
    path: Path,
    *,
    epoch: int | None = None,
    overwrite: bool = False,
    request: ExportRequest | None = None,
    context: Context | None = None,
) -> int:
    """Write a plan in another tool's format, a name of EXPORTS; return the number of entries.

    `path` is the file, or the folder of new shards. `epoch` may be None where all epochs are the same.

    Raises:
        UserError: the format is unknown, the epoch is missing, or the file cannot be written there or with these options.
    """
    context, request = context or Context(), request or ExportRequest()
    chosen, drawn = _format(format_name, plan, epoch, context)
    if epoch is not None and (why := chosen.idle_epoch(request)):
        raise UserError(f"`epoch` does nothing in an export to {format_name}{why}: leave it out")
    for item in fields(request):
        if getattr(request, item.name) != item.default and item.name not in chosen.options:
            others = [name for name, other in EXPORTS.items() if item.name in other.options]
            raise UserError(f"`{item.name}` does nothing in an export to {format_name}: it is for {', '.join(others)}")
    try:
        return chosen.write(plan, drawn, path, overwrite, request, context)
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
