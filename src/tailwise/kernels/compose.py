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


# --- several concepts an item -----------------------------------------------------------------------------------------

MOST_OF_A_CONCEPT = 10  # CABS-DM: items of a concept in a batch, and the greatest even share of a target


def concept_targets(concepts: int, count: int) -> npt.NDArray[np.int64]:
    """Return the targets of CABS-DM: how many of `count` items should have each of K concepts, int64 [K], in the order of the concepts.

    Source: see `pick_covering`. The even share count // K, at most MOST_OF_A_CONCEPT, and one more for the first count mod K concepts;
    at least 1. If they sum to more than `count`, they shrink in proportion, and stay at least 1.
    """
    targets = np.full(concepts, min(count // max(1, concepts), MOST_OF_A_CONCEPT), np.int64)
    targets[: count % max(1, concepts)] += 1
    targets = np.maximum(targets, 1)
    total = int(targets.sum())
    return np.maximum(targets * count // total, 1) if total > count else targets


@jit
def _gain(
    codes: npt.NDArray[np.int64],
    taken: npt.NDArray[np.int64],
    targets: npt.NDArray[np.int64],
    frequencies: npt.NDArray[np.int64],
) -> float:
    """Gain of an item with some concepts, summed in their order; less than any other's if it has none."""
    if len(codes) == 0:
        return -1.0
    total = 0.0
    for code in codes:
        if taken[code] < targets[code]:
            total += (targets[code] - taken[code]) / targets[code] + 1.0 / frequencies[code]
        else:
            total -= 0.5
    return total / len(codes)


@jit
def _cover_greedily(
    starts: npt.NDArray[np.int64],
    codes: npt.NDArray[np.int64],
    targets: npt.NDArray[np.int64],
    frequencies: npt.NDArray[np.int64],
    most: int,
    chosen: npt.NDArray[np.int64],
) -> None:
    """Fills `chosen` from a heap by gain, then position. Gains only fall: the first item whose gain is still true has the greatest."""
    taken = np.zeros(len(targets), np.int64)
    heap = [
        (-_gain(codes[starts[item] : starts[item + 1]], taken, targets, frequencies), item)
        for item in range(len(starts) - 1)
    ]
    heapq.heapify(heap)
    resting = heap[:0]  # items with a concept that the batch has `most` times
    at = 0
    while at < len(chosen):
        if not heap:
            most = len(starts)  # no bound; to raise it step by step would sort all items again for each pick
            heap, resting = resting, heap
            heapq.heapify(heap)
        known, item = heap[0]
        own = codes[starts[item] : starts[item + 1]]
        full = False
        for code in own:
            full = full or taken[code] >= most
        gain = -_gain(own, taken, targets, frequencies)
        if full:
            heapq.heappop(heap)
            resting.append((gain, item))
        elif gain > known:
            heapq.heapreplace(heap, (gain, item))
        else:
            heapq.heappop(heap)
            chosen[at] = item
            at += 1
            for code in own:
                taken[code] += 1


def pick_covering(
    counts: npt.NDArray[np.int32], concepts: npt.NDArray[np.int32], count: int, most: int = MOST_OF_A_CONCEPT
) -> npt.NDArray[np.int64]:
    """Pick a batch that covers many concepts from a super-batch of n items with several concepts each: CABS-DM.

    Source: Ghosh et al., "Concept-Aware Batch Sampling Improves Language-Image Pretraining", CVPR 2026, arXiv 2511.20643, as its code
    does it for one rank. Picked next is the item of the greatest gain, the mean over its concepts of (target − taken) / target +
    1 / frequency, or −½ for a concept that has reached its target (`concept_targets`); of equal gains the first item. `frequency`
    counts the items of the super-batch with the concept. An item with a concept that was picked `most` times is out. Where all are
    out, the published code lets batches shrink; here the bound is lifted, and the batch is filled by gain. Items without concepts have
    the least gain, and are never out.

    Args:
        counts: int32 [n], number of concepts of each item.
        concepts: int32 [m], the concepts of all items, item after item; different ones within an item, ascending.
        count: items to pick, at most n.
        most: items of a concept, at most, as long as others are left.

    Returns:
        Positions of the picked items, ascending: int64 [count].

    Raises:
        ValueError: more items are asked for than there are, or the counts do not sum to m.
    """
    _check_lists(counts, concepts, count)
    _, codes = np.unique(concepts, return_inverse=True)
    codes = codes.astype(np.int64).ravel()
    frequencies = np.bincount(codes).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    chosen = np.empty(count, np.int64)
    _cover_greedily(starts, codes, concept_targets(len(frequencies), count), frequencies, most, chosen)
    return np.sort(chosen)


def pick_richest(counts: npt.NDArray[np.int32], concepts: npt.NDArray[np.int32], count: int) -> npt.NDArray[np.int64]:
    """Pick the items with the most concepts, of equally many the first: CABS-FM. Arguments and result are those of `pick_covering`."""
    _check_lists(counts, concepts, count)
    return np.sort(np.argsort(-counts.astype(np.int64), kind="stable")[:count])


def _check_lists(counts: npt.NDArray[np.int32], concepts: npt.NDArray[np.int32], count: int) -> None:
    if not 0 <= count <= len(counts):
        raise ValueError(f"{count} of {len(counts)} items")
    if counts.sum(dtype=np.int64) != len(concepts) or counts.min(initial=0) < 0:
        raise ValueError(f"{len(concepts)} concepts, where the counts sum to {counts.sum(dtype=np.int64)}")
