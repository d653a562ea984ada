import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.kernels.compose import concept_targets, deal, even_target, pick_covering, pick_diverse, pick_richest
from tailwise.kernels.keyed import hash_range, stream_key

FIXED = settings(derandomize=True, deadline=None, max_examples=200)
KEY = stream_key(0, "test of compose")


def counts_of(labels, slots, dealt):
    """Items of each cluster in each batch: [M, K]."""
    counts = np.zeros((len(slots), labels.max(initial=-1) + 2), int)
    np.add.at(counts, (np.repeat(np.arange(len(slots)), slots), np.maximum(labels[dealt], -1) + 1), 1)
    return counts


def cluster_labels(sizes, seed):
    labels = np.repeat(np.arange(-1, len(sizes) - 1, dtype=np.int32), sizes)
    return np.random.default_rng(seed).permutation(labels)


@st.composite
def pools(draw, others):
    """Labels, and batches: some of one size, up to `others` of other sizes, at any place; their slots sum to the items."""
    size = draw(st.integers(1, 12))
    slots = [size] * draw(st.integers(2, 12))
    for _ in range(draw(st.integers(0, others))):
        slots.insert(draw(st.integers(0, len(slots))), draw(st.integers(0, 15)))
    total = sum(slots)
    cuts = sorted(draw(st.lists(st.integers(0, total), max_size=12)))
    return cluster_labels(np.diff([0, *cuts, total]), draw(st.integers(0, 100))), np.array(slots)


def deviations(labels, slots):
    """How far each count lies below the floor, or above the ceiling, of its share: [M, K]."""
    dealt = deal(labels, slots, KEY)
    assert sorted(dealt) == list(range(len(labels)))
    counts = counts_of(labels, slots, dealt)
    over, total = slots[:, None] * counts.sum(0), len(labels)
    return np.maximum(np.maximum(over // total - counts, counts + -over // total), 0)


@FIXED
@given(pools(others=1))
def test_every_batch_gets_floor_or_ceiling_of_its_share(pool):
    labels, slots = pool
    assert not deviations(labels, slots).any()


@FIXED
@given(pools(others=2))
def test_of_several_batches_of_other_sizes_only_those_may_be_one_off(pool):
    labels, slots = pool
    off = deviations(labels, slots)
    sizes, batches = np.unique(slots[slots > 0], return_counts=True)
    usual = slots == sizes[batches == batches.max()].max()
    assert not off[usual].any()
    assert off.max() <= 1


@FIXED
@given(st.lists(st.integers(0, 30), max_size=12), st.lists(st.integers(0, 60), max_size=8), st.integers(0, 100))
def test_any_batches_are_filled_with_every_item_once(slots, sizes, seed):
    total = sum(slots)
    labels = cluster_labels(np.diff([0, *sorted(min(size, total) for size in sizes), total]), seed)
    assert sorted(deal(labels, np.array(slots, np.int64), KEY)) == list(range(total))


def test_dealing_is_keyed():
    labels, slots = cluster_labels([50, 30, 20], 0), np.full(10, 10)
    first = deal(labels, slots, KEY)
    assert np.array_equal(first, deal(labels, slots, KEY))
    assert not np.array_equal(first, deal(labels, slots, KEY + np.uint64(1)))
    batches = {frozenset(deal(labels, slots, np.uint64(key))[:10]) for key in range(20)}
    assert len(batches) == 20


def test_members_meet_in_all_pairings():
    """Over many keys any two items share one of 5 batches as often as clusters allow: never within a cluster of 5, else about 1 in 5."""
    labels, slots, keys = cluster_labels([5] * 4, 3), np.full(5, 4), 4000
    together = np.zeros((20, 20))
    for key in hash_range(KEY, 0, keys):
        for batch in deal(labels, slots, key).reshape(5, 4):
            together[np.ix_(batch, batch)] += 1
    same = labels[:, None] == labels
    np.fill_diagonal(together, 0)
    assert not together[same].any()
    assert np.abs(together[~same] / keys - 0.2).max() < 0.04


def test_a_golden_deal():
    labels = np.array([0, 1, 0, 2, 1, -1, 0, 0, 1], np.int32)
    assert deal(labels, np.array([3, 3, 2, 1]), np.uint64(7)).tolist() == [3, 6, 8, 0, 1, 5, 7, 4, 2]


def test_impossible_deals_are_errors():
    with pytest.raises(ValueError, match="batches of 4 slots"):
        deal(np.zeros(5, np.int32), np.array([2, 2]), KEY)
    with pytest.raises(ValueError, match="each ≥ 0"):
        deal(np.zeros(5, np.int32), np.array([6, -1]), KEY)


def plain_greedy(labels, frequencies, target, most, *, count, key):
    """One item at a time: the gain of every item that is left, in NumPy."""
    hashes = hash_range(key, 0, len(labels))
    left = np.ones(len(labels), bool)
    taken = np.zeros(len(frequencies))
    targets = np.broadcast_to(np.asarray(target, float), len(frequencies))
    for _ in range(count):
        while most is not None and not (left & (taken[labels] < most)).any():
            most += 1
        allowed = left if most is None else left & (taken[labels] < most)
        gains = np.where(allowed, ((targets - taken) / targets + 1 / np.maximum(frequencies, 1))[labels], -np.inf)
        best = np.flatnonzero(gains == gains.max())
        pick = best[np.argmin(hashes[best])]
        left[pick] = False
        taken[labels[pick]] += 1
    return np.flatnonzero(~left)


@st.composite
def super_batches(draw):
    clusters = draw(st.integers(1, 9))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    shares = random.pareto(1.0, clusters) + 0.05
    labels = random.choice(clusters, draw(st.integers(1, 60)), p=shares / shares.sum()).astype(np.int32)
    frequencies = draw(
        st.sampled_from(
            [
                np.maximum(np.bincount(labels, minlength=clusters), 1).astype(float),
                np.full(clusters, 0.3),
                np.arange(1.0, clusters + 1) ** 2,
            ]
        )
    )
    count = draw(st.integers(0, len(labels)))
    most = draw(st.sampled_from([None, 1, 2, 3, 10]))
    targets = [even_target(labels, count, most), 1.0, 2.7, np.arange(1.0, clusters + 1)]
    key = np.uint64(draw(st.integers(0, 2**64 - 1)))
    return (labels, frequencies, draw(st.sampled_from(targets)), most), {"count": count, "key": key}


@FIXED
@given(super_batches())
def test_the_heap_picks_what_the_plain_greedy_picks(arguments):
    positional, named = arguments
    picked = pick_diverse(*positional, **named)
    assert picked.dtype == np.int64
    assert np.array_equal(picked, plain_greedy(*positional, **named))


@FIXED
@given(super_batches())
def test_the_bound_rises_as_little_as_possible(arguments):
    (labels, _, _, most), named = arguments
    taken, count = np.bincount(labels[pick_diverse(*arguments[0], **named)], minlength=1), named["count"]
    sizes = np.bincount(labels)
    if most is not None:
        least = next(bound for bound in range(most, 100) if np.minimum(sizes, bound).sum() >= count)
        assert taken.max() <= least


def test_a_cluster_gets_more_than_most_only_when_all_others_had_theirs():
    labels = np.repeat(np.arange(2, dtype=np.int32), 10)
    for count, expected in [(2, [1, 1]), (3, [1, 2]), (4, [2, 2]), (5, [2, 3]), (6, [3, 3])]:
        picked = pick_diverse(labels, np.full(2, 10.0), np.array([1.0, 9.0]), 1, count=count, key=KEY)
        assert np.bincount(labels[picked]).tolist() == expected


def test_rare_concepts_come_first_and_the_rest_evenly():
    sizes = np.array([500, 300, 150, 30, 10, 6, 3, 1])
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(8, dtype=np.int32), sizes))
    picked = pick_diverse(labels, sizes.astype(float), count=200, key=KEY)
    taken = np.bincount(labels[picked], minlength=8)
    assert taken[3:].tolist() == [30, 10, 6, 3, 1]
    assert taken[:3].tolist() == [50, 50, 50]


