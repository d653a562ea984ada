"""Neighbours: the most similar earlier sample in the clusters that each sample takes part in, from which every ε of dedup is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Part
from tailwise.catalog.columns import PlainColumn
from tailwise.catalog.comparisons import Neighbours, comparison_artifact
from tailwise.execution.base import KERNEL, Task, Worker
from tailwise.kernels.similarity import NOTHING_EARLIER, most_similar_earlier
from tailwise.steps.dedup.comparison import Comparison
from tailwise.steps.dedup.members import RESULT, Buckets, Judge, Members, most_similar, regroup
from tailwise.storage.local import remove_folder


def make_neighbours(comparison: Comparison, *, max_memory_bytes: int, device: str = "auto") -> Neighbours:
    """Find the neighbours of all samples, or open them if they exist.

    `device`: of the matrix products; the result doesn't depend on it.

    Raises:
        UserError: the largest cluster needs more memory.
    """
    with comparison_artifact(comparison.catalog, comparison.config, comparison.inputs) as artifact:
        if not artifact.done:
            _compare(comparison, artifact, max_memory_bytes, device)
            remove_folder(artifact.path(layout.WORK))
            artifact.finish({"samples": comparison.new})
        return Neighbours(comparison.catalog, artifact.folder)


@dataclass(frozen=True, eq=False)
class _Nearest(Judge):
    """Find the most similar earlier member of each member."""

    device: str  # runs the matrix products

    def judge(self, members: Members, threads: int, worker: Worker) -> npt.NDArray[Any]:  # noqa: ARG002
        old = len(members.kept_before)
        similarity, earlier = most_similar_earlier(members.x, judged_from=old, device=self.device, threads=threads)
        found = np.flatnonzero(earlier >= 0)
        result = np.zeros(len(found), RESULT)
        result["row"], result["other"] = members.rows[found], members.rows[earlier[found]]
        result["similarity"] = similarity[found]
        return result


@dataclass(frozen=True, eq=False)
class _Collect(Task[Part, None]):
    of: Buckets  # buckets of the judged clusters
    similarities: PlainColumn  # float64, to write
    rows: PlainColumn  # int64, to write

    def files(self, item: Part) -> Sequence[Path]:
        return self.similarities.path(item), self.rows.path(item)

    def run(self, item: Part, worker: Worker) -> None:  # noqa: ARG002
        similarity, row = np.full(item.rows, NOTHING_EARLIER), np.full(item.rows, -1, np.int64)
        results = most_similar(self.of.results_of(item))
        at = results["row"] - item.first_row
        similarity[at], row[at] = results["similarity"], results["other"]
        self.similarities.write(item, similarity)
        self.rows.write(item, row)


def _compare(comparison: Comparison, artifact: Artifact, max_memory_bytes: int, device: str) -> None:
    columns = [PlainColumn(artifact.folder, name) for name in (layout.SIMILARITY, layout.NEAREST_ROW)]
    if all(column.path(part).exists() for column in columns for part in comparison.parts):
        return  # an interruption came after that
    comparison.find_places()
    new, old = comparison.compared_sizes.T
    buckets = regroup(
        comparison,
        artifact.path(layout.WORK),
        (new > 0) & (new + old > 1),
        lambda members: _Nearest(members, device),
        max_memory_bytes,
        "comparing inside clusters",
    )
    comparison.context.run(_Collect(buckets, *columns), comparison.parts, "writing neighbours", KERNEL)
