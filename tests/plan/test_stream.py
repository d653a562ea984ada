import itertools
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.plan import stream as module
from tailwise.plan.quotas import UNITS, round_to_sum
from tailwise.plan.stream import Stream

FIXED = settings(derandomize=True, deadline=None, max_examples=60)

cluster_sizes = st.lists(
    st.one_of(st.sampled_from([1, 2, 3]), st.integers(1, 40), st.integers(41, 400)), min_size=1, max_size=8
)
log_rates = st.floats(-4, np.log10(20))
seeds = st.integers(0, 2**63)


def in_cluster_order(pool, values):
    """Rows' values as one array per cluster."""
    order = np.argsort(pool.labels, kind="stable")
    return np.split(values[order], np.cumsum(pool.sizes)[:-1])


class Sequence:
    """Draws epoch after epoch, carrying the slots; every epoch is checked."""

    def __init__(self, pool, quotas: Callable[[int], np.ndarray], seed: int):
        self.pool, self.quotas = pool, quotas
        self.stream = Stream(pool.sizes, quotas, seed)
        self.slots = self.stream.first_slots(pool.labels, pool.ranks)
        self.seen = np.zeros(len(pool.labels), np.int64)
        self.epoch = 0

    def draw(self):
        epoch, pool = self.epoch, self.pool
        quotas, counts = self.quotas(epoch), self.stream.counts(epoch)
        copies = self.stream.copies(epoch, pool.labels, pool.ranks, self.slots)
        assert copies.dtype == np.uint8
        assert int(counts.sum()) * UNITS == int(quotas.sum())
        assert (np.abs(counts * UNITS - quotas) < UNITS).all()
        self.seen += copies
        self.slots = self.stream.advance_slots(pool.labels, self.slots, epoch, epoch + 1)
        for size, quota, count, drawn, seen, slots in zip(
            pool.sizes,
            quotas,
            counts,
            *(in_cluster_order(pool, column) for column in (copies, self.seen, self.slots)),
            strict=True,
        ):
            if not size:
                continue
            assert int(drawn.sum(dtype=np.int64)) == count
            assert drawn.min() == count // size
            assert drawn.max() == -(-count // size)
            if quota <= size * UNITS:
                assert drawn.max() <= 1
            assert seen.max() - seen.min() <= 1
            np.testing.assert_array_equal(np.sort(slots), np.arange(size))
        self.epoch += 1
        return copies


def constant(quotas):
    return lambda epoch: quotas


@FIXED
@given(cluster_sizes, st.data(), seeds, st.integers(1, 25))
def test_every_epoch_of_constant_quotas(make_pool, rated_quotas, sizes, data, seed, epochs):
    rates = [10.0 ** data.draw(log_rates) for _ in sizes]
    sizes, quotas = rated_quotas(sizes, rates)
    sequence = Sequence(make_pool(sizes, seed), constant(quotas), seed)
    for _ in range(epochs):
        sequence.draw()


@FIXED
@given(
    cluster_sizes,
    st.lists(st.tuples(st.floats(0.0005, 1), st.floats(0, 1)), min_size=1, max_size=20),
    st.sampled_from([1, 3, 20]),
    seeds,
)
def test_every_epoch_of_budgets_and_alpha_that_vary(make_pool, scaled_quotas, sizes, course, repeats, seed):
    most = repeats * sum(sizes)
    schedule = [scaled_quotas(sizes, max(1, int(share * most)), alpha, repeats) for share, alpha in course]
    sequence = Sequence(make_pool(sizes, seed), lambda epoch: schedule[epoch], seed)
    for _ in schedule:
        sequence.draw()


@FIXED
@given(cluster_sizes, st.integers(0, 2**32), seeds)
def test_every_epoch_of_erratic_quotas(make_pool, rated_quotas, sizes, schedule_seed, seed):
    """Nothing drawn, whole passes, and rates on either side of 1 in turn."""
    rng = np.random.default_rng(schedule_seed)
    schedule = []
    for _ in range(15):
        rates = rng.choice([0, 0.01, 0.3, 0.5, 0.9, 1, 1.1, 1.7, 2, 6.4], len(sizes))
        schedule.append(rated_quotas(sizes, rates)[1])
    sequence = Sequence(make_pool([*sizes, 2], seed), lambda epoch: schedule[epoch], seed)
    for _ in schedule:
        sequence.draw()


@pytest.mark.parametrize("rate", [0.37, 1.7])
def test_a_cluster_of_a_million(make_pool, rated_quotas, rate):
    sizes, quotas = rated_quotas([10**6], [rate])
    sequence = Sequence(make_pool(sizes), constant(quotas), 5)
    for _ in range(4):  # with an epoch that straddles two passes
        sequence.draw()


@FIXED
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.data(), seeds)
def test_all_members_are_seen_in_time(make_pool, rated_quotas, sizes, data, seed):
    rates = [10.0 ** data.draw(st.floats(-2, 1)) for _ in sizes]
    sizes, quotas = rated_quotas(sizes, rates)
    drawn = quotas > 0
    epochs = np.zeros(len(sizes), np.int64)
    epochs[drawn] = -(-(sizes[drawn] + 2) * UNITS // quotas[drawn])
    epochs[epochs > 320] = 0  # the filler's quota may be tiny
    sequence = Sequence(make_pool(sizes, seed), constant(quotas), seed)
    for epoch in range(int(epochs.max())):
        sequence.draw()
        for due, seen in zip(epochs, in_cluster_order(sequence.pool, sequence.seen), strict=True):
            if due == epoch + 1:
                assert seen.min() >= 1


def test_all_members_are_seen_in_time_at_a_rate_of_one_in_ten_thousand(make_pool, rated_quotas):
    sizes, quotas = rated_quotas([100, 100, 3], [1e-4, 1e-4, 1e-4])
    stream, pool = Stream(sizes, constant(quotas), 3), make_pool(sizes)
    slots = stream.first_slots(pool.labels, pool.ranks)
    seen = np.zeros(len(slots), np.int64)
    for epoch in range(10_200):  # ⌈(100 + 2) / 0.01⌉
        seen += stream.copies(epoch, pool.labels, pool.ranks, slots)
        slots = stream.advance_slots(pool.labels, slots, epoch, epoch + 1)
    first, second, third, _ = in_cluster_order(pool, seen)
    for cluster in (first, second):
        assert (cluster.min(), cluster.max()) == (1, 2)
    assert 2 <= third.sum() <= 5
    assert third.max() - third.min() <= 1


MIXED = [1, 2, 3, 5, 16, 17, 64, 65, 300]


def mixed_schedule(scaled_quotas):
    return [
        scaled_quotas(MIXED, budget, alpha, 3)
        for budget, alpha in [(300, 0.2), (200, 0.2), (500, 0.5), (37, 0.0), (1, 1.0), (1000, 0.2), (250, 0.7)] * 3
    ]


@FIXED
@given(st.integers(0, 20), st.lists(st.integers(0, 472), max_size=60), seeds)
def test_the_draw_of_some_rows_is_that_part_of_the_whole_draw(make_pool, scaled_quotas, epoch, rows, seed):
    pool, schedule = make_pool(MIXED), mixed_schedule(scaled_quotas)
    whole = Stream(pool.sizes, schedule.__getitem__, seed).copies(epoch, pool.labels, pool.ranks)
    part = Stream(pool.sizes, schedule.__getitem__, seed).copies(epoch, pool.labels[rows], pool.ranks[rows])
    np.testing.assert_array_equal(part, whole[rows])


@pytest.mark.parametrize("pieces", [1, 2, 7, 473])
def test_the_draw_does_not_depend_on_how_rows_are_split(make_pool, scaled_quotas, pieces):
    pool, schedule = make_pool(MIXED), mixed_schedule(scaled_quotas)
    stream = Stream(pool.sizes, schedule.__getitem__, 11)
    for epoch in (0, 1, 6, 20):
        whole = stream.copies(epoch, pool.labels, pool.ranks)
        split = np.array_split(np.arange(len(whole)), pieces)
        drawn = [stream.copies(epoch, pool.labels[rows], pool.ranks[rows]) for rows in split]
        np.testing.assert_array_equal(np.concatenate(drawn), whole)


@FIXED
@given(st.integers(0, 20), st.integers(0, 20), seeds)
def test_slots_of_any_earlier_epoch_save_work_but_change_nothing(make_pool, scaled_quotas, epoch, between, seed):
    pool, schedule = make_pool(MIXED), mixed_schedule(scaled_quotas)
    stream = Stream(pool.sizes, schedule.__getitem__, seed)
    between = min(between, epoch)
    start = stream.first_slots(pool.labels, pool.ranks)
    halfway = stream.advance_slots(pool.labels, start, 0, between)
    slots = stream.advance_slots(pool.labels, halfway, between, epoch)
    np.testing.assert_array_equal(slots, stream.advance_slots(pool.labels, start, 0, epoch))
    np.testing.assert_array_equal(
        stream.copies(epoch, pool.labels, pool.ranks, slots), stream.copies(epoch, pool.labels, pool.ranks)
    )


def test_given_slots_are_not_written_to(make_pool, scaled_quotas):
    pool, schedule = make_pool(MIXED), mixed_schedule(scaled_quotas)
    stream = Stream(pool.sizes, schedule.__getitem__, 0)
    slots = stream.first_slots(pool.labels, pool.ranks)
    before = slots.copy()
    stream.copies(0, pool.labels, pool.ranks, slots)
    stream.advance_slots(pool.labels, slots, 0, 9)
    np.testing.assert_array_equal(slots, before)


def test_epochs_may_be_asked_for_in_any_order(make_pool, scaled_quotas):
    pool, schedule = make_pool(MIXED), mixed_schedule(scaled_quotas)
    forwards = Stream(pool.sizes, schedule.__getitem__, 4)
    expected = [forwards.copies(epoch, pool.labels, pool.ranks) for epoch in range(21)]
    counts = [forwards.counts(epoch) for epoch in range(21)]
    stream = Stream(pool.sizes, schedule.__getitem__, 4)
    for epoch in (20, 3, 3, 19, 0, 7, 8, 1):
        np.testing.assert_array_equal(stream.copies(epoch, pool.labels, pool.ranks), expected[epoch])
        np.testing.assert_array_equal(stream.counts(epoch), counts[epoch])
        assert stream.position(epoch).epoch == epoch
        np.testing.assert_array_equal(stream.position(epoch).taken, np.sum(counts[:epoch], axis=0, initial=0))


def grid_of_clusters(clusters, size):
    labels = np.repeat(np.arange(clusters, dtype=np.int32), size)
    return labels, np.tile(np.arange(size, dtype=np.uint32), clusters)


def equal_quotas(clusters, size, rate):
    """The same rate in every cluster but a little more in the last, so that the sum is whole."""
    quotas = np.full(clusters, int(rate * size * UNITS))
    quotas[-1] += -int(quotas.sum()) % UNITS
    return quotas


def overlap_scores(first, second):
    """Overlaps of two draws [clusters, size] against random sets of the same sizes.

    Returns:
        z of the summed overlap, and its variance over the hypergeometric one.
    """
    size = first.shape[1]
    one, other = (draw.sum(axis=1, dtype=np.int64) for draw in (first, second))
    surprise = (first & second).sum(axis=1) - one * other / size
    variance = one * (other / size) * (1 - other / size) * (size - one) / (size - 1)
    return surprise.sum() / np.sqrt(variance.sum()), (surprise**2).sum() / variance.sum()


@pytest.mark.parametrize(
    ("size", "rate"),
    [(3, 0.3), (3, 0.77), (10, 0.1), (10, 0.77), (16, 0.5), (17, 0.3), (64, 0.1), (64, 0.5), (200, 0.3), (200, 0.77)],
)
def test_distant_epochs_overlap_as_random_sets_do(size, rate):
    clusters = max(4000, 200_000 // size)
    labels, ranks = grid_of_clusters(clusters, size)
    distance = int(6 / min(rate, 1 - rate))  # members wait for a whole pass
    stream = Stream(np.full(clusters, size), constant(equal_quotas(clusters, size, rate)), 1)
    draws = [stream.copies(epoch, labels, ranks).reshape(clusters, size)[:-1] for epoch in (2, 2 + distance)]
    score, spread = overlap_scores(*draws)
    assert abs(score) < 4
    assert spread == pytest.approx(1, abs=0.08)  # its standard error is at most 0.023
    if size >= 64:  # in small clusters, those that give one more in both epochs matter
        assert (draws[0] & draws[1]).mean() == pytest.approx(rate**2, rel=0.02)


def test_distant_epochs_of_a_large_cluster_overlap_as_random_sets_do():
    size, rate = 300_000, 0.37
    labels, ranks = grid_of_clusters(1, size)
    stream = Stream(np.array([size]), constant(np.array([int(rate * size) * UNITS])), 8)
    draws = [stream.copies(epoch, labels, ranks).reshape(1, size) for epoch in (1, 7, 20, 33)]
    for first, second in itertools.combinations(draws, 2):
        score, _ = overlap_scores(first, second)
        assert abs(score) < 4


def test_neighbouring_epochs_of_half_the_pool_complete_each_other():
    labels, ranks = grid_of_clusters(100, 20)
    stream = Stream(np.full(100, 20), constant(np.full(100, 10 * UNITS)), 0)
    np.testing.assert_array_equal(stream.copies(0, labels, ranks) + stream.copies(1, labels, ranks), 1)


@pytest.mark.parametrize("size", [16, 40])
def test_other_seeds_and_other_clusters_draw_independently(size):
    clusters = 5000
    labels, ranks = grid_of_clusters(clusters, size)
    quotas = equal_quotas(clusters, size, 0.3)
    first, second = (
        Stream(np.full(clusters, size), constant(quotas), seed).copies(5, labels, ranks).reshape(clusters, size)
        for seed in (1, 2)
    )
    for one, other in ((first, second), (first[1:], first[:-1]), (first[:-1], second[1:])):
        score, spread = overlap_scores(one, other)
        assert abs(score) < 4
        assert spread == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize("size", [7, 16, 17, 60])
@pytest.mark.parametrize("epoch", [0, 2, 13])
def test_every_rank_is_drawn_alike(size, epoch):
    clusters, rate = 6000, 0.3
    labels, ranks = grid_of_clusters(clusters, size)
    stream = Stream(np.full(clusters, size), constant(equal_quotas(clusters, size, rate)), 9)
    drawn = stream.copies(epoch, labels, ranks).reshape(clusters, size).astype(np.int64)
    share = drawn.mean()
    # Members of a cluster are drawn without replacement, which makes the sum of squares larger by size / (size − 1).
    chi_square = ((drawn.sum(axis=0) - share * clusters) ** 2).sum() / (clusters * share * (1 - share))
    tail = scipy.stats.chi2.cdf(chi_square * (size - 1) / size, size - 1)
    assert 1e-4 < tail < 1 - 1e-4


def test_rows_without_a_cluster_are_never_drawn(make_pool, scaled_quotas):
    pool = make_pool(MIXED)
    quotas = scaled_quotas(MIXED, 900, 0.5, 3)
    stream = Stream(pool.sizes, constant(quotas), 0)
    labels = np.insert(pool.labels, [0, 100, 473], -1)
    ranks = np.insert(pool.ranks, [0, 100, 473], 0)
    copies = stream.copies(3, labels, ranks)
    assert not copies[labels < 0].any()
    np.testing.assert_array_equal(copies[labels >= 0], stream.copies(3, pool.labels, pool.ranks))


def test_empty_clusters_are_left_alone(make_pool):
    pool = make_pool([0, 4, 0, 6, 0])
    sequence = Sequence(pool, constant(np.array([0, 2, 0, 3, 0]) * UNITS), 0)
    for _ in range(5):
        sequence.draw()


def test_the_most_copies_that_a_byte_holds(make_pool):
    pool = make_pool([1, 3, 100])
    stream = Stream(pool.sizes, constant(255 * pool.sizes * UNITS), 0)
    for epoch in (0, 1, 4):
        assert (stream.copies(epoch, pool.labels, pool.ranks) == 255).all()


def test_a_cluster_of_five_billion_gives_each_member_once_before_any_twice():
    size, share = 5 * 10**9, 2 * 10**9
    stream = Stream(np.array([size]), constant(np.array([share]) * UNITS), 3)
    ranks = np.unique(np.random.default_rng(0).integers(0, size, 50_000)).astype(np.uint64)
    labels = np.zeros(len(ranks), np.int32)
    first = stream.first_slots(labels, ranks)
    assert first.dtype == np.uint64
    assert len(np.unique(first)) == len(ranks)
    drawn = np.array([stream.copies(epoch, labels, ranks) for epoch in range(5)])
    assert drawn.max() == 1
    assert np.abs(drawn.mean(axis=1) - 0.4).max() < 0.015
    assert (drawn[:2].sum(axis=0) <= 1).all()  # 4 of 5 billion
    assert (drawn[:3].sum(axis=0) >= 1).all()  # 6 of 5 billion
    assert (drawn.sum(axis=0) == 2).all()  # 10 of 5 billion
    slots = stream.advance_slots(labels, first, 0, 4)
    np.testing.assert_array_equal(stream.copies(4, labels, ranks, slots), drawn[4])


def test_clusters_of_a_trillion_are_refused():
    with pytest.raises(ValueError, match=r"1,099,511,627,690 members; at most 1,099,511,627,689"):
        Stream(np.array([3, (1 << 40) - 86]), constant(np.zeros(2, np.int64)), 0)


GOLDEN_SIZES = [1, 2, 3, 5, 17, 30]
GOLDEN = {
    0: "2121211101101011110010000010010000000101011000010101001000",
    1: "2211111111110000001100011101001110010010000100001010000100",
    2: "2212111110100100001001100111100001101000000010100000110010",
    9: "2121211110100100010001111010001001001100100010001100100000",
    100: "2221111111110001000010101101001000000010001000000010111010",
}


def test_golden_draw(scaled_quotas):
    """A plan drawn by another release must not change: rows in cluster order, one digit a row."""
    quotas = scaled_quotas(GOLDEN_SIZES, 29, 0.4, 2)
    stream = Stream(np.array(GOLDEN_SIZES), constant(quotas), 2026)
    labels = np.repeat(np.arange(len(GOLDEN_SIZES), dtype=np.int32), GOLDEN_SIZES)
    ranks = np.concatenate([np.arange(size, dtype=np.uint32) for size in GOLDEN_SIZES])
    for epoch, expected in GOLDEN.items():
        assert "".join(map(str, stream.copies(epoch, labels, ranks))) == expected


def test_threads_may_share_a_stream():
    from concurrent.futures import ThreadPoolExecutor

    random = np.random.default_rng(5)
    sizes = random.integers(1, 60, 300)
    labels = np.repeat(np.arange(300), sizes).astype(np.int32)
    ranks = np.concatenate([np.arange(size) for size in sizes]).astype(np.uint32)
    total = int(sizes.sum()) // 2
    quotas = round_to_sum(sizes * 0.5 * UNITS, total * UNITS, np.zeros(300, np.int64), sizes * UNITS, sizes)
    expected = [Stream(sizes, lambda _: quotas, 1).copies(epoch, labels, ranks) for epoch in range(12)]
    for trial in range(5):
        shared = Stream(sizes, lambda _: quotas, 1)
        epochs = np.random.default_rng(trial).permutation(12).tolist()
        with ThreadPoolExecutor(4) as pool:
            drawn = list(pool.map(lambda epoch, shared=shared: shared.copies(epoch, labels, ranks), epochs))
        for epoch, copies in zip(epochs, drawn, strict=True):
            np.testing.assert_array_equal(copies, expected[epoch])


def test_the_overlaps_of_the_documentation():
    """Rows of the table in docs/reference/draws.md: the smallest and the largest share of an epoch that the one d later draws, too."""
    size, epochs = 50_000, 16
    labels, ranks = grid_of_clusters(1, size)
    text = (Path(__file__).parents[2] / "docs" / "reference" / "draws.md").read_text(encoding="utf-8")
    for rate in (0.2, 0.3, 0.4, 0.5):
        count = round(size * rate)
        stream = Stream(np.array([size]), constant(np.array([count * UNITS])), 7)
        slots = stream.first_slots(labels, ranks)
        draws = []
        for epoch in range(epochs):
            draws.append(stream.copies(epoch, labels, ranks, slots) > 0)
            slots = stream.advance_slots(labels, slots, epoch, epoch + 1)
        cells = []
        for distance in range(1, 8):
            pairs = zip(draws[:-distance], draws[distance:], strict=True)
            shares = [(one & other).sum() / count for one, other in pairs]
            assert max(shares) < rate + 0.01  # never more than random sets share
            assert distance < 1 / rate or min(shares) > 0.9 * rate  # from 1/r on about as much
            cells.append(f"{min(shares):.2f} to {max(shares):.2f}")
        assert f"| {rate} | {' | '.join(cells)} |" in text
        # A pass that whole epochs fill has no straddling one: within it, no two epochs share a member.
        if rate in {0.2, 0.5}:
            assert not any((draws[0] & draws[epoch]).any() for epoch in range(1, round(1 / rate)))


def test_a_signal_ends_a_long_draw(make_pool, monkeypatch, watched):
    """Compiled code runs in pieces; between two of them a signal is answered."""
    pool = make_pool([40_000] * 4)
    stream = Stream(pool.sizes, constant(np.full(4, 39_000 * UNITS)), seed=1)
    slots = stream.first_slots(pool.labels, pool.ranks)
    expected = stream.advance_slots(pool.labels, slots, 0, 40)

    def signalled(*_):
        if len(calls) == 2:  # as from another process, while compiled code runs
            threading.Timer(0, os.kill, (os.getpid(), signal.SIGUSR1)).start()

    class StoppedError(Exception):
        """The signal was answered."""

    def stop(*_):
        raise StoppedError

    monkeypatch.setattr(module, "STEPS", 1 << 16)
    before = signal.signal(signal.SIGUSR1, stop)
    try:
        with watched(module, "advance_slots", signalled) as calls, pytest.raises(StoppedError):
            stream.advance_slots(pool.labels, slots, 0, 40)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert 2 <= len(calls) < sum(pool.sizes) / max(len(labels) for labels, *_ in calls)
    np.testing.assert_array_equal(stream.advance_slots(pool.labels, slots, 0, 40), expected)


def test_no_piece_of_a_draw_takes_more_steps_than_allowed(make_pool, monkeypatch, watched):
    pool = make_pool([5000, 3, 900])
    stream = Stream(pool.sizes, constant(np.array([4000, 2, 850]) * UNITS), seed=1)
    monkeypatch.setattr(module, "STEPS", 1000)
    with watched(module, "advance_slots") as calls:
        stream.copies(12, pool.labels, pool.ranks)
    sizes = [len(labels) * int(np.diff(offsets).max()) for labels, _, offsets, *_ in calls]
    assert len(sizes) > 10
    assert max(sizes) <= 1000
