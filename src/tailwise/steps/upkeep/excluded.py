"""Removed: every sample that will never be drawn, with the first cause on its way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from tailwise.catalog.catalog import Catalog, Part, Snapshot
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.columns import RowColumn, RowsByPart
from tailwise.catalog.drops import DropList, Survivors
from tailwise.catalog.files import ROW_GROUP_ROWS, read_table, write_table
from tailwise.catalog.kinds import DROP_LIST
from tailwise.catalog.outputs import for_spreadsheets, is_table, is_text, scratch_beside, writing_output
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.shuffle import Shuffle
from tailwise.plan.plan import MAX_EPOCH, Plan
from tailwise.steps.upkeep.words import Words

EXCLUDED_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),  # path or URL of the tar
        pa.field("key", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("group", pa.string()),  # in the plan's clustering: value of a grouping, or "cluster 17"
        pa.field("explanation", pa.string(), nullable=False),  # the reason, for people
        pa.field("stage", pa.string(), nullable=False),  # remove, dedup, filter, cluster or plan
        pa.field("reason", pa.string(), nullable=False),
        pa.field("cluster", pa.int32()),  # that it was compared in (dedup), or belongs to (plan)
        # of the sample that it duplicates; or file of the image of an evaluation set, and number in it
        *(pa.field(name, pa.string()) for name in ("kept_shard", "kept_key")),
        pa.field("similarity", pa.float32()),  # to it
    ]
)
CAUSE_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        *(EXCLUDED_SCHEMA.field(name) for name in ("stage", "reason", "cluster")),
        pa.field("label", pa.int32()),  # in the plan's clustering
        pa.field("kept_row", pa.int64()),
        # the last two, of evaluation sets alone
        *(EXCLUDED_SCHEMA.field(name) for name in ("similarity", "kept_shard", "kept_key")),
    ]
)
_CSV_HEAD = ",".join(f'"{name}"' for name in EXCLUDED_SCHEMA.names)
CHUNK_ROWS = 1 << 20
NOTHING = -1
_PAIR = np.dtype([("kept_row", "<i8"), ("row", "<i8")])


def ever_drawn(plan: Plan, rows: slice, epochs: int | None = None) -> npt.NDArray[np.bool_]:
    """Return which rows some epoch of the plan may hold, or the first `epochs` do hold, removals aside: bool [n]."""
    if not plan.dynamic:  # every epoch is epoch 0
        return plan.draw(0, rows) > 0
    if epochs is not None:
        return np.asarray(sum(plan.draw(epoch, rows).astype(np.int64) for epoch in range(epochs)) > 0)
    return plan.drawable(rows)


class Causes:
    """Why samples are never drawn: by a plan, or by any plan without the catalog's drop lists.

    Attributes:
        snapshot: whose rows.
        removals: its tombstones.
        lists: drop lists, in the order in which they are asked.
    """

    def __init__(self, catalog: Catalog, plan: Plan | None = None, epochs: int | None = None) -> None:
        """Opens what takes part.

        `plan`: which plan; None for all finished drop lists of the newest snapshot. `epochs`: number of epochs that count, from epoch 0;
        None for all that a plan may have.

        Raises:
            UserError: a drop list or the clustering of the plan is gone.
        """
        self._plan, self._epochs = plan, epochs
        self.snapshot = catalog.snapshot() if plan is None else plan.snapshot
        names = _all_lists(catalog, self.snapshot) if plan is None else lists_of(plan)
        survivors = Survivors(catalog, names, self.snapshot, _users(plan) if plan is not None else None)
        self.removals, self.lists = survivors.removals, survivors.lists

    def of(self, rows: slice) -> pa.Table:
        """The never drawn ones of some rows of one part, ascending, with the first cause of each: CAUSE_SCHEMA."""
        found = _Found(rows)
        numbers = self.removals.numbers_of(np.arange(rows.start, rows.stop))
        if self._plan is not None:
            found.limit((numbers > 0) | ~ever_drawn(self._plan, rows, self._epochs))
        for number in np.unique(numbers[numbers > 0]).tolist():
            found.mark(np.flatnonzero(numbers == number), "remove", self.removals.removals[number - 1].reason)
        for item in self.lists:
            found.mark_list(item)
        if self._plan is not None:
            groups = None if self._plan.by_rate else self._plan.groups[rows]
            self._mark_plan(self._plan, found, groups)
            found.belong_to(groups if self._plan.has_clusters else None)
            if groups is not None:
                found.labels = self._labels(self._plan, rows)
        return found.table()

    def _mark_plan(self, plan: Plan, found: _Found, groups: npt.NDArray[np.int32] | None) -> None:
        rows = found.rows
        if groups is None:
            found.mark(np.flatnonzero(plan.rates[rows] == 0), "plan", "rate 0")
        else:
            if plan.config.get("score"):
                scoreless = (groups < 0) & (self._labels(plan, rows) >= 0)
                found.mark(np.flatnonzero(scoreless), "plan", f"no score {plan.config['score']['name']}")
            found.mark(np.flatnonzero(groups < 0), *_why_no_group(plan))
            found.mark(np.flatnonzero((groups >= 0) & ~plan.reachable[groups]), "plan", "quota 0")
        pick = plan.config.get("pick", "random")
        reason = "not in the one draw of a static plan" if pick == "random" else f"not picked ({pick} first)"
        if plan.dynamic and self._epochs is not None:
            reason = f"not in the first {self._epochs} epochs"
        found.mark(np.arange(rows.stop - rows.start), "plan", reason)

    def _labels(self, plan: Plan, rows: slice) -> npt.NDArray[np.int32]:
        """The cluster of rows of one part in the plan's clustering; 0 where it has none."""
        clustering = _clustering(plan)
        if clustering is None:
            return np.zeros(rows.stop - rows.start, np.int32)
        return RowColumn(clustering.labels.path, plan.catalog.parts(clustering.snapshot), np.int32)[rows]


