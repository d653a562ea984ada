"""A plan from rates that were made elsewhere: one expected number of copies per sample, joined by uid or key."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

import ijson
import numpy as np
import numpy.typing as npt

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Catalog
from tailwise.catalog.columns import PlainColumn
from tailwise.catalog.drops import Survivors
from tailwise.catalog.files import create_array, file_digest
from tailwise.context import Context
from tailwise.errors import MAX_REJECTED, NotFoundError, UserError, check_share
from tailwise.plan.plan import Plan
from tailwise.requests import PlanRequest
from tailwise.steps.importing.join import BATCH, Batch, join_values, read_numbers
from tailwise.steps.planning.weighted import MAX_REPEATS, truncates, write_shard_offsets
from tailwise.storage.local import scratch


def make_rate_plan(catalog: Catalog, name: str, request: PlanRequest, context: Context | None = None) -> Plan:
    """Make a plan with a rate per sample, drawn by Bernoulli.

    The file is DynamiCS's JSON `{key: rate}`, read as a stream, or Parquet with a column of rates, and uid, key or image_path.

    Raises:
        UserError: the file can't be read, names ambiguous keys, lacks samples, or has rates outside [0, 255].
    """
    context = context or Context()
    path, column, missing_rate = request.rates, request.rate_column or "rate", request.missing_rate
    max_rejected = MAX_REJECTED if request.max_rejected is None else request.max_rejected
    if path is None:
        raise UserError("method 'rates' needs `rates`, a .json or .parquet file")
    if not path.is_file():
        raise NotFoundError(f"{path} is no file: give a .json or .parquet file of rates")
    if missing_rate is not None and not 0 <= missing_rate <= MAX_REPEATS:
        raise UserError(f"`missing_rate` {missing_rate}: must lie between 0 and {MAX_REPEATS}")
    check_share(max_rejected)
    snapshot = catalog.snapshot()
    config = {
        "method": "rates",
        "column": column if path.suffix.lower() == ".parquet" else None,
        "missing_rate": missing_rate,
        "snapshot": snapshot.number,
        "dynamic": request.dynamic is not False,
        "draw": "bernoulli",
        "seed": request.seed,
    }
    if truncates(request):
        config["above_one"] = request.above_one
    survivors = Survivors(catalog, (), snapshot)
    inputs = {"snapshot": snapshot.id, "rates": file_digest(path), **survivors.inputs}
    with Artifact(catalog.plan_folder(name), "plan", config, inputs) as artifact:
        if not artifact.done:
            identifier, batches = _open_rates(path, column)
            tracked = context.progress(batches, "joining rates")
            most, shares = 1 if truncates(request) else MAX_REPEATS, (missing_rate, max_rejected)
            unknown, eligible = _join(catalog, artifact, survivors, identifier, tracked, *shares, most)
            write_shard_offsets(catalog, artifact, snapshot)
            artifact.finish({"pool": survivors.pool, "eligible": eligible, "rates_without_sample": unknown})
    return Plan(catalog, name)


def _open_rates(path: Path, column: str) -> tuple[str, Iterator[Batch]]:
    """Which identifier the file names samples by, and its rates in batches."""
    readers: dict[str, Callable[[], tuple[str, Iterator[Batch]]]] = {
        ".json": lambda: ("key", _json_batches(path)),
        ".parquet": lambda: read_numbers(path, column, "rates"),
    }
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: rates are read from {' or '.join(readers)}")
    return readers[path.suffix.lower()]()


def _json_batches(path: Path) -> Iterator[Batch]:
    keys: list[str] = []
    rates: list[float] = []
    try:
        with path.open("rb") as stream:
            head = stream.read(4096)
            if head.removeprefix(BOM_UTF8).lstrip()[:1] != b"{":
                raise TypeError("it doesn't begin with {")
            stream.seek(len(BOM_UTF8) if head.startswith(BOM_UTF8) else 0)
            for key, rate in _read_rates(stream):
                keys.append(key)
                rates.append(rate)
                if len(keys) == BATCH:
                    yield keys, np.array(rates)
                    keys, rates = [], []
    except (ijson.JSONError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is not a JSON object of key → rate: {error}") from error
    yield keys, np.array(rates)


def _read_rates(stream: IO[bytes]) -> Iterator[tuple[str, float]]:
    """Yield keys and rates event by event: nested values, which ijson would build without a bound on the depth, end it at once."""
    key: str | None = None
    for event, value in ijson.basic_parse(stream, use_float=True):
        if event == "map_key":
            key = value
        elif event == "number" and key is not None:
            yield key, float(value)
        elif event != "end_map" and not (event == "start_map" and key is None):
            shown = repr(value) if event in {"string", "boolean", "null"} else "no number"
            raise TypeError(f"the rate of {key!r} is {shown}")


def _join(
    catalog: Catalog,
    artifact: Artifact,
    survivors: Survivors,
    identifier: str,
    batches: Iterable[Batch],
    missing_rate: float | None,
    max_rejected: float,
    most: int,
) -> tuple[int, int]:
    """Write the rates, or `most` where that is less; return how many rates belong to no sample, and how many samples can be drawn."""
    with scratch(artifact.path(layout.JOINING), own=True) as work:
        snapshot = survivors.snapshot
        rates = create_array(work / "rates.npy", (snapshot.rows,), np.float32)
        rates[:] = np.nan
        place = work / "keys"
        unknown = join_values(catalog, snapshot, identifier, batches, rates, place, "rate", max_rejected, _check_range)
        rates[survivors.removals.rows] = 0
        without = int(np.isnan(rates).sum())
        if without and missing_rate is None:
            raise UserError(
                f"{without:,} of {snapshot.rows:,} samples have no rate ({unknown:,} rates belong to no sample): "
                "give them one with `missing_rate` (0 never draws them)"
            )
        np.nan_to_num(rates, copy=False, nan=missing_rate or 0.0)
        if not (eligible := int(np.count_nonzero(rates))):
            raise UserError(f"all {snapshot.rows:,} rates are 0: nothing would ever be drawn")
        column = PlainColumn(artifact.folder, layout.RATE)
        for part in catalog.parts(snapshot):
            column.write(part, np.minimum(rates[part.span], np.float32(most)))
    return unknown, eligible


def _check_range(keys: list[str], values: npt.NDArray[np.float64]) -> None:
    bad = np.flatnonzero(~((values >= 0) & (values <= MAX_REPEATS)))
    if bad.size:
        raise UserError(f"the rate of {keys[bad[0]]!r} is {values[bad[0]]}: must lie between 0 and {MAX_REPEATS}")
