"""Neighbours: the most similar earlier member of each sample's cluster, from which every ε of dedup is read."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.comparisons import Neighbours, comparison_artifact
from tailwise.catalog.layout import WORK
from tailwise.execution.base import Worker
from tailwise.kernels.similarity import NOTHING_EARLIER, most_similar_earlier
from tailwise.steps.dedup.comparison import Comparison
from tailwise.steps.dedup.members import RESULT, Judge, Members, regroup


def make_neighbours(comparison: Comparison, *, max_memory_bytes: int, device: str = "auto") -> Neighbours:
    """Find the neighbours of all samples, or open them if they exist.

    Args:
        comparison: what is compared.
        max_memory_bytes: refuse what needs more.
        device: of the matrix products; the result doesn't depend on it.

    Raises:
        UserError: the largest cluster needs more memory.
    """
    with comparison_artifact(comparison.catalog, comparison.config, comparison.inputs) as artifact:
        if not artifact.done:
            _compare(comparison, artifact, max_memory_bytes, device)
            shutil.rmtree(artifact.path(WORK), ignore_errors=True)
            artifact.finish({"samples": comparison.new})
        return Neighbours(artifact.folder)


@dataclass(frozen=True, eq=False)
class _Nearest(Judge):
    """Find the most similar earlier member of each member.

    Attributes:
        device: runs the matrix products.
    """

    device: str

    def judge(self, members: Members, threads: int, worker: Worker) -> npt.NDArray[Any]:  # noqa: ARG002
        old = len(members.kept_before)
        similarity, earlier = most_similar_earlier(members.x, judged_from=old, device=self.device, threads=threads)
        found = np.flatnonzero(earlier >= 0)
        result = np.empty(len(found), RESULT)
        result["row"], result["other"] = members.rows[found], members.rows[earlier[found]]
        result["similarity"] = similarity[found]
        return result


def _compare(comparison: Comparison, artifact: Artifact, max_memory_bytes: int, device: str) -> None:
    if Neighbours.are_written(artifact.folder):  # an interruption came after that
        return
    new, old = comparison.sizes.T
    wanted = (new > 0) & (new + old > 1)
    with Neighbours.writing(artifact.folder, comparison.snapshot.rows) as (similarity, other):
        for part in comparison.parts:
            similarity[part.span], other[part.span] = NOTHING_EARLIER, -1
        results = regroup(
            comparison,
            artifact.path(WORK),
            wanted,
            lambda members: _Nearest(members, device),
            max_memory_bytes,
            "comparing inside clusters",
        )
        for result in results:
            similarity[result["row"]], other[result["row"]] = result["similarity"], result["other"]
        del similarity, other
