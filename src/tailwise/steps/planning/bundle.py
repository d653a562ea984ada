"""A plan from a bundle that another catalog wrote: the same epochs on another copy of the pool, or what is missing of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Catalog, Snapshot
from tailwise.catalog.columns import PlainColumn
from tailwise.catalog.drops import Survivors
from tailwise.catalog.files import create_array, file_digest, read_array, write_array, write_table, writing
from tailwise.context import Context
from tailwise.errors import DamagedError, NotFoundError, UnsupportedError, UserError
from tailwise.export.plan_bundle import FORMAT, RECORD, SAMPLES, SCHEMA, TEXTS
from tailwise.kernels.ranks import rank_dtype
from tailwise.plan.plan import DRAWS, Plan
from tailwise.requests import PlanRequest, refuse_given
from tailwise.shards.columns import BATCH_ROWS, DAMAGE, open_table
from tailwise.steps.importing.listed import check_matched
from tailwise.steps.importing.names import Entries, Matched, match_names
from tailwise.steps.planning.weighted import MAX_REPEATS, write_shard_offsets
from tailwise.storage.delimited import parse_json, read_text
from tailwise.storage.local import scratch
from tailwise.storage.remote import download, is_remote
from tailwise.text import did_you_mean

MATCHES = ("uid", *TEXTS)
GROUP_COLUMNS = ("cluster", "size", "quota", "quota_units")
MOST_BYTES = 1 << 40  # of a file that is fetched
NUMBERS = {"rate": np.float32, "copies": np.uint8, "group": np.int32, "rank": np.int64, "row": np.int64}


@dataclass(frozen=True)
class Bundle:
    """A plan bundle on this machine, whose files are those of its record."""

    folder: Path
    record: Mapping[str, Any]

    @property
    def samples(self) -> int:
        """Number of samples."""
        return int(self.record["samples"])

    @property
    def fixed(self) -> bool:
        """True if all epochs are the same."""
        return bool(self.record["fixed"])

    @property
    def by_rate(self) -> bool:
        """True if the plan has one rate a sample, and no groups."""
        return bool(self.record["by_rate"]) or self.fixed

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Yield columns of the samples; a DamagedError if they cannot be read."""
        try:
            with open_table(self.folder / SAMPLES, SCHEMA.names) as file:
                if file.metadata.num_rows != self.samples:
                    raise ValueError(f"it has {file.metadata.num_rows:,} samples, {RECORD} states {self.samples:,}")
                yield from file.iter_batches(BATCH_ROWS, columns)
        except DAMAGE as error:
            raise DamagedError(f"{self.folder / SAMPLES} can't be read: {error}") from error


def make_bundle_plan(catalog: Catalog, name: str, request: PlanRequest, context: Context) -> Plan:
    """Make a plan with the epochs of a bundle (see `export.plan_bundle`), as far as its samples are in this catalog.

    Samples are matched by uid, sha256 or url: by what most have. Of several with one name, the first of both sides belong together. What is
    missing is listed in the plan's folder (layout.MISSING).

    Raises:
        UserError: it is no bundle, not one of its samples is here, or fewer than `strict` asks for.
    """
    refuse_given(request, {"dynamic", "seed"}, "with method 'bundle': the bundle decides")
    if request.source is None:
        raise UserError("method 'bundle' needs `source`, a folder that `tailwise export … --to plan-bundle` wrote")
    if request.match is not None and request.match not in MATCHES:
        raise UserError(f"`match` {request.match!r}: with a bundle, {did_you_mean(request.match, MATCHES)}")
    snapshot = catalog.snapshot()
    survivors = Survivors(catalog, (), snapshot)
    with opened_bundle(request.source) as bundle:
        record = bundle.record
        config = {
            "method": "bundle",
            "bundle": record["name"],
            "match": request.match,
            "snapshot": snapshot.number,
            "max_repeats": record["max_repeats"],
            "dynamic": bool(record["dynamic"]) and not bundle.fixed,
            "draw": "bernoulli" if bundle.fixed else record["draw"],
            "seed": record["seed"],
            "rate_groups": record["rate_groups"] and not bundle.fixed,
        }
        inputs = {"snapshot": snapshot.id, "bundle": file_digest(bundle.folder / RECORD), **survivors.inputs}
        with Artifact(catalog.plan_folder(name), "plan", config, inputs) as artifact:
            if not artifact.done:
                with scratch(artifact.path(layout.JOINING), own=True) as work:
                    figures = _Making(catalog, survivors, bundle, artifact, work, context).write(request)
                write_shard_offsets(catalog, artifact, snapshot)
                columns = record.get("encoders")
                made_with = columns.values() if isinstance(columns, dict) else ()
                encoders = sorted({str(about.get("encoder")) for about in made_with if isinstance(about, dict)})
                artifact.finish({"pool": survivors.pool, **figures, "encoders": encoders})
    made = Plan(catalog, name)
    check_matched(request.strict, made.summary, request.source)
    return made