class _Found:
    """Causes of some rows, while they are gathered: who has one keeps it."""

    def __init__(self, rows: slice) -> None:
        self.rows = rows
        count = rows.stop - rows.start
        self._open = np.ones(count, np.bool_)  # without a cause
        self._causes: dict[tuple[str, str], int] = {}
        self._code = np.full(count, NOTHING, np.int32)
        self._cluster = np.full(count, NOTHING, np.int32)
        self._kept_row = np.full(count, NOTHING, np.int64)
        self._similarity = np.full(count, np.nan, np.float32)
        self.labels = np.full(count, NOTHING, np.int32)  # clusters in the plan's clustering
        self._images: dict[int, tuple[str, str]] = {}  # file, and key or number, of images of evaluation sets

    def limit(self, mask: npt.NDArray[np.bool_]) -> None:
        """Limit later causes to the rows of a mask."""
        self._open &= mask

    def mark(self, at: npt.NDArray[np.int64], stage: str, reason: str) -> npt.NDArray[np.bool_]:
        """Give a cause to those of `at` that have none; return which ones."""
        new = self._open[at]
        self._code[at[new]] = self._causes.setdefault((stage, reason), len(self._causes))
        self._open[at[new]] = False
        return new

    def mark_list(self, item: DropList) -> None:
        table = item.tables(self.rows)
        at = table.column("row").to_numpy() - self.rows.start
        reasons = table.column("reason").combine_chunks().dictionary_encode()
        codes = reasons.indices.to_numpy()
        columns = {"_cluster": "cluster", "_kept_row": "kept_row", "_similarity": "similarity"}
        values = {name: table.column(column).fill_null(NOTHING).to_numpy() for name, column in columns.items()}
        images: list[tuple[str, str]] = []
        if "file" in table.column_names:
            named = (table.column(name).to_pylist() for name in ("file", "key", "number"))
            images = [(file, key or str(number)) for file, key, number in zip(*named, strict=True)]
        else:
            values["_similarity"] = np.where(values["_kept_row"] < 0, np.nan, values["_similarity"])
        for code, reason in enumerate(reasons.dictionary.to_pylist()):
            mine = np.flatnonzero(codes == code)
            mine = mine[self.mark(at[mine], item.kind, f"{item.name}: {reason}")]
            for name, value in values.items():
                getattr(self, name)[at[mine]] = value[mine]
            self._images |= {int(at[row]): images[row] for row in (mine.tolist() if images else ())}

    def belong_to(self, groups: npt.NDArray[np.int32] | None) -> None:
        """Those that weren't compared in a cluster get the plan's."""
        if groups is not None:
            self._cluster = np.where(self._cluster < 0, groups, self._cluster)

    def table(self) -> pa.Table:
        chosen = np.flatnonzero(self._code >= 0)
        codes, kept, similarity = self._code[chosen], self._kept_row[chosen], self._similarity[chosen]
        groups = self._cluster[chosen], self.labels[chosen]
        texts = [pa.array([cause[part] for cause in self._causes], pa.string()) for part in (0, 1)]
        columns = [
            pa.array(self.rows.start + chosen, pa.int64()),
            *(text.take(pa.array(codes)) for text in texts),
            *(pa.array(numbers, pa.int32(), mask=numbers < 0) for numbers in groups),
            pa.array(kept, pa.int64(), mask=kept < 0),
            pa.array(similarity, pa.float32(), mask=np.isnan(similarity)),
        ]
        found = [self._images.get(row, (None, None)) for row in chosen.tolist()] if self._images else []
        columns += (
            [pa.array([each[part] for each in found], pa.string()) for part in (0, 1)]
            if found
            else [pa.nulls(len(chosen), pa.string()) for _ in (0, 1)]
        )
        return pa.table(columns, schema=CAUSE_SCHEMA)


