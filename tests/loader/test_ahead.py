"""What is asked of a remote store ahead of the reads: whole blocks of the order, each once, within a bound; else some batches."""

from collections import Counter

import numpy as np
import pytest

from tailwise.loader.dataset import WANTED_BATCHES
from tailwise.loader.loader import Loader
from tailwise.shards.ranges import LocalShards

OPTIONS = {"batch_size": 16, "lanes": 8, "block": 20}


class Asked(LocalShards):
    """Reads as ever, and notes what it is asked for and what is read, in turn."""

    remote = True

    def __init__(self, paths):
        super().__init__(paths)
        self.wanted, self.read_ranges = [], []

    def want(self, ranges):
        self.wanted += map(tuple, ranges.tolist())

    def read_many(self, ranges):
        self.read_ranges += map(tuple, ranges.tolist())
        return super().read_many(ranges)


@pytest.fixture
def make_asking(open_plan):
    """`make_asking(name, ahead_bytes=…, **options)` → a Loader whose store notes what it is asked for, and that store."""
    made = []

    def make(name, ahead_bytes=10**9, **options):
        loader = Loader(open_plan(name), **{**OPTIONS, **options})
        store = Asked(loader._dataset.store.paths)
        loader._dataset.store, loader._dataset.ahead_bytes = store, ahead_bytes
        made.append(loader)
        return loader, store

    yield make
    for loader in made:
        loader.close()


def read(loader, count):
    batches = iter(loader)
    for _ in range(count):
        next(batches)


def ranges_of(loader, rows):
    return Counter(map(tuple, loader._dataset._ranges(np.asarray(rows)).tolist()))


def blocks_until(order, last):
    """The blocks from the first one up to `last`."""
    blocks = [order.block_at(0)]
    while blocks[-1] != last:
        blocks.append(order.block_after(blocks[-1]))
    return blocks


def block_ranges(loader, block):
    dataset = loader._dataset
    return ranges_of(loader, loader.order.block_rows(block, dataset.rank, dataset.world_size))


def size_of(ranges):
    return sum((stop - start) * count for (_, start, stop), count in Counter(ranges).items())


# --- blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "batch_size"), [("all", 16), ("stream", 8), ("often", 24), ("few", 8), ("rates", 16)])
def test_blocks_follow_each_other_and_hold_all(open_plan, make_order, name, batch_size):
    order = make_order(open_plan(name), batch_size, lanes=8, block=10)
    found = {}
    starts = [0]
    block = order.block_at(0)
    while block[0] < 12:
        rows = order.block_rows(block)
        assert len(rows) > 0
        assert len(rows) % 8 == 0
        assert abs(order.block_size(block) - len(rows)) <= 8
        assert len(rows) // 8 <= 10
        parts = np.concatenate([order.block_rows(block, part, 4) for part in range(4)])
        assert np.array_equal(parts, rows)
        found.setdefault(block[0], []).append((block[1], rows))
        starts.append(starts[-1] + len(rows) // 8)
        block = order.block_after(block)
    for number in range(12):
        section = order.sections[number]
        inside = found.get(number, [])
        assert [place for place, _ in inside] == list(range(len(inside)))
        whole = order.sections.samples(section, np.arange(section.length * 8)).rows
        assert Counter(np.concatenate([rows for _, rows in inside]).tolist() if inside else []) == Counter(
            whole.tolist()
        )
    places = [(number, place) for number, inside in sorted(found.items()) for place, _ in inside]
    for batch in range(starts[-1] // order.per_lane):
        assert order.block_at(batch) == places[np.searchsorted(starts, batch * order.per_lane, side="right") - 1]


# --- asking ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 2), (3, 4)])
def test_this_block_and_the_next_are_asked_for_each_once(make_asking, rank, ranks):
    loader, store = make_asking("all", batch_size=16 // ranks, rank=rank, world_size=ranks)
    order = loader.order
    for number in range(100):  # into the second epoch
        before = len(store.read_ranges)
        read(loader, 1)
        asked = Counter()
        for block in blocks_until(order, order.block_after(order.block_at(number))):
            asked += block_ranges(loader, block)
        assert Counter(store.wanted) == asked
        if number < 50:  # round the border, rows change places with near ones
            assert set(store.read_ranges[before:]) <= set(asked)
    assert order.block_at(99)[0] == 1


@pytest.mark.parametrize("workers", [0, 3])
def test_reading_in_threads_asks_for_the_same(make_asking, workers):
    loader, store = make_asking("all", workers=workers, prefetch=1)
    read(loader, 40)
    loader._batches = None  # ends the threads
    order = loader.order
    last = order.block_after(order.block_at(len(store.read_ranges) // 16 - 1))
    assert Counter(store.wanted) == sum((block_ranges(loader, block) for block in blocks_until(order, last)), Counter())


def test_all_but_one_worker_leave_the_asking_to_it(make_asking):
    loader, store = make_asking("all")
    assert loader._dataset._want_blocks(0, False)
    assert loader._dataset._want_blocks(30, False)
    assert store.wanted == []


def test_what_was_asked_for_and_not_read_stays_within_the_bound(make_asking):
    loader, store = make_asking("all")
    blocks = blocks_until(loader.order, (2, 0))
    bound = max(size_of(block_ranges(loader, block)) for block in blocks)
    loader._dataset.ahead_bytes = bound  # which the largest one just keeps
    for _ in range(120):
        read(loader, 1)
        ahead = size_of(store.wanted) - size_of(store.read_ranges)
        assert ahead <= 2 * bound
    blocks = blocks_until(loader.order, loader.order.block_after(loader.order.block_at(119)))
    assert Counter(store.wanted) == sum((block_ranges(loader, block) for block in blocks), Counter())


def test_blocks_that_are_too_large_are_not_asked_for(make_asking, watched):
    """Some batches are, each once; and that a block is too large is found once, not for every batch."""
    loader, store = make_asking("all", ahead_bytes=100)
    order = loader.order
    with watched(order, "block_rows") as calls:
        for count in range(1, 80):
            read(loader, 1)
            expected = Counter()
            for number in range(1, count + WANTED_BATCHES):
                expected += ranges_of(loader, order.batch(number).rows)
            assert Counter(store.wanted) == expected
    assert [block for block, *_ in calls] == blocks_until(order, order.block_at(78))


def test_compositions_that_mix_blocks_ask_for_batches(make_asking):
    loader, store = make_asking("all", compose="spread")
    read(loader, 1)
    expected = sum((ranges_of(loader, loader.order.batch(number).rows) for number in range(1, 5)), Counter())
    assert Counter(store.wanted) == expected


@pytest.mark.parametrize("ahead_bytes", [10**9, 100], ids=["blocks", "batches"])
@pytest.mark.parametrize("place", [0, 10])
def test_going_back_asks_anew(make_asking, ahead_bytes, place):
    """What was fetched then may have gone from the cache."""
    loader, store = make_asking("all", ahead_bytes=ahead_bytes)
    read(loader, 50)
    store.wanted.clear()
    loader.seek(place)
    read(loader, 1)
    fresh, other = make_asking("all", ahead_bytes=ahead_bytes)
    fresh.seek(place)
    read(fresh, 1)
    assert store.wanted == other.wanted != []
