"""Contents of a catalog, and unfinished work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tailwise.catalog import layout
from tailwise.catalog.artifacts import find_manifest
from tailwise.catalog.catalog import Catalog
from tailwise.catalog.embeddings import column_records, part_markers
from tailwise.catalog.files import read_record
from tailwise.catalog.kinds import KINDS
from tailwise.catalog.rejections import Rejections
from tailwise.catalog.removals import Removals

Section = list[dict[str, Any]]


def status(catalog: Catalog) -> dict[str, Section]:
    """Return the catalog's content by section: snapshots, embeddings, each kind of artifact, removed, left out."""
    rejections = Rejections()
    for path in catalog.rejected_logs():
        rejections.count(path)
    reasons = [
        {"stage": stage, "reason": reason, "rows": rows} for (stage, reason), rows in sorted(rejections.counts.items())
    ]
    return {
        "snapshots": _snapshots(catalog),
        "embeddings": [_column(catalog, path) for path in column_records(catalog)],
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
    parts: list[Section] = []
    while (marker := layout.marker(catalog.samples_path(done + len(parts)))).exists():
        parts.append(read_record(marker)["shards"])
    if parts:
        shards = [shard for part in parts for shard in part]
        rows = sum(shard["rows"] for shard in shards)
        figures = {"shards": len(shards), "parts": len(parts), "samples": rows, "state": "unfinished import: repeat it"}
        items.append({"snapshot": len(snapshots) + 1, **figures})
    return items


def _column(catalog: Catalog, path: Path) -> dict[str, Any]:
    column = read_record(path)
    markers = [read_record(marker) for marker in part_markers(path.parent)]
    parts = len(catalog.parts()) if catalog.snapshots() else 0
    return {
        "column": path.parent.name,
        "of": column["modality"],
        "encoder": column["encoder"],
        "dimension": column["dimension"],
        "embedded": sum(marker["embedded"] for marker in markers),
        "state": "complete" if len(markers) == parts else f"{len(markers)} of {parts} parts",
    }


def _artifacts(folder: Path, shown: tuple[str, ...]) -> Section:
    items = []
    for path in sorted(path for path in folder.glob("*") if path.is_dir()):
        manifest, pending = find_manifest(path), path / layout.PENDING
        if manifest is None and not pending.exists():
            continue
        identity = read_record(pending) if manifest is None else manifest["identity"]
        config = {**identity["config"], **identity.get("derived", {})}
        state = "unfinished" if manifest is None else "complete"
        columns = {key: _shown(config.get(key)) for key in shown}
        items.append({"name": path.name, **columns, "snapshot": config["snapshot"], "state": state})
    return items


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
