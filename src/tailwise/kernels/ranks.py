"""Ranks of rows inside their cluster."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.kernels.jit import jit

NARROW = 1 << 32  # ranks below this are stored as uint32


def rank_dtype(members: int) -> np.dtype[Any]:
    """Return the type of the ranks, and slots, of groups of at most `members` rows: uint32, or uint64 where that is too narrow."""
    return np.dtype(np.uint32 if members <= NARROW else np.uint64)


@jit
def _appearance_ranks(labels: npt.NDArray[np.int32], seen: npt.NDArray[np.int64], ranks: npt.NDArray[Any]) -> None:
    for row in range(len(labels)):
        label = labels[row]
        if label >= 0:
            ranks[row] = seen[label]
            seen[label] += 1


def appearance_ranks(labels: npt.NDArray[np.int32], seen: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """In-cluster ranks in order of appearance.

    Args:
        labels: int32 [n]; negative for rows of no cluster, whose rank is 0.
        seen: int64 [K], how many members came before; updated in place.

    Returns:
        [n], uint32, or uint64 where a group has more than NARROW members by then (see `rank_dtype`).
    """
    members = int(seen.max(initial=0)) + len(labels)
    if members > NARROW:
        members = int((seen + np.bincount(labels[labels >= 0], minlength=len(seen))).max())
    ranks = np.zeros(len(labels), rank_dtype(members))
    _appearance_ranks(np.ascontiguousarray(labels), seen, ranks)
    return ranks


def value_ranks(labels: npt.NDArray[np.int32], values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    """In-cluster ranks by ascending value, ties by row.

    Args:
        labels: int32 [n]; negative for rows of no cluster, whose rank is 0.
        values: float32 [n].

    Returns:
        uint32 [n].
    """
    order = np.lexsort((values, labels))
    ranks = np.zeros(len(labels), np.uint32)
    sorted_labels = labels[order]
    starts = np.flatnonzero(np.r_[True, sorted_labels[1:] != sorted_labels[:-1]]) if len(labels) else np.empty(0, int)
    lengths = np.diff(np.r_[starts, len(labels)])
    ranks[order] = np.arange(len(labels)) - np.repeat(starts, lengths)
    ranks[labels < 0] = 0
    return ranks
