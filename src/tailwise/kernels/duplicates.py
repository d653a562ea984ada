"""Near-duplicates among the members of one cluster, exactly (SemDeDup, arXiv 2303.09540): which stay, which go.

m: members of the cluster, in keep-order; d: dimension.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from tailwise.kernels.assign import NONE
from tailwise.kernels.grid import as_rows
from tailwise.kernels.nearest import decide_greedily
from tailwise.kernels.products import WrongProductError, float32_error, repeat_if_wrong
from tailwise.kernels.screening import full_precision
from tailwise.kernels.similarity import BELOW_ONE, NOTHING_EARLIER, Rows, most_similar_earlier

SCAN_ROWS, SCAN_SCORES = 512, 1 << 21  # at a time, in the greedy rule's second look


def duplicate_threshold(epsilon: float) -> float:
    """Two rows are duplicates if their similarity is above this: above 1 − ε, or 1 (identical)."""
    return min(1.0 - epsilon, BELOW_ONE)


def in_doubt(
    similarity: npt.NDArray[np.float64],
    threshold: float,
    judged: npt.NDArray[np.bool_],
    certain: npt.NDArray[np.bool_],
) -> npt.NDArray[np.bool_]:
    """Rows that the most similar earlier row alone doesn't decide under the greedy rule: bool [n].

    A row goes if its most similar earlier row is kept, stays if that is no duplicate, and shares its fate if they are identical.

    Args:
        similarity: [n], to the most similar earlier row.
        threshold: of duplicates.
        judged: [n], whether that earlier row is itself judged (rather than decided before).
        certain: [n], whether that earlier row is certainly kept.
    """
    doubtful: npt.NDArray[np.bool_] = (similarity > threshold) & ~certain & ~((similarity == 1.0) & judged)
    return doubtful


@repeat_if_wrong
def greedy(
    x: npt.NDArray[np.float16],
    similarity: npt.NDArray[np.float64],
    earlier: npt.NDArray[np.int64],
    threshold: float,
    *,
    kept_before: npt.NDArray[np.bool_] | None = None,
    device: str = "auto",
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Drops each row that is a duplicate of an earlier row that is kept.

    Only rows that `similarity` and `earlier` leave in doubt are compared again.

    Args:
        x: [m, d], in keep-order.
        similarity: float64 [m], from most_similar_earlier with judged_from = len(kept_before).
        earlier: int64 [m], from there too.
        threshold: rows of a similarity above it are duplicates.
        kept_before: of the rows that are decided already, which come first, kept ones before dropped ones: whether they are kept.
        device: of the matrix products; the result doesn't depend on it.

    Returns:
        kept_row: int64 [m], the most similar kept earlier row of each row that is dropped now, else −1. A row that is identical to
            a dropped one has that one's.
        similarity: float64 [m], to it; NOTHING_EARLIER where there is none.
    """
    count, judged_from = len(x), 0 if kept_before is None else len(kept_before)
    similarity = np.maximum(similarity, NONE)  # compiled loops that may reorder must not meet infinities
    kept = np.zeros(count, np.bool_)
    if kept_before is not None:
        kept[:judged_from] = kept_before
    certain = np.where(np.arange(count) < judged_from, kept, similarity <= threshold)
    doubtful = np.flatnonzero(in_doubt(similarity, threshold, earlier >= judged_from, certain[earlier]))
    doubtful = doubtful[doubtful >= judged_from]
    # Of those identical to one dropped before, the first decides for all.
    same = np.flatnonzero(similarity[doubtful] == 1.0)
    firsts = np.unique(earlier[doubtful[same]], return_index=True)[1]
    doubtful = np.delete(doubtful, np.setdiff1d(same, same[firsts]))

    rows = Rows(x, device) if len(doubtful) else None
    step = max(1, min(SCAN_SCORES // max(count, 1), SCAN_ROWS))
    kept_row, found = np.full(count, -1, np.int64), np.full(count, NOTHING_EARLIER)
    place, first_identical = np.zeros(count, np.int64), np.full(count, -1, np.int64)
    start = judged_from
    for at in range(0, max(len(doubtful), 1), step):
        asked = doubtful[at : at + step]
        stop = count if at + step >= len(doubtful) else int(doubtful[at + step])
        place[asked] = np.arange(len(asked))
        offsets, others, scores = _candidates(rows, asked, threshold)
        grid = np.empty((0, 0), np.float32) if rows is None else rows.x
        norms = np.empty(0) if rows is None else rows.norms
        fine = decide_greedily(
            *(start, stop, threshold, judged_from, similarity, earlier, grid, norms, place, offsets, others, scores),
            *(float32_error(x.shape[1] + 2), BELOW_ONE, first_identical, kept, kept_row, found),
        )
        if not fine:
            raise WrongProductError
        start = stop
    return kept_row, found


def _candidates(
    rows: Rows | None, asked: npt.NDArray[np.int64], threshold: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Rows that may be duplicates of those asked for, and a few others: offsets [n + 1], indices and scores."""
    if rows is None:
        return np.zeros(1, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
    last = int(asked[-1])
    scratch = torch.empty(len(asked) * last, device=rows.device)
    with full_precision():
        scores = rows.scores(torch.from_numpy(asked).to(rows.device), slice(0, last), scratch)
    pairs = (scores >= threshold - rows.error).nonzero(as_tuple=True)
    row, column = (index.cpu().numpy() for index in pairs)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(asked)))])
    return offsets, column, scores[pairs].cpu().numpy()


def duplicate_pairs(
    x: npt.NDArray[Any] | torch.Tensor,
    epsilon: float,
    *,
    rule: Literal["greedy", "any-earlier"] = "greedy",
    device: str = "auto",
    threads: int | None = None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Which rows are duplicates of earlier ones.

    Args:
        x: [m, d], unit norm, in keep-order: an earlier row is kept rather than a later one. float32 is rounded to float16.
        epsilon: two rows are duplicates if their cosine is above 1 − ε.
        rule: "greedy": a row goes if it is a duplicate of one that stays; "any-earlier" (SemDeDup's): of any earlier one.
        device: of the matrix products; the result doesn't depend on it.
        threads: on the CPU; None for torch's number; the result doesn't depend on it.

    Returns:
        Rows that go, int64 [p] ascending; the most similar earlier row of each (under "greedy" that stays); their cosine, float64, 1 if
        they are identical.

    Raises:
        ValueError: ε isn't in [0, 2], or a row isn't of unit norm.
    """
    if not 0 <= epsilon <= 2:
        raise ValueError(f"epsilon {epsilon}: must be in [0, 2]")
    rows = as_rows(x).astype(np.float16, copy=False)
    threshold = duplicate_threshold(epsilon)
    similarity, earlier = most_similar_earlier(rows, device=device, threads=threads)
    other = np.where(similarity > threshold, earlier, -1)
    if rule == "greedy":
        other, similarity = greedy(rows, similarity, earlier, threshold, device=device)
    gone = np.flatnonzero(other >= 0)
    return gone, other[gone], similarity[gone]
