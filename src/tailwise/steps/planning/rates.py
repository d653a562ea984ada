"""A plan from rates that were made elsewhere: one expected number of copies per sample, joined by uid, key, url or hash."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.columns import PartColumn, PlainColumn
from tailwise.catalog.drops import Survivors
from tailwise.catalog.files import create_array, file_digest
from tailwise.context import Context
from tailwise.errors import MAX_REJECTED, NotFoundError, UserError, check_share
from tailwise.execution.base import Worker
from tailwise.plan.plan import Plan
from tailwise.plan.quotas import MAX_BUDGET, UNIT_BITS, UNITS
from tailwise.requests import PlanRequest
from tailwise.steps.importing import listed as lists
from tailwise.steps.importing.join import fill, refuse_other_pool
from tailwise.steps.importing.listed import SampleList, check_matched, has_columns, no_match, read_list
from tailwise.steps.importing.names import Names
from tailwise.steps.planning.cells import tally, write_cells
from tailwise.steps.planning.weighted import MAX_REPEATS, draw_of, truncates, write_shard_offsets
from tailwise.storage.local import scratch

SUFFIXES = (".json", *lists.SUFFIXES)


def make_rate_plan(catalog: Catalog, name: str, request: PlanRequest, context: Context | None = None) -> Plan:
    """Make a plan with a rate per sample, drawn by Bernoulli; by `draw` stream with exact counts, in groups of nearly equal rates.

    The file is DynamiCS's JSON `{key or sha256: rate}`, read as a stream, a table with a column of rates, or a list without rates, in
    which a name that is given twice is drawn twice: DataComp's .npy, or text. See `SampleList`.

    Raises:
        UserError: the file can't be read, names ambiguous keys, lacks samples, or has rates outside [0, 255].
    """
    context = context or Context()
    path = _check_file(request.rates)
    table = has_columns(path)
    if not table and request.rate_column is not None:
        raise UserError(f"`rate_column` {request.rate_column} does nothing with {path}: it has no columns")
    column = (request.rate_column or "rate") if table else None
    snapshot = catalog.snapshot()
    draw = "bernoulli" if request.draw is None else draw_of(request, "random")
    most = 1 if truncates(request) else MAX_REPEATS
    config: dict[str, Any] = {
        "method": "rates",
        "column": column,
        "missing_rate": request.missing_rate,
        "snapshot": snapshot.number,
        "dynamic": request.dynamic is not False,
        "draw": draw,
        "seed": request.seed,
    }
    if draw == "stream":
        config |= {"rate_groups": True, "max_repeats": most}
    if truncates(request):
        config["above_one"] = request.above_one
    if request.match is not None:
        config["match"] = request.match
    listed = SampleList(path, "rates", request.match, column)
    max_rejected, missing_rate = request.max_rejected, request.missing_rate
    if max_rejected is None:
        max_rejected = 1.0 if listed.counted else MAX_REJECTED  # a subset names some of the samples only
    if missing_rate is None and listed.counted:
        missing_rate = 0.0
    if missing_rate is not None and not 0 <= missing_rate <= MAX_REPEATS:
        raise UserError(f"`missing_rate` {missing_rate}: must lie between 0 and {MAX_REPEATS}")
    check_share(max_rejected)
    survivors = Survivors(catalog, (), snapshot)
    inputs = {"snapshot": snapshot.id, "rates": file_digest(path), **survivors.inputs}
    with Artifact(catalog.plan_folder(name), "plan", config, inputs) as artifact:
        if not artifact.done:
            figures = _join(
                catalog, artifact, survivors, listed, missing_rate, max_rejected, most, request.strict, context
            )
            if draw == "stream":
                bits = UNIT_BITS if config["dynamic"] else 0
                figures["clusters"] = _group(artifact, catalog.parts(snapshot), most, bits, context)
            write_shard_offsets(catalog, artifact, snapshot)
            artifact.finish({"pool": survivors.pool, **figures})
    made = Plan(catalog, name)
    check_matched(request.strict, made.summary, str(path))
    return made


@dataclass(frozen=True)
class _Written:
    column: PartColumn

    def read(self, part: Part, worker: Worker) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:  # noqa: ARG002
        """Return group and rate of each row of a part: see `Rated`."""
        return np.zeros(part.rows, np.int32), np.asarray(self.column.read(part)).astype(np.float64)


def _group(artifact: Artifact, parts: Sequence[Part], most: int, bits: int, context: Context) -> int:
    """Write groups of nearly equal rates in place of the rates; return their number."""
    column = PlainColumn(artifact.folder, layout.RATE)
    source = _Written(column)
    cells = tally(source, parts, context)
    budget = round(int(cells[:, 2].sum()) / UNITS)
    if not 1 <= budget < MAX_BUDGET:
        raise UserError(
            f"the rates sum to {budget:,} samples: `draw` stream needs 1 to {MAX_BUDGET - 1:,}; use bernoulli"
        )
    quotas = np.array([budget << UNIT_BITS])
    sizes = write_cells(artifact, source, cells, quotas, most, bits, parts, context)
    for path in map(column.path, parts):
        path.unlink(missing_ok=True)
        layout.marker(path).unlink(missing_ok=True)
    return len(sizes)


def _check_file(path: Path | None) -> Path:
    if path is None:
        raise UserError(f"method 'rates' needs `rates`, a file: {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise NotFoundError(f"{path} is no file: rates are read from {', '.join(SUFFIXES)}")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: rates are read from {', '.join(SUFFIXES)}")
    return path


def _join(
    catalog: Catalog,
    artifact: Artifact,
    survivors: Survivors,
    listed: SampleList,
    missing_rate: float | None,
    max_rejected: float,
    most: int,
    strict: float | None,
    context: Context,
) -> dict[str, Any]:
    """Write the rates, or `most` where that is less; return figures for people."""
    with scratch(artifact.path(layout.JOINING), own=True) as work:
        snapshot = survivors.snapshot
        rates = create_array(work / "rates.npy", (snapshot.rows,), np.float32)
        rates[:] = np.nan
        matched = read_list(catalog, snapshot, listed, work, context.progress, _check_range)
        kind, index = matched.kind, matched.index
        fill(catalog, matched, rates, None if listed.counted else "rate")
        if listed.counted and not index.matched:
            raise no_match(catalog, snapshot, listed, kind, index)
        if listed.counted and np.nanmax(rates) > MAX_REPEATS:
            raise UserError(
                f"a name is given {np.nanmax(rates):,.0f} times in {listed.path}: at most {MAX_REPEATS} copies are possible"
            )
        refuse_other_pool(kind, index, rates, "rate", max_rejected)
        rates[survivors.removals.rows] = np.nan
        samples = int((~np.isnan(rates)).sum())
        counts = {"names": index.distinct, "names_matched": index.matched, "samples_matched": samples}
        check_matched(strict, {**counts, "example": index.example}, str(listed.path))
        rates[survivors.removals.rows] = 0
        without = int(np.isnan(rates).sum())
        if without and missing_rate is None:
            raise UserError(
                f"{without:,} of {snapshot.rows:,} samples have no rate ({index.unknown:,} rates belong to no sample): "
                "give them one with `missing_rate` (0 never draws them)"
            )
        np.nan_to_num(rates, copy=False, nan=missing_rate or 0.0)
        if not (eligible := int(np.count_nonzero(rates))):
            raise UserError(f"all {snapshot.rows:,} rates are 0, or of removed samples: nothing would ever be drawn")
        column = PlainColumn(artifact.folder, layout.RATE)
        for part in catalog.parts(snapshot):
            column.write(part, np.minimum(rates[part.span], np.float32(most)))
    return {"eligible": eligible, "rates_without_sample": index.unknown, "matched_by": kind, **counts}


def _check_range(names: Names, values: npt.NDArray[np.float64]) -> None:
    bad = np.flatnonzero(~((values >= 0) & (values <= MAX_REPEATS)))
    if bad.size:
        raise UserError(f"the rate of {names[bad[0]]!r} is {values[bad[0]]}: must lie between 0 and {MAX_REPEATS}")
