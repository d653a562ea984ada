"""What a catalog holds, and what is unfinished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tailwise.catalog.artifacts import PENDING
from tailwise.catalog.catalog import Catalog
from tailwise.catalog.files import MANIFEST, read_record
from tailwise.catalog.kinds import KINDS
from tailwise.catalog.removals import Removals
from tailwise.stages.report import Rejections

Section = list[dict[str, Any]]


def status(catalog: Catalog) -> dict[str, Section]:
    """Return the catalog's content by section: snapshots, embeddings, each kind of artifact, removed, left out."""
    rejections = Rejections()
    for path in sorted((catalog.folder / "rejected").glob("*.parquet")):
        rejections.count(path)
    reasons = [
        {"stage": stage, "reason": reason, "rows": rows} for (stage, reason), rows in sorted(rejections.counts.items())
    ]
    return {
        "snapshots": _snapshots(catalog),
        "embeddings": [
            _column(catalog, path) for path in sorted((catalog.folder / "embeddings").glob("*/column.json"))
        ],
        **{kind.section: _artifacts(catalog.folder / kind.folder, kind.columns) for kind in KINDS},
        "removed": _removed(Removals.of(catalog)),
        "left out": reasons,
    }


def _removed(removals: Removals) -> Section:
    samples = np.bincount(removals.numbers, minlength=len(removals.removals) + 1).tolist()
    return [
        {
            "removal": item.number,
            "date": item.date,
            "reason": item.reason,
            "names": item.names,
            "samples": samples[item.number],
        }
        for item in removals.removals
    ]


def _snapshots(catalog: Catalog) -> Section:
    snapshots = catalog.snapshots()
    items: Section = [
        {"snapshot": item.number, "shards": item.shards, "parts": item.parts, "samples": item.rows, "state": "complete"}
        for item in snapshots
    ]
    done = snapshots[-1].parts if snapshots else 0
    begun: list[Section] = []
    while (marker := catalog.samples_path(done + len(begun)).with_suffix(".json")).exists():
        begun.append(read_record(marker)["shards"])
    if begun:
        shards = [shard for part in begun for shard in part]
        rows = sum(shard["rows"] for shard in shards)
        figures = {"shards": len(shards), "parts": len(begun), "samples": rows, "state": "unfinished import: repeat it"}
        items.append({"snapshot": len(snapshots) + 1, **figures})
    return items


def _column(catalog: Catalog, path: Path) -> dict[str, Any]:
    column = read_record(path)
    markers = [read_record(marker) for marker in sorted(path.parent.glob("part-*.json"))]
    parts = len(catalog.parts()) if catalog.snapshots() else 0
    return {
        "column": path.parent.name,
        "encoder": column["encoder"],
        "dimension": column["dimension"],
        "embedded": sum(marker["embedded"] for marker in markers),
        "state": "complete" if len(markers) == parts else f"{len(markers)} of {parts} parts",
    }


def _artifacts(folder: Path, shown: tuple[str, ...]) -> Section:
    items = []
    for path in sorted(path for path in folder.glob("*") if path.is_dir()):
        done = (path / MANIFEST).exists()
        if not done and not (path / PENDING).exists():
            continue
        identity = read_record(path / MANIFEST)["identity"] if done else read_record(path / PENDING)
        config = {**identity["config"], **identity.get("derived", {})}
        state = "complete" if done else "unfinished"
        columns = {key: _shown(config.get(key)) for key in shown}
        items.append({"name": path.name, **columns, "snapshot": config["snapshot"], "state": state})
    return items


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