def _all_lists(catalog: Catalog, snapshot: Snapshot) -> list[str]:
    names = DROP_LIST.finished(catalog.folder)
    return [name for name in names if DropList(catalog, name).snapshot.number == snapshot.number]


def lists_of(plan: Plan) -> list[str]:
    """The drop lists that a plan was made without: those of its clustering, then its own."""
    clustering = _clustering(plan)
    return [*(clustering.without if clustering else ()), *plan.config.get("without", ())]


def _users(plan: Plan) -> dict[str, Mapping[str, str]]:
    """Return the artifacts on the way to a plan that were made without drop lists, and their inputs."""
    users = {f"plan {plan.name!r}": plan.inputs}
    if clustering := _clustering(plan):
        users[f"clustering {clustering.name!r}"] = clustering.inputs
    return users


def _clustering(plan: Plan) -> Clustering | None:
    if plan.clustering is None:
        return None
    folder = plan.catalog.clusters_folder(plan.clustering)
    return Clustering.open(plan.catalog, plan.clustering, f"plan {plan.name!r} was made from it: restore {folder}")


def _why_no_group(plan: Plan) -> tuple[str, str]:
    """Return stage and reason if no drop list says why a row belongs to no group."""
    clustering = _clustering(plan)
    if plan.config.get("shares"):
        return "plan", "its group has no share in the mixture" + (
            f", or plan {of} never draws it" if (of := plan.config.get("of")) else ""
        )
    if plan.config.get("of"):
        return "plan", f"plan {plan.config['of']} never draws it"
    if clustering is None:
        return "plan", "not in the bundle" if "bundle" in plan.config else "left out when the plan was made"
    return "cluster", f"{clustering.name}: {clustering.why_none}"


# --- the file ------------------------------------------------------------------------------------------------------------


def write_excluded(
    catalog: Catalog,
    path: Path,
    plan: Plan | None = None,
    *,
    epochs: int | None = None,
    overwrite: bool = False,
    context: Context | None = None,
) -> dict[tuple[str, str], int]:
    """Write every sample that will never be drawn, in catalog order (EXCLUDED_SCHEMA).

    Args:
        catalog: of the samples.
        path: .parquet file (or without suffix), or .csv file, whose text no spreadsheet runs as a formula.
        plan: which plan; None for what any plan leaves out that is made without all finished drop lists of the newest snapshot.
        epochs: list what epochs 0 … `epochs` − 1 of the plan do not hold; None for what no epoch ever holds.
        overwrite: whether an existing file may be replaced.
        context: runs the tasks and shows progress.

    Returns:
        How many samples there are by (stage, reason).

    Raises:
        UserError: the file can't be written there, or has another suffix; a drop list or the clustering of the plan is gone.
    """
    context = context or Context()
    if epochs is not None and (plan is None or not 1 <= epochs <= MAX_EPOCH):
        raise UserError(f"`epochs` {epochs}: must lie between 1 and {MAX_EPOCH:,}, and needs a PLAN")
    suffix = path.suffix.lower()
    if suffix not in {"", ".csv", ".parquet"}:
        raise UserError(f"`output` {path}: {suffix} is no format of this list: give .csv or .parquet")
    csv = suffix == ".csv"
    is_ours = is_text(_CSV_HEAD) if csv else is_table(EXCLUDED_SCHEMA)
    with writing_output(path, catalog, overwrite=overwrite, is_ours=is_ours) as temporary:
        return _write(temporary, catalog, Causes(catalog, plan, epochs), plan, csv, context)


def _write(
    path: Path, catalog: Catalog, causes: Causes, plan: Plan | None, csv: bool, context: Context
) -> dict[tuple[str, str], int]:
    words = Words(plan, None if plan is None else _clustering(plan))
    counts: Counter[tuple[str, str]] = Counter()
    with scratch_beside(path) as folder:
        kept = _KeptKeys(catalog, causes.snapshot, folder)
        for part in context.progress(kept.parts, "never drawn", len(kept.parts)):
            table = causes.of(part.span)
            for row in table.group_by(["stage", "reason"]).aggregate([([], "count_all")]).to_pylist():
                counts[row["stage"], row["reason"]] += row["count_all"]
            kept.note(part, table)
            if plan is not None:
                plan.release_pages()
        kept.look_up(context)
        open_table = pa_csv.CSVWriter if csv else partial(pq.ParquetWriter, compression="zstd")
        with open_table(path, EXCLUDED_SCHEMA) as writer:
            for part in context.progress(kept.parts, "writing", len(kept.parts)):
                named = kept.named(part)
                for start in range(0, len(named), ROW_GROUP_ROWS):
                    table = words.explained(named.slice(start, ROW_GROUP_ROWS)).select(EXCLUDED_SCHEMA.names)
                    table = table.cast(EXCLUDED_SCHEMA)
                    writer.write_table(for_spreadsheets(table) if csv else table, ROW_GROUP_ROWS)
    return dict(sorted(counts.items()))


