"""Why a sample is not drawn, in words for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from tailwise.catalog.clusterings import Clustering
from tailwise.plan.plan import Plan


class Words:
    """Words for the causes of samples that are never drawn: by a plan, or by any plan."""

    def __init__(self, plan: Plan | None, clustering: Clustering | None) -> None:
        self._plan, self._clustering = plan, clustering
        self._values = clustering.values if clustering else None
        self._rates = plan.cluster_rates() if plan and not plan.by_rate else None

    def explained(self, table: pa.Table) -> pa.Table:
        """Return a table of causes with two more columns: "group", from "label", and "explanation"."""
        rows = table.drop_columns(["shard", "key", "caption"]).to_pylist()
        grouped = [None if row["label"] is None or not self._clustering else self._group(row["label"]) for row in rows]
        for name, texts in {"group": grouped, "explanation": [self._sentence(row) for row in rows]}.items():
            table = table.append_column(name, pa.array(texts, pa.string()))
        return table

    def _group(self, label: int) -> str:
        return f"cluster {label}" if self._values is None else str(self._values[label])

    def _sentence(self, row: Mapping[str, Any]) -> str:
        stage, reason, group = row["stage"], row["reason"], row["cluster"]
        name, _, said = reason.partition(": ")  # of a drop list or clustering
        if stage == "remove":
            return f"removed: {reason}"
        if stage == "cluster":
            return f"{said}, so it is in no group of clustering {name}"
        if stage != "plan":
            place = f" of {row['kept_shard']}" if " in " in said else ""  # of an image of an evaluation set
            near = "" if row["similarity"] is None else f", similarity {row['similarity']:.3f}"
            like = "" if row["kept_key"] is None else f": like {row['kept_key']}{place}{near}"
            return f"{said}{like} (drop list {name})"
        if self._plan is None or self._rates is None or group is None:
            return "its rate is 0" if reason == "rate 0" else f"{reason}"
        subject = "the pool" if not self._clustering else self._group(group)
        subject = subject if self._values is None else f"group {subject!r}"
        share, verb = 100 * self._rates[group], "are drawn in an epoch" if self._plan.dynamic else "are kept"
        return f"{subject} has {self._plan.sizes[group]:,} samples, {share:.3g} % {verb}: {reason}"
