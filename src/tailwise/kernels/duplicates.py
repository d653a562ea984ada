"""Near-duplicates among the samples that are compared in one cluster, exactly (SemDeDup, arXiv 2303.09540): which stay, which go.

m: members of the cluster, in keep-order; d: dimension.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from tailwise.kernels.grid import as_rows
from tailwise.kernels.nearest import DROPPED, KEPT, OPEN, decide_back
from tailwise.kernels.products import WrongProductError, float32_error, repeat_if_wrong
from tailwise.kernels.screening import full_precision
from tailwise.kernels.similarity import BELOW_ONE, NOTHING_EARLIER, Rows, most_similar_earlier

SCAN_ROWS, SCAN_SCORES = 512, 1 << 21  # at a time, in the greedy rule's second look


def duplicate_threshold(epsilon: float) -> float:
    """Two rows are duplicates if their similarity is above this: above 1 − ε, or 1 (identical)."""
    return min(1.0 - epsilon, BELOW_ONE)


def first_status(
    similarity: npt.NDArray[np.float64],
    threshold: float,
    judged: npt.NDArray[np.bool_],
    certain: npt.NDArray[np.bool_],
) -> npt.NDArray[np.uint8]:
    """Return the fates that the most similar earlier row alone decides under the greedy rule: uint8 [n], OPEN where it does not.

    A row is KEPT if that row is no duplicate, and DROPPED if that row is kept. A row that is identical to it counts as DROPPED: it shares
    its fate, so that no other row is a duplicate of this one alone.

    Args:
        similarity: [n], to the most similar earlier row.
        threshold: of duplicates.
        judged: [n], whether that earlier row is itself judged (rather than decided before).
        certain: [n], whether that earlier row is certainly kept.
    """
    dropped = certain | ((similarity == 1.0) & judged)
    status: npt.NDArray[np.uint8] = np.where(similarity <= threshold, KEPT, np.where(dropped, DROPPED, OPEN))
    return status


@repeat_if_wrong
def look_back(
    x: npt.NDArray[np.float16],
    asked: npt.NDArray[np.int64],
    status: npt.NDArray[np.uint8],
    threshold: float,
    *,
    alone: bool,
    device: str = "auto",
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Look for earlier duplicates of some rows: one goes if one of them is kept, waits if the fate of one is open, and else has none.

    Args:
        x: [m, d], in keep-order.
        asked: int64 [a], ascending.
        status: uint8 [m], the fate of each row so far.
        threshold: rows of a similarity above it are duplicates.
        alone: whether these rows are compared with no others: then one without an earlier duplicate is kept for later rows too.
        device: of the matrix products; the result doesn't depend on it.

    Returns:
        waits: bool [a], whether the fate of an earlier duplicate is open.
        kept_row: int64 [a], the most similar kept earlier duplicate; −1 where there is none.
        similarity: float64 [a], to it; NOTHING_EARLIER where there is none.
    """
    status, waits = status.copy(), np.zeros(len(asked), np.bool_)
    kept_row, found = np.full(len(asked), -1, np.int64), np.full(len(asked), NOTHING_EARLIER)
    if not len(asked):
        return waits, kept_row, found
    rows = Rows(x, device)
    step = max(1, min(SCAN_SCORES // max(len(x), 1), SCAN_ROWS))
    for start in range(0, len(asked), step):
        some = slice(start, start + step)
        pairs = _candidates(rows, asked[some], threshold)
        bounds = float32_error(x.shape[1] + 2), BELOW_ONE, threshold
        answers: tuple[Any, ...] = (waits[some], kept_row[some], found[some])
        if not decide_back(asked[some], *pairs, rows.x, rows.norms, *bounds, alone, status, *answers):
            raise WrongProductError
    return waits, kept_row, found


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

    Only rows that `similarity` and `earlier` leave open are compared again.

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
    judged_from = 0 if kept_before is None else len(kept_before)
    certain = similarity <= threshold
    if kept_before is not None:
        certain[:judged_from] = kept_before
    status = first_status(similarity, threshold, earlier >= judged_from, certain[earlier])
    if kept_before is not None:
        status[:judged_from] = np.where(kept_before, KEPT, DROPPED)
    kept_row = np.where(status == DROPPED, earlier, -1)
    kept_row[:judged_from] = -1
    asked = np.flatnonzero(status == OPEN)
    found = np.where(kept_row >= 0, similarity, NOTHING_EARLIER)
    _, kept_row[asked], found[asked] = look_back(x, asked, status, threshold, alone=True, device=device)
    copies = np.flatnonzero((similarity == 1.0) & (earlier >= judged_from))
    copies = copies[kept_row[earlier[copies]] >= 0]
    kept_row[copies], found[copies] = kept_row[earlier[copies]], found[earlier[copies]]
    return kept_row, found


def _candidates(
    rows: Rows, asked: npt.NDArray[np.int64], threshold: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Rows that may be duplicates of those asked for, and a few others: offsets [n + 1], indices and scores."""
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