class _KeptKeys:
    """Names never drawn rows, and those that they duplicate, wherever these lie: by way of one file a part, on disk."""

    def __init__(self, catalog: Catalog, snapshot: Snapshot, folder: Path) -> None:
        self.parts = catalog.parts(snapshot)
        self._catalog, self._folder = catalog, folder
        shards = catalog.shards(snapshot)
        self._paths = shards.column("path").combine_chunks()
        self._shard_ends = np.cumsum(shards.column("rows").to_numpy())
        self._part_of = RowsByPart(self.parts).numbers_of
        self._asked = Shuffle(folder / "asked", _PAIR, len(self.parts))

    def note(self, part: Part, table: pa.Table) -> None:
        """Keeps the causes of a part, and notes whose keys they ask for, by the part of these."""
        write_table(self._folder / f"{part.name}.parquet", table)
        asked = table.filter(table.column("kept_row").is_valid())
        pairs = np.empty(asked.num_rows, _PAIR)
        for name in ("kept_row", "row"):
            pairs[name] = asked.column(name).to_numpy()
        self._asked.write(part.name, [(self._part_of(pairs["kept_row"]), pairs)])

    def look_up(self, context: Context) -> None:
        """Hands the keys that are asked for to the parts that ask."""
        names = [part.name for part in self.parts]
        for part in context.progress(self.parts, "kept samples", len(self.parts)):
            if not self._asked.rows(names, part.number):
                continue
            keys = self._catalog.samples(part, ["key"]).column("key").combine_chunks()
            for pairs in self._asked.chunks(names, part.number, CHUNK_ROWS):
                batch = pa.record_batch(
                    {"row": pairs["row"], "key": keys.take(pa.array(pairs["kept_row"] - part.first_row))}
                )
                asking = self._part_of(pairs["row"])
                for number in np.unique(asking).tolist():
                    with (
                        (self._folder / f"answers-{number}").open("ab") as stream,
                        pa.ipc.new_stream(stream, batch.schema) as out,
                    ):
                        out.write_batch(batch.filter(pa.array(asking == number)))

    def named(self, part: Part) -> pa.Table:
        """The causes of a part with names in place of rows: columns of EXCLUDED_SCHEMA, and "label"."""
        table = read_table(self._folder / f"{part.name}.parquet")
        rows = table.column("row").to_numpy()
        samples = self._catalog.samples(part, ["shard", "key", "caption"]).take(pa.array(rows - part.first_row))
        kept = table.column("kept_row").fill_null(0).to_numpy()
        null = table.column("kept_row").is_null().to_numpy()
        kept_shards = np.searchsorted(self._shard_ends, kept, side="right")
        columns = {name: table.column(name) for name in ("stage", "reason", "cluster", "label", "similarity")} | {
            "shard": self._paths.take(samples.column("shard").combine_chunks()),
            **{name: samples.column(name) for name in ("key", "caption")},
            "kept_shard": self._paths.take(pa.array(kept_shards, pa.int64(), mask=null)),
            "kept_key": self._answers(part, rows[~null], null),
        }
        images = {name: table.column(name).combine_chunks() for name in ("kept_shard", "kept_key")}
        columns |= {name: pc.coalesce(columns[name], image) for name, image in images.items()}
        return pa.table(columns)

    def _answers(self, part: Part, asking: npt.NDArray[np.int64], null: npt.NDArray[np.bool_]) -> pa.Array:
        """Return the keys that a part asked for, null where it asked for none."""
        answers = pa.concat_tables([pa.table({"row": pa.array([], pa.int64()), "key": pa.array([], pa.string())}),
                                    *_streams(self._folder / f"answers-{part.number}")])  # fmt: skip
        order = np.argsort(answers.column("row").to_numpy())
        at = np.zeros(len(null), np.int64)
        at[~null] = order[np.searchsorted(answers.column("row").to_numpy()[order], asking)]
        return answers.column("key").combine_chunks().take(pa.array(at, mask=null))


def _streams(path: Path) -> Iterator[pa.Table]:
    """The tables of streams that were written one behind the other."""
    if not path.exists():
        return
    with path.open("rb") as stream:
        while stream.peek(1):
            yield pa.ipc.open_stream(stream).read_all()