@contextmanager
def opened_bundle(source: str) -> Iterator[Bundle]:
    """Yield a bundle; a remote one is fetched first. A UserError if it is none, or a file is not what its record states."""
    if not is_remote(source):
        yield _checked(Path(source).expanduser(), source)
        return
    with TemporaryDirectory() as place:
        folder = Path(place)
        _fetch(source, folder, RECORD)
        for name in _record(folder, source)["files"]:
            _fetch(source, folder, name)
        yield _checked(folder, source)


def _fetch(source: str, folder: Path, name: str) -> None:
    try:
        with (folder / name).open("wb") as stream:
            download(f"{source.rstrip('/')}/{name}", stream, MOST_BYTES)
    except OSError as error:
        raise NotFoundError(f"{source} is no plan bundle, or can't be read: {error}") from error


def _record(folder: Path, source: str) -> dict[str, Any]:
    if not (folder / RECORD).is_file():
        raise NotFoundError(
            f"{source} is no plan bundle (no {RECORD}): give a folder of `tailwise export … --to plan-bundle`"
        )
    try:
        record = parse_json(read_text(folder / RECORD))
    except (OSError, ValueError) as error:
        raise DamagedError(f"{RECORD} of {source} can't be read: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        raise UnsupportedError(f"{source} is a plan bundle of format {found!r}, this tailwise reads {FORMAT}")
    kinds: dict[str, Any] = {"name": str, "fixed": bool, "by_rate": bool, "rate_groups": bool, "dynamic": bool}
    kinds |= {"uids_of_source": bool}
    kinds |= {"seed": int, "samples": int, "max_repeats": int, "files": dict, "draw": str}
    wrong = [name for name, kind in kinds.items() if not isinstance(record.get(name), kind)]
    names = {SAMPLES, layout.GROUP_TABLE, layout.QUOTAS}
    if (
        wrong
        or record["draw"] not in DRAWS
        or (record["by_rate"] and record["draw"] != "bernoulli")
        or not {SAMPLES} <= {*record["files"]} <= names
        or not all(isinstance(about, dict) for about in record["files"].values())
        or record["samples"] < 1
    ):
        raise DamagedError(f"{RECORD} of {source} is damaged{f': {wrong[0]}' if wrong else ''}; get the bundle again")
    return record


def _checked(folder: Path, source: str) -> Bundle:
    record = _record(folder, source)
    for name, about in record["files"].items():
        if not (folder / name).is_file() or file_digest(folder / name) != about.get("digest"):
            raise DamagedError(
                f"{name} of {source} is missing, or not the file that {RECORD} describes: get the bundle again"
            )
    return Bundle(folder, record)


class _Making:
    """The making of a plan from a bundle."""

    def __init__(
        self, catalog: Catalog, survivors: Survivors, bundle: Bundle, artifact: Artifact, work: Path, context: Context
    ) -> None:
        self._catalog, self._survivors, self._bundle = catalog, survivors, bundle
        self._artifact, self._work, self._context = artifact, work, context
        self._snapshot: Snapshot = survivors.snapshot

    def write(self, request: PlanRequest) -> dict[str, Any]:
        """Match the samples and write all columns; return figures for people."""
        kind, places = self._match(request.match)
        seen = np.zeros(self._bundle.samples, np.bool_)
        for part in self._catalog.parts(self._snapshot):
            found = places[part.span]
            found[~self._survivors.removals.keeps(part.span)] = -1
            places[part.span] = found
            seen[found[found >= 0]] = True
        matched = int(seen.sum())
        figures = {"names": self._bundle.samples, "names_matched": matched, "samples_matched": matched}
        if not matched:
            raise UserError(
                f"not one of the {self._bundle.samples:,} samples of the bundle is in this pool, by "
                f"{request.match or 'uid, sha256 or url'}: give a bundle of another copy of this pool"
            )
        check_matched(request.strict, figures, str(request.source))
        values = self._values()
        groups, members = (0, self._bundle.samples) if self._bundle.by_rate else self._write_groups(values)
        self._write_columns(places, values)
        missing = {"missing": self._bundle.samples - matched, "missing_share": 0.0}
        if missing["missing"]:
            rates = values["copies" if self._bundle.fixed else "rate"].astype(np.float64)
            missing["missing_share"] = float(rates[~seen].sum() / max(rates.sum(), 1e-9))
            self._write_missing(seen)
        # Samples that were removed before the export are members of their groups still.
        return {
            "eligible": matched,
            "matched_by": kind,
            **figures,
            **missing,
            "absent": members - matched,
            "clusters": groups,
        }

    def _match(self, match: str | None) -> tuple[str, npt.NDArray[np.int64]]:
        """Return by what samples are matched, and the number in the bundle of each row, −1 for none: int64 [N], mapped."""

        def entries(kind: str) -> Iterator[Entries]:
            for batch in self._context.progress(self._bundle.batches([kind]), f"matching by {kind}"):
                yield batch.column(0).fill_null("").to_pylist(), None

        def matched(*kinds: str) -> Matched:
            return match_names(self._catalog, self._snapshot, kinds, entries, self._work / kinds[0], paired=True)

        if match or self._bundle.record["uids_of_source"]:
            found = matched(*([match] if match else MATCHES))
        elif not (found := matched(*TEXTS)).index.matched:
            found = matched("uid")  # a hash of shard and key, which may be that of another sample
        return found.kind, found.places

    def _values(self) -> dict[str, npt.NDArray[Any]]:
        """Return the numbers of all samples of the bundle, [samples] each, mapped, checked."""
        names = [name for name in NUMBERS if name not in {"group", "rank"} or not self._bundle.by_rate]
        names = ["copies"] if self._bundle.fixed else [name for name in names if name != "copies"]
        values = {
            name: create_array(self._work / f"value-{name}.npy", (self._bundle.samples,), NUMBERS[name])
            for name in names
        }
        first = 0
        for batch in self._bundle.batches(names):
            for name in names:
                column = batch.column(name)
                found = column.to_numpy(zero_copy_only=False)
                good = column.null_count == 0 and (found >= 0).all()
                if not good or (name in {"rate", "copies"} and not (found <= MAX_REPEATS).all()):
                    raise DamagedError(f"{SAMPLES} of the bundle has a {name} that is missing or out of bounds")
                values[name][first : first + len(found)] = found
            first += len(batch)
        return values

    def _write_groups(self, values: Mapping[str, npt.NDArray[Any]]) -> tuple[int, int]:
        """Write sizes and quotas of the groups; return their number, and that of the members that may be drawn.

        Raises:
            DamagedError: samples do not fit into the groups.
        """
        try:
            with open_table(self._bundle.folder / layout.GROUP_TABLE, GROUP_COLUMNS) as file:
                table = file.read(list(GROUP_COLUMNS))
            sizes, quotas = (table.column(name).to_numpy() for name in ("size", "quota_units"))
            annealed = (
                np.array(read_array(self._bundle.folder / layout.QUOTAS))
                if layout.QUOTAS in self._bundle.record["files"]
                else None
            )
        except DAMAGE as error:
            raise DamagedError(f"the groups of the bundle can't be read: {error}") from error
        groups, ranks = values["group"], values["rank"]
        whole = sizes.dtype == quotas.dtype == np.int64 and (sizes >= 0).all() and (quotas >= 0).all()
        fits = annealed is None or (
            annealed.dtype == np.int64 and annealed.shape[1:] == sizes.shape and (annealed >= 0).all()
        )
        if not whole or not fits or groups.max() >= len(sizes) or (ranks >= sizes[groups]).any():
            raise DamagedError("the groups of the bundle do not fit its samples; get the bundle again")
        write_table(self._artifact.path(layout.GROUP_TABLE), table)
        if annealed is not None:
            write_array(self._artifact.path(layout.QUOTAS), annealed)
        self._rank_type = rank_dtype(int(sizes.max(initial=0)))
        reachable = quotas > 0 if annealed is None else (annealed > 0).any(axis=0)
        return len(sizes), int(sizes[reachable].sum())

    def _write_columns(self, places: npt.NDArray[np.int64], values: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write what the draw needs of each row; rows without a sample of the bundle are never drawn."""
        columns: dict[str, tuple[str, Any, int]] = {layout.ORIGIN: ("row", np.int64, 0)}
        if self._bundle.fixed:
            columns = {layout.RATE: ("copies", np.float32, 0)}
        elif self._bundle.by_rate:
            columns[layout.RATE] = ("rate", np.float32, 0)
        else:
            if self._bundle.record["draw"] != "bernoulli":
                del columns[layout.ORIGIN]
            columns |= {layout.GROUP: ("group", np.int32, -1), layout.RANK: ("rank", self._rank_type, 0)}
        for part in self._context.progress(self._catalog.parts(self._snapshot), "writing the plan"):
            numbers = places[part.span]
            there = np.flatnonzero(numbers >= 0)
            for name, (value, dtype, empty) in columns.items():
                written = np.full(part.rows, empty, dtype)
                written[there] = values[value][numbers[there]]
                PlainColumn(self._artifact.folder, name).write(part, written)

    def _write_missing(self, seen: npt.NDArray[np.bool_]) -> None:
        """Write uid, sha256, url and rate of the samples of the bundle that are not here."""
        first, names = 0, ["uid", *TEXTS, "rate"]
        schema = pa.schema([SCHEMA.field(name) for name in names])
        with (
            writing(self._artifact.path(layout.MISSING)) as stream,
            pq.ParquetWriter(stream, schema, compression="zstd") as writer,
        ):
            for batch in self._bundle.batches(names):
                missing = batch.filter(pa.array(~seen[first : first + len(batch)]))
                writer.write_table(pa.Table.from_batches([missing]).select(names).cast(schema))
                first += len(batch)
