"""Costs of the plan of each row by step, and the models and files from elsewhere that it uses, read from the catalog's records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tailwise.catalog import Catalog, layout
from tailwise.catalog.artifacts import find_manifest
from tailwise.catalog.embeddings import ENCODER, JOINT, column_record
from tailwise.catalog.kinds import CLUSTERING, CONCEPTS, DROP_LIST, NAMED_SCORE
from tailwise.steps.upkeep.delete import dependencies

EMBEDDING, SCORING, GROUPING, SELECTION, TRAINING = PHASES = (
    "embedding",
    "scoring",
    "clustering",
    "lists and plan",
    "training",
)
_PHASE_OF = {layout.EMBEDDINGS: EMBEDDING, NAMED_SCORE.folder: SCORING}
_PHASE_OF |= {CLUSTERING.folder: GROUPING, CONCEPTS.folder: GROUPING}
_ELSEWHERE = {  # inputs of artifacts that no command of tailwise made; those of scores begin with "score's "
    "file": "a table",
    "column": "a column of the samples",
    "head": "weights of a head",
    "target": "a file of target embeddings",
    "rates": "a file of rates",
    "list": "a list of samples",
    "cluster ids": "imported cluster ids",
    "tables": "a table of captions or concepts",
    "bundle": "a plan bundle",
}


class Ledger:
    """Costs and models of the plans of a catalog."""

    def __init__(self, catalog: Catalog, seconds: Mapping[str, float]) -> None:
        """Read which artifacts were made from which. `seconds` are those of the steps that the comparison ran, by artifact or column."""
        self._catalog, self._seconds, self._uses = catalog, seconds, dependencies(catalog)

    def of(self, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """Return the ledger of a row, from the results of its runs; None without runs or if a plan was deleted since.

        "seconds" of each phase are those of one run: means over the runs, each with the whole cost of its steps; "unknown" lists the
        phases with steps of unknown cost.
        """
        plans = [f"{layout.PLANS}/{run['plan']['name']}" for run in runs]
        if not plans or not self._uses.keys() >= {*plans}:
            return None
        steps = {name: self._seconds.get(name) for plan in plans for name in self._steps(plan)}
        seconds, unknown = dict.fromkeys(PHASES, 0.0), set()
        for plan, run in zip(plans, runs, strict=True):
            seconds[TRAINING] += run["trained"]["seconds"] / len(plans)
            for name in self._steps(plan):
                seconds[self._phase(name)] += (steps[name] or 0) / len(plans)
                if steps[name] is None:
                    unknown.add(self._phase(name))
        models = sorted({model for name in steps for model in self._models(name)})
        return {"seconds": seconds, "unknown": sorted(unknown), "steps": steps, "models": models}

    def _steps(self, name: str, found: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Return an artifact or a column, and all that it was made from, behind those that were `found` before."""
        if name in found or name not in self._uses:
            return found
        found = (*found, name)
        for used in sorted(self._uses[name]):
            found = self._steps(used, found)
        return found

    def _manifest(self, name: str) -> Mapping[str, Any]:
        return find_manifest(self._catalog.folder / name) or {"identity": {"config": {}, "inputs": {}}, "summary": {}}

    def _phase(self, name: str) -> str:
        folder = name.partition("/")[0]
        if folder != DROP_LIST.folder:
            return _PHASE_OF.get(folder, SELECTION)
        score = self._manifest(name)["identity"]["config"].get("score")
        return SCORING if isinstance(score, Mapping) else SELECTION  # of dedup, it is a name or None

    def _models(self, name: str) -> Iterator[str]:
        """Yield the models behind an artifact or a column itself, and what was made elsewhere by a model that is not noted."""
        folder, _, own = name.partition("/")
        if folder != layout.EMBEDDINGS:
            manifest = self._manifest(name)
            labels = {label.removeprefix("score's ").partition(" of ")[0] for label in manifest["identity"]["inputs"]}
            yield from (f"not noted ({_ELSEWHERE[label]}: {own})" for label in labels & _ELSEWHERE.keys())
            yield from manifest["summary"].get("encoders", ())
            return
        record = column_record(self._catalog, own)
        if record["encoder"] == ENCODER:
            yield f"not noted (imported embeddings: {own})"
        elif record["modality"] != JOINT and record["encoder"] != "pixels":
            yield record["encoder"]


def hours(ledger: Mapping[str, Any], phase: str) -> str:
    """Return the hours of a phase as text: ≥ where some steps are of unknown cost, ? where all are."""
    spent, least = ledger["seconds"][phase] / 3600, "≥ " if phase in ledger["unknown"] else ""
    if spent < 0.001:
        return "?" if least else "< 0.001" if spent else "0"
    return f"{least}{spent:,.3f}"


def ledger_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return columns, cells and notes, as text, of a table of the ledgers of summary rows."""
    known = [(row["row"], row["ledger"]) for row in rows if row["ledger"]]
    cells = [
        [row, *(hours(ledger, phase) for phase in PHASES), ", ".join(ledger["models"]) or "none"]
        for row, ledger in known
    ]
    users: dict[str, list[str]] = {}
    for row, ledger in known:
        for step in ledger["steps"]:
            users.setdefault(step, []).append(row)
    shared = [f"{step} ({len(names)} rows)" for step, names in users.items() if len(names) > 1]
    missing = [step for step in users if any(ledger["steps"].get(step, 0) is None for _, ledger in known)]
    notes = [f"Shared steps count in full for each of their rows: {', '.join(shared)}."] if shared else []
    if missing:
        notes.append(f"No time is known of: {', '.join(missing)}. Only steps that this comparison ran are timed.")
    return {"columns": ["row", *PHASES, "outside models"], "cells": cells, "notes": notes}
