"""The ε that keeps a given share of the pool: papers state the share (SemDeDup, arXiv 2303.09540; DBP, arXiv 2401.04578).

ε is a multiple of 1 / GRID, so that `epsilon` with the same number gives the same list. The comparison knows how many samples "any-earlier"
drops at each ε, and no rule drops more. For other rules a search decides at a few ε: it assumes that a rule drops a constant part of what
"any-earlier" does, and learns from each answer. Samples of equal similarity go together, so more than the share can stay, but never less.
Under "greedy", a greater ε may drop a sample fewer: of several ε that answer, the search returns one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tailwise.catalog.catalog import Part
from tailwise.catalog.comparisons import Neighbours
from tailwise.errors import UserError
from tailwise.execution.base import KERNEL, WithWorker, Worker
from tailwise.kernels.duplicates import duplicate_threshold
from tailwise.plan.quotas import samples_of_share
from tailwise.steps.dedup.comparison import Address, Comparison

GRID = 1_000_000
CLOSE = 1e-4  # the search ends when no more than this share of the pool stays beyond the target


def find_epsilon(compared: Comparison, neighbours: Neighbours, share: float, dropped: Callable[[float], int]) -> float:
    """Return the ε at which `share` of the pool stays, or the least share above it that the search finds.

    `share`: samples that stay, as a share of the pool. `dropped`: returns how many samples the rule drops at an ε; at most as many as "any-
    earlier".

    Raises:
        UserError: no ε from 0 to 1 keeps this share.
    """
    pool, judged = compared.survivors.pool, compared.new
    stay = samples_of_share(share, pool, judged, f"{judged:,} take part", "`target_share`")
    count = WithWorker(partial(_count, compared.address, neighbours.folder))
    counts = compared.context.executor.reduce(count, compared.parts, np.add, KERNEL)
    most: npt.NDArray[np.int64] = np.cumsum(counts)[: GRID + 1]  # samples that "any-earlier" drops at each ε
    if most[0] > judged - stay:
        raise _unreachable(share, pool, stay, "largest", "identical embeddings", judged - int(most[0]))
    if (fewest := judged - int(most[-1])) <= stay:
        at, gone = _search(most, judged - stay, int(CLOSE * pool), dropped)
        if at < GRID or judged - gone <= stay + int(CLOSE * pool):
            return at / GRID
        fewest = judged - gone
    raise _unreachable(share, pool, stay, "smallest", "ε = 1", fewest)


def _unreachable(share: float, pool: int, stay: int, which: str, what: str, least: int) -> UserError:
    rounded = math.floor if which == "largest" else math.ceil  # so that the share is accepted
    bound = f"dropping by {what} leaves {least:,}: the {which} possible share is {rounded(least / pool * 1e6) / 1e6:g}"
    return UserError(f"`target_share` {share:g} asks that {stay:,} of {pool:,} samples stay, but {bound}")


def _search(most: npt.NDArray[np.int64], limit: int, slack: int, dropped: Callable[[float], int]) -> tuple[int, int]:
    """Return a multiple of 1 / GRID at which at most `limit` samples go, while the next one drops more; and how many go.

    Also return one at which at most `slack` samples fewer go. The bracket always holds the answer: interpolation over `most` narrows it,
    and bisection every fourth time.
    """
    low, high = int(np.searchsorted(most, limit, side="right")) - 1, GRID + 1
    at_low, at_high, tries = dropped(low / GRID), None, 0
    while high - low > 1 and limit - at_low > slack:
        tries, missing = tries + 1, limit - slack // 2 - at_low
        if at_high is None:  # in proportion; then further, to have a bracket
            wanted = most[low] * (1 + tries * missing / max(at_low, 1)) + 1
        else:
            wanted = most[low] + missing * (most[high] - most[low]) / (at_high - at_low)
        at = int(np.searchsorted(most, wanted, side="right")) - 1
        at = (low + high) // 2 if at_high is not None and tries % 4 == 0 else min(max(at, low + 1), high - 1)
        gone = dropped(at / GRID)
        if gone <= limit:
            low, at_low = at, gone
        else:
            high, at_high = at, gone
    return low, at_low


def _count(compared: Address, folder: Path, part: Part, worker: Worker) -> npt.NDArray[np.int64]:
    """Count the samples by the least multiple of 1 / GRID that makes them duplicates: int64 [GRID + 2], the last for those of none."""
    neighbours = Neighbours(compared.open(worker).catalog, folder)
    thresholds = np.minimum(1.0 - np.arange(GRID + 1) / GRID, duplicate_threshold(0))
    least = np.searchsorted(-thresholds, -neighbours.similarity[part.span], side="right")
    return np.bincount(least, minlength=GRID + 2)
