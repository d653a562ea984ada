"""Batch composition: which items share a batch. Arrays in, arrays out; labels are clusters."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from tailwise.kernels.jit import jit
from tailwise.kernels.keyed import KEYS, hash_range


@jit
def _sort_by_group(
    order: npt.NDArray[np.int64],
    groups: npt.NDArray[np.int64],
    next_place: npt.NDArray[np.int64],
    out: npt.NDArray[np.int64],
) -> None:
    for item in order:
        group = groups[item]
        out[next_place[group]] = item
        next_place[group] += 1


def _by_group(
    groups: npt.NDArray[np.int64], count: int, hashes: npt.NDArray[np.uint64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Items group after group, by hash within a group: int64 [n]; and where each group begins: int64 [count + 1]."""
    starts = np.concatenate([[0], np.cumsum(np.bincount(groups, minlength=count))]).astype(np.int64)
    items = np.empty(len(groups), np.int64)
    _sort_by_group(np.argsort(hashes), groups, starts[:-1].copy(), items)
    return items, starts


# --- spread -----------------------------------------------------------------------------------------------------------


def deal(labels: npt.NDArray[np.int32], slots_of_batch: npt.NDArray[np.int64], key: np.uint64) -> npt.NDArray[np.int64]:
    """Spreads every cluster evenly over the batches: items are put in cluster order and dealt like cards.

    A batch of s of the n slots has a share of n_j · s / n in a cluster of n_j items. Every batch of the most common size gets the floor
    or the ceiling of its share of every cluster; so does a single batch of another size; where several have other sizes, as the first
    and the last one of an epoch may, those can be one item further off.

    Args:
        labels: int32 [n], cluster of each item; all negative ones count as one cluster.
        slots_of_batch: int64 [M], slots of each batch, ≥ 0, summing to n.
        key: decides the order of the clusters, and of the members within each.

    Returns:
        The item in each slot, slots numbered batch after batch: int64 [n], a permutation of [0, n). Slots of one batch are in cluster
        order.

    Raises:
        ValueError: the slots don't sum to n, or a number of slots is negative.
    """
    count = len(labels)
    if slots_of_batch.sum() != count or slots_of_batch.min(initial=0) < 0:
        raise ValueError(f"batches of {int(slots_of_batch.sum())} slots (each ≥ 0) for {count} items")
    groups = np.maximum(labels.astype(np.int64), -1) + 1
    clusters = int(groups.max(initial=0)) + 1
    place = np.empty(clusters, np.int64)
    place[np.argsort(hash_range(key, int(KEYS), clusters))] = np.arange(clusters)
    items, _ = _by_group(place[groups], clusters, hash_range(key, 0, count))
    dealt = np.empty(count, np.int64)
    dealt[_dealing_order(slots_of_batch)] = items
    return dealt


