"""Contents of a catalog, and unfinished work."""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog
from tailwise.catalog.embeddings import column_records, part_markers
from tailwise.catalog.files import read_record
from tailwise.catalog.kinds import KINDS, Kind
from tailwise.catalog.rejections import Rejections
from tailwise.catalog.removals import Removals

Section = list[dict[str, Any]]


def status(catalog: Catalog) -> dict[str, Section]:
    """Return the catalog's content by section: snapshots, embeddings, each kind of artifact, removed, left out."""
    return {
        "snapshots": _snapshots(catalog),
        "embeddings": [_column(catalog, path) for path in column_records(catalog)],
        **{kind.section: _artifacts(catalog, kind) for kind in KINDS},
        "removed": _removed(Removals.of(catalog)),
        "left out": left_out(catalog),
    }


def left_out(catalog: Catalog) -> Section:
    """Return how many samples each step could not use, by reason: stage, reason and rows."""
    rejections = Rejections()
    for path in catalog.rejected_logs():
        rejections.count(path)
    return [
        {"stage": stage, "reason": reason, "rows": rows} for (stage, reason), rows in sorted(rejections.counts.items())
    ]


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
    captions = column.get("settings", {}).get("captions")
    parts = len(catalog.parts()) if catalog.snapshots() else 0
    return {
        "column": path.parent.name,
        "of": f"{column['modality']} ({captions['name']})" if captions else column["modality"],
        "encoder": column["encoder"],
        "dimension": column["dimension"],
        "embedded": sum(marker["embedded"] for marker in markers),
        "state": "complete" if len(markers) == parts else f"{len(markers)} of {parts} parts",
    }


def _artifacts(catalog: Catalog, kind: Kind) -> Section:
    folder, items = catalog.folder, []
    found = [(path.parent.name, "complete", read_record(path)["identity"]) for path in kind.manifests(folder)]
    found += [(name, "unfinished", read_record(path)) for name, path in kind.unfinished(folder)]
    for name, state, identity in sorted(found, key=itemgetter(0)):
        config = {**identity["config"], **identity.get("derived", {}), **identity.get("files", {})}
        columns = {key: _shown(config.get(key)) for key in kind.columns}
        since = _replaced_since(catalog, config["snapshot"])
        items.append({"name": name, **columns, "snapshot": config["snapshot"], "state": state + since})
    return items


def _replaced_since(catalog: Catalog, number: int) -> str:
    """Return how many samples of a snapshot were replaced after it was made, for people; nothing for none."""
    if not catalog.replaced():
        return ""
    snapshot = catalog.snapshot(number)
    gone = int((catalog.replaced_rows() < snapshot.rows).sum()) - len(catalog.replaced_rows(snapshot))
    return f"; {gone:,} samples were replaced since" if gone else ""


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
