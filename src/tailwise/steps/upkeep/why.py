"""Why: the whole story of one sample, from import to the epochs that hold it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tailwise.catalog.captions import Captions
from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.drops import DropList
from tailwise.catalog.embeddings import MODALITIES, column_names
from tailwise.catalog.files import check_file
from tailwise.catalog.kinds import CAPTIONS, CLUSTERING, DROP_LIST, PLAN
from tailwise.catalog.noted import HASH_COLUMNS
from tailwise.catalog.removals import Removals
from tailwise.catalog.schema import SAMPLE_SCHEMA
from tailwise.errors import UserError
from tailwise.plan.plan import Plan
from tailwise.plan.quotas import UNITS
from tailwise.steps.upkeep.excluded import Causes, lists_of
from tailwise.steps.upkeep.remove import UID

TOLD_EPOCHS = 10
SEARCHED_EPOCHS = 100  # for the first one; stream draws hold 16 bytes a cluster and epoch
HINTS = 3
NEAR_KEYS = 2_000

Story = dict[str, Any]


def why(catalog: Catalog, name: str, plans: Sequence[str] | None = None) -> Story:
    """Return all that the catalog knows of the samples with a key or uid.

    `name`: a key, or a uid of 32 hexadecimal digits. `plans`: names of the plans to report; None for all finished ones.

    Returns:
        "name" as given; "samples", one entry for each sample of the newest snapshot; "rejected", what steps noted of the key.

    Raises:
        UserError: nothing has this key or uid, or there is no such plan.
    """
    history = _SampleHistory(catalog, PLAN.finished(catalog.folder) if plans is None else plans)
    samples = [history.story(part, row) for part, row in _find(catalog, name)]
    listed = catalog.rejected(["stage", "reason", "file", "detail"], pc.field("key") == name)
    rejected: list[Story] = [] if listed is None else listed.to_pylist()
    if not samples and not rejected:
        near = _near(catalog, name)
        hint = f"did you mean {' or '.join(near)}?" if near else "give it as it stands in the shard, without extension"
        raise UserError(f"no sample of {catalog.folder} has the key or uid {name!r}: {hint}")
    return {"name": name, "samples": samples, "rejected": rejected}


def _find(catalog: Catalog, name: str) -> Iterator[tuple[Part, int]]:
    """Part and row in the catalog of every sample with this key or uid."""
    uid = bytes.fromhex(name) if UID.fullmatch(name) else None
    columns = ["key"] if uid is None else ["key", "uid"]
    for part in catalog.parts():
        first = part.first_row
        with pq.ParquetFile(check_file(catalog.samples_path(part.number))) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=columns)
                hit = pc.equal(table.column("key"), name)
                if uid is not None:
                    hit = pc.or_(hit, pc.equal(table.column("uid"), pa.scalar(uid, pa.binary(16))))
                for at in np.flatnonzero(hit.to_numpy()).tolist():
                    yield part, first + at
                first += table.num_rows


def _near(catalog: Catalog, name: str) -> list[str]:
    """Keys that resemble a text: with its beginning or its end, folders, extension and leading zeros aside."""
    core = name.rsplit("/", 1)[-1].split(".", maxsplit=1)[0]
    stem, tail = core[: max(1, len(core) - 2)], core.lstrip("0")
    near: list[str] = []
    for part in catalog.parts():
        keys = catalog.samples(part, ["key"]).column("key")
        hit = pc.or_(pc.starts_with(keys, stem), pc.ends_with(keys, tail) if tail else pa.scalar(False))
        near += keys.filter(hit)[: NEAR_KEYS - len(near)].to_pylist()
        if len(near) >= NEAR_KEYS:
            break
    exact = [key for key in near if core and key.rsplit("/", 1)[-1].lstrip("0") == tail]
    return list(dict.fromkeys([*exact, *difflib.get_close_matches(core, near, HINTS)]))[:HINTS]


class _SampleHistory:
    def __init__(self, catalog: Catalog, plans: Sequence[str]) -> None:
        self._catalog = catalog
        self._paths = catalog.shards().column("path")
        self._removals = Removals.of(catalog)
        self._plans = [(plan, Causes(catalog, plan)) for plan in (Plan(catalog, name) for name in plans)]

    def story(self, part: Part, row: int) -> Story:
        catalog, at = self._catalog, row - part.first_row
        removal = self._removals.removal_of(row)
        return {
            "row": row,
            **self._sample(part, at),
            "captions": {
                name: Captions(catalog, name).of(np.array([row]))[0] for name in CAPTIONS.finished(catalog.folder)
            },
            "removed": removal and {"reason": removal.reason, "date": removal.date},
            "embeddings": {
                column: self._embedded(column, part, at)
                for column in dict.fromkeys((*MODALITIES, *column_names(catalog)))
            },
            "clusterings": [self._in_clustering(name, part, at) for name in CLUSTERING.finished(catalog.folder)],
            "drop_lists": [self._in_list(name, row) for name in DROP_LIST.finished(catalog.folder)],
            "plans": [self._in_plan(plan, causes, row) for plan, causes in self._plans],
        }

    def _row(self, part: Part, at: int) -> Story:
        found: Story = self._catalog.samples_at(part.number, np.array([at])).to_pylist()[0]
        return found

    def _sample(self, part: Part, at: int) -> Story:
        found = self._row(part, at)
        found["uid"], found["shard_id"] = found["uid"].hex(), found["shard"]
        found["shard"] = self._paths[found["shard_id"]].as_py()
        names = ("key", "uid", "shard", "shard_id", *SAMPLE_SCHEMA.names[3:])
        scores = {name: value for name, value in found.items() if name not in {*names, *HASH_COLUMNS.values()}}
        return {**{name: found[name] for name in names}, "scores": scores}

    def _name(self, row: int) -> Story:
        """Shard and key of another sample."""
        part = next(part for part in self._catalog.parts() if row < part.span.stop)
        found = self._row(part, row - part.first_row)
        return {"kept_shard": self._paths[found["shard"]].as_py(), "kept_key": found["key"]}

    def _embedded(self, column: str, part: Part, at: int) -> bool:
        there = self._catalog.embedding_path(column, part).exists()
        return there and bool(np.any(self._catalog.embedding(column, part)[at]))

    def _in_clustering(self, name: str, part: Part, at: int) -> Story:
        """Cluster and place in it; all null where it belongs to none."""
        found = Clustering.open(self._catalog, name)
        snapshot = found.snapshot
        story: Story = {"name": name, "snapshot": snapshot.number}
        empty = dict.fromkeys(("cluster", "size", "rank", "similarity"))
        if part.number >= snapshot.parts:
            return {**story, **empty, "why_none": f"it was imported after snapshot {snapshot.number}"}
        cluster = int(found.labels.read(part)[at])
        if cluster < 0:
            return {**story, **empty, "why_none": f"it took no part: {found.why_none}, or dropped before"}
        place: Story = {"cluster": cluster, "size": found.table.column("size")[cluster].as_py()}
        place["rank"] = found.ranks.read(part)[at].item()
        place["similarity"] = found.similarities.read(part)[at].item() if found.has_centroids else None
        return {**story, **place, "why_none": None}

    def _in_list(self, name: str, row: int) -> Story:
        """Return the reason that a drop list gives for the sample."""
        item = DropList(self._catalog, name)
        story: Story = {"name": name, "kind": item.kind, "snapshot": item.snapshot.number}
        if row >= item.snapshot.rows:
            return {**story, "verdict": "not asked", "reason": f"it was imported after snapshot {item.snapshot.number}"}
        for earlier in item.without:
            said = self._in_list(earlier, row)
            if said["verdict"] != "kept":
                return {**story, "verdict": "not asked", "reason": f"{earlier} had dropped it"}
        dropped = item.tables(slice(row, row + 1)).to_pylist()
        if not dropped:
            return {**story, "verdict": "kept"}
        said = {key: value for key, value in dropped[0].items() if key not in {"row", "kept_row"} and value is not None}
        kept = dropped[0]["kept_row"]
        return {**story, "verdict": "dropped", **said, **({} if kept is None else self._name(kept))}

    def _in_plan(self, plan: Plan, causes: Causes, row: int) -> Story:
        """How often a plan draws it, and when; or why never."""
        without = lists_of(plan)
        story: Story = {"name": plan.name, "snapshot": plan.snapshot.number, "method": plan.config["method"]}
        story |= {"draw": plan.draw_name, "dynamic": plan.dynamic, "without": without}
        if row >= plan.snapshot.rows:
            never = {"stage": "import", "reason": f"it was imported after snapshot {plan.snapshot.number}"}
            return {**story, "rate": 0.0, "copies": [0] * TOLD_EPOCHS, "first_epoch": None, "never": never}
        rows = np.array([row])
        story |= {"rate": float(plan.rate(rows)[0]), **_place(plan, row)}
        cause = causes.of(slice(row, row + 1)).to_pylist()
        if cause:
            never = {"stage": cause[0]["stage"], "reason": cause[0]["reason"]}
            return {**story, "copies": [0] * TOLD_EPOCHS, "first_epoch": None, "never": never}
        copies = [int(plan.draw(epoch, rows)[0]) for epoch in range(TOLD_EPOCHS)]
        return {**story, "copies": copies, "first_epoch": _first_epoch(plan, row, copies), "never": None}


def _place(plan: Plan, row: int) -> Story:
    """Where it stands in the plan's own groups."""
    place = slice(row, row + 1)
    if not plan.has_clusters or (group := int(plan.groups[place][0])) < 0:
        return {"cluster": None, "size": None, "quota": None, "rank": None}
    quota = float(plan.quotas[group] / UNITS)
    return {"cluster": group, "size": int(plan.sizes[group]), "quota": quota, "rank": int(plan.ranks[place][0])}


def _first_epoch(plan: Plan, row: int, copies: Sequence[int]) -> int | None:
    """The first epoch that holds it, None if it isn't among the first SEARCHED_EPOCHS."""
    first = next((epoch for epoch, count in enumerate(copies) if count), None)
    if first is not None:
        return first
    later = range(len(copies), SEARCHED_EPOCHS)
    return next((epoch for epoch in later if plan.draw(epoch, np.array([row]))[0]), None)