def test_even_target():
    labels = np.array([0, 0, 3, 5], np.int32)
    assert even_target(labels, 6) == 2.0
    assert even_target(labels, 1) == 1.0
    assert even_target(labels, 30, 4) == 4.0


def test_ties_are_broken_by_key():
    labels, frequencies = np.arange(100, dtype=np.int32), np.ones(100)
    first, second = (pick_diverse(labels, frequencies, most=1, count=30, key=np.uint64(key)) for key in (1, 2))
    assert len(np.intersect1d(first, second)) < 20
    assert np.array_equal(first, np.sort(np.argsort(hash_range(np.uint64(1), 0, 100))[:30]))


@pytest.mark.parametrize(
    ("labels", "frequencies", "target", "most", "count", "message"),
    [
        ([0, 1], [1.0, 1.0], 1.0, 1, 3, "3 of 2 items"),
        ([0, 2], [1.0, 1.0], 1.0, 1, 1, "labels 0 … 2 for 2 clusters"),
        ([0, -1], [1.0, 1.0], 1.0, 1, 1, "labels -1 … 0"),
        ([0, 1], [1.0, 1.0], 0.0, 1, 1, "must be > 0"),
        ([0, 1], [1.0, 1.0], 1.0, 0, 1, "at most 0 items"),
    ],
)
def test_impossible_picks_are_errors(labels, frequencies, target, most, count, message):
    with pytest.raises(ValueError, match=message):
        pick_diverse(np.array(labels, np.int32), np.array(frequencies), target, most, count=count, key=KEY)


# --- several concepts an item: CABS-DM and CABS-FM from their formulas, in plain Python --------------------------------