def _dealing_order(slots_of_batch: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The slots in the order in which they are dealt to: int64 [n].

    The batches of the most common size are served in turn, so that any run of items falls on them evenly. The others, as a whole, come in
    between at even distances, and among themselves by (i + ½) / slots, i counting the slots of a batch.
    """
    total = int(slots_of_batch.sum())
    if not total:
        return np.empty(0, np.int64)
    sizes, batches = np.unique(slots_of_batch[slots_of_batch > 0], return_counts=True)
    common = slots_of_batch == sizes[len(sizes) - 1 - np.argmax(batches[::-1])]
    first = np.cumsum(slots_of_batch) - slots_of_batch
    turn = np.arange(total) - np.repeat(first, slots_of_batch)
    when = (turn + 0.5) / np.repeat(slots_of_batch, slots_of_batch)
    is_common = np.repeat(common, slots_of_batch)
    rest = np.flatnonzero(~is_common)
    crossed = (np.arange(total + 1) * len(rest) + total // 2) // total
    is_rest = np.diff(crossed) > 0
    order = np.empty(total, np.int64)
    order[is_rest] = rest[np.argsort(when[rest], kind="stable")]
    order[~is_rest] = np.flatnonzero(is_common).reshape(int(common.sum()), -1).T.ravel()
    return order


# --- diverse ----------------------------------------------------------------------------------------------------------


@jit
def _take_greedily(
    items: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    hashes: npt.NDArray[np.uint64],
    frequencies: npt.NDArray[np.float64],
    targets: npt.NDArray[np.float64],
    most: int,
    chosen: npt.NDArray[np.int64],
) -> None:
    """Fills `chosen`, from a heap of clusters by the gain of a member (all of a cluster's gain the same), then by the next one's hash."""
    clusters = len(frequencies)
    taken = np.zeros(clusters, np.int64)
    heap = [
        (-(1.0 + 1.0 / frequencies[cluster]), hashes[items[starts[cluster]]], cluster)
        for cluster in range(clusters)
        if starts[cluster] < starts[cluster + 1]
    ]
    heapq.heapify(heap)
    resting = heap[:0]  # clusters that have given the most they may, and have members left
    for at in range(len(chosen)):
        if not heap:
            most += 1
            heap, resting = resting, heap
            heapq.heapify(heap)
        cluster = heap[0][2]
        chosen[at] = items[starts[cluster] + taken[cluster]]
        taken[cluster] += 1
        place = starts[cluster] + taken[cluster]
        if place == starts[cluster + 1]:
            heapq.heappop(heap)
            continue
        target = targets[cluster]
        gain = (target - taken[cluster]) / target + 1.0 / frequencies[cluster]
        following = (-gain, hashes[items[place]], cluster)
        if taken[cluster] < most:
            heapq.heapreplace(heap, following)
        else:
            heapq.heappop(heap)
            resting.append(following)


def even_target(labels: npt.NDArray[np.int32], count: int, most: int | None = None) -> float:
    """The target of CABS-DM: as many of each concept that is there as make `count` in all, at least 1 and at most `most`.

    Args:
        labels: int32 [n], cluster of each item of the super-batch.
        count: items to pick.
        most: of a concept.
    """
    target = max(1.0, count / max(1, len(np.unique(labels))))
    return target if most is None else min(target, float(most))


def pick_diverse(
    labels: npt.NDArray[np.int32],
    frequencies: npt.NDArray[np.float64],
    target: float | npt.NDArray[np.float64] | None = None,
    most: int | None = None,
    *,
    count: int,
    key: np.uint64,
) -> npt.NDArray[np.int64]:
    """Picks a batch of many concepts from a super-batch: the greedy of CABS-DM, each item having one concept, its cluster.

    Source: Ghosh et al., "Concept-Aware Batch Sampling Improves Language-Image Pretraining", CVPR 2026, arXiv 2511.20643. Picked next is
    always an item of the largest gain (target − taken) / target + 1 / frequency, where `taken` counts the picks of its cluster so far;
    ties go to the smallest keyed hash. Two things differ from the published code, which lets batches shrink: past its target a
    cluster's gain goes on falling (there it is −½ for all), so that surplus picks are even too; and where no cluster below `most` is
    left, `most` rises by one, until the batch is full.

    Args:
        labels: int32 [n], cluster of each item of the super-batch, in [0, K).
        frequencies: float64 [K], how many there are of each cluster; below 1 is taken for 1. The published code counts the concept's items
            in the super-batch.
        target: items wanted of each cluster, > 0: one for all, or float64 [K]; None for `even_target`.
        most: items of a cluster, at most, as long as others are left; None for no bound.
        count: items to pick, at most n.
        key: decides ties.

    Returns:
        Positions of the picked items, ascending: int64 [count].

    Raises:
        ValueError: more items are asked for than there are, or a label, target or `most` is out of bounds.
    """
    if not 0 <= count <= len(labels):
        raise ValueError(f"{count} of {len(labels)} items")
    if not count:
        return np.empty(0, np.int64)
    if labels.min() < 0 or labels.max() >= len(frequencies):
        raise ValueError(f"labels {labels.min()} … {labels.max()} for {len(frequencies)} clusters")
    if most is not None and most < 1:
        raise ValueError(f"at most {most} items of a cluster: must be ≥ 1")
    target = even_target(labels, count, most) if target is None else target
    targets = np.array(np.broadcast_to(np.asarray(target, np.float64), len(frequencies)))
    if not (targets[labels] > 0).all():
        raise ValueError("the targets of the clusters that are there must be > 0")
    hashes = hash_range(key, 0, len(labels))
    items, starts = _by_group(labels.astype(np.int64), len(frequencies), hashes)
    chosen = np.empty(count, np.int64)
    frequencies = np.maximum(frequencies.astype(np.float64), 1.0)
    _take_greedily(items, starts, hashes, frequencies, targets, count if most is None else most, chosen)
    return np.sort(chosen)