def cabs_targets(super_batch, size):
    """Target of each concept, by name."""
    concepts = sorted({concept for sample in super_batch for concept in sample})
    number = max(1, len(concepts))
    base, extra = min(size // number, 10), size % number
    targets = {concept: max(1, base + (place < extra)) for place, concept in enumerate(concepts)}
    total = sum(targets.values())
    if total > size:
        targets = {concept: max(1, target * size // total) for concept, target in targets.items()}
    return targets


def cabs_diversity(super_batch, size):
    """Picks in the order in which they are made; the bound of 10 is lifted where nothing else is left, so that batches are full."""
    targets, bound = cabs_targets(super_batch, size), 10
    frequency = {concept: sum(concept in sample for sample in super_batch) for concept in targets}
    taken = dict.fromkeys(targets, 0)

    def gain(sample):
        if not sample:
            return -1.0
        gains = [
            (targets[c] - taken[c]) / max(1, targets[c]) + 1 / frequency[c] if taken[c] < targets[c] else -0.5
            for c in sorted(sample)
        ]
        return sum(gains) / len(gains)

    picked = []
    while len(picked) < size:
        left = [place for place in range(len(super_batch)) if place not in picked]
        allowed = [place for place in left if all(taken[c] < bound for c in super_batch[place])]
        if not allowed:
            bound = len(super_batch) + 1
            continue
        best = max(allowed, key=lambda place: (gain(super_batch[place]), -place))
        picked.append(best)
        for concept in super_batch[best]:
            taken[concept] += 1
    return picked


def cabs_frequency(super_batch, size):
    return sorted(range(len(super_batch)), key=lambda place: -len(super_batch[place]))[:size]


def as_lists(super_batch):
    counts = np.array([len(sample) for sample in super_batch], np.int32)
    return counts, np.array([code for sample in super_batch for code in sorted(sample)], np.int32)


@st.composite
def tagged(draw):
    """A super-batch: samples with several concepts of a few or many, skewed, so that gains tie; some have none, many are alike."""
    concepts = draw(st.sampled_from([1, 2, 5, 30, 400]))
    generator = np.random.default_rng(draw(st.integers(0, 10_000)))
    rows, most = draw(st.integers(1, 90)), draw(st.integers(0, 6))
    codes = np.minimum(concepts - 1, generator.geometric(draw(st.sampled_from([0.02, 0.2, 0.6])), (rows, most)) - 1)
    samples = [{int(code) for code in mine[: generator.integers(0, most + 1)]} for mine in codes]
    return samples, draw(st.integers(0, rows))


@FIXED
@given(tagged())
def test_covering_picks_are_those_of_the_formula(given_batch):
    super_batch, size = given_batch
    picked = pick_covering(*as_lists(super_batch), size)
    assert picked.dtype == np.int64
    assert picked.tolist() == sorted(cabs_diversity(super_batch, size))


@FIXED
@given(tagged())
def test_richest_picks_are_those_of_the_formula(given_batch):
    super_batch, size = given_batch
    assert pick_richest(*as_lists(super_batch), size).tolist() == sorted(cabs_frequency(super_batch, size))


@FIXED
@given(st.integers(1, 300), st.integers(1, 300))
def test_targets_are_those_of_the_formula(concepts, size):
    assert concept_targets(concepts, size).tolist() == list(cabs_targets([set(range(concepts))], size).values())


def test_targets_by_hand():
    assert concept_targets(3, 8).tolist() == [3, 3, 2]
    assert concept_targets(3, 100).tolist() == [
        11,
        10,
        10,
    ]  # an even share of 33 is cut to 10; the one left of 100 goes to the first
    assert concept_targets(5, 3).tolist() == [1, 1, 1, 1, 1]
    assert concept_targets(0, 3).tolist() == []


def test_of_equal_gains_the_first_item_is_picked():
    counts, concepts = as_lists([{0}, {0}, {1}, {1}, set()])
    assert pick_covering(counts, concepts, 2).tolist() == [0, 2]  # both concepts have gain 1.5: item 0, then item 2
    assert pick_covering(counts, concepts, 4).tolist() == [0, 1, 2, 3]
    assert pick_richest(counts, concepts, 3).tolist() == [0, 1, 2]


def test_a_concept_is_picked_more_than_ten_times_only_when_nothing_else_is_left():
    counts, concepts = as_lists([{0}] * 15 + [set()] * 2)
    assert pick_covering(counts, concepts, 10).tolist() == [*range(10)]
    assert pick_covering(counts, concepts, 13).tolist() == [*range(11), 15, 16]


@pytest.mark.parametrize("pick", [pick_covering, pick_richest])
def test_lists_that_do_not_fit_are_errors(pick):
    with pytest.raises(ValueError, match="3 of 2 items"):
        pick(np.ones(2, np.int32), np.zeros(2, np.int32), 3)
    with pytest.raises(ValueError, match="3 concepts, where the counts sum to 2"):
        pick(np.ones(2, np.int32), np.zeros(3, np.int32), 1)
