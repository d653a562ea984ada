import json
import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.errors import UserError
from tailwise.kernels.compose import pick_covering, pick_richest
from tailwise.loader import order as order_module
from tailwise.loader.order import MOST_LANES, SUPER_BATCH, choose_lanes
from tailwise.requests import ConceptsRequest, PlanRequest
from tailwise.steps.grouping.concepts import make_concepts
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan

PLANS = ("stream", "dbp", "static", "ranked", "bernoulli", "often", "all", "rates")


@pytest.fixture
def short_spans(monkeypatch):
    """Spans of a few hundred samples, so that small pools have many of them, settled and plain."""
    monkeypatch.setattr(order_module, "SPAN_SAMPLES", 300)
    monkeypatch.setattr(order_module, "GREATEST_SPAN_SAMPLES", 900)


def read(order, batches, part=0, parts=1):
    """Rows and epochs of the first batches: [batches, samples] each."""
    read = [order.batch(number, part, parts) for number in range(batches)]
    return np.stack([batch.rows for batch in read]), np.stack([batch.epochs for batch in read])


def epochs_read(rows, epochs):
    """{epoch: {row: copies}} of what was read."""
    return {epoch: Counter(rows[epochs == epoch].tolist()) for epoch in np.unique(epochs).tolist()}


def crowded(rows, window):
    """How many samples of a sequence have the row of one of the `window − 1` before."""
    last, count = {}, 0
    for at, row in enumerate(rows.ravel().tolist()):
        count += at - last.get(row, -window) < window
        last[row] = at
    return count


def check_epochs(plan, order, drawn, first_epoch, epochs):
    """Each epoch is read as it is drawn, if one reads on until the last span that may hold its samples has ended."""
    totals = [sum(drawn(plan, epoch).values()) for epoch in range(first_epoch, first_epoch + epochs)]
    window = order.options.batch_size * order.options.accumulation
    most = sum(totals) + 20 * window + 2 * max(totals) + order.options.lanes
    found = epochs_read(*read(order, -(-most // order.options.batch_size)))
    assert min(found) == first_epoch
    for epoch in range(first_epoch, first_epoch + epochs):
        assert found[epoch] == drawn(plan, epoch)


# --- what an epoch holds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("short", [False, True])
def test_each_epoch_holds_what_the_plan_draws(open_plan, make_order, drawn, name, short, request):
    if short:
        request.getfixturevalue("short_spans")
    plan = open_plan(name)
    check_epochs(plan, make_order(plan, 16, lanes=8, block=20), drawn, 0, 3)


@pytest.mark.parametrize(("lanes", "block"), [(1, 1), (1, 4096), (64, 1), (64, 7), (16, 4096)])
def test_lanes_and_blocks_change_nothing_of_it(open_plan, make_order, drawn, lanes, block):
    for name in ("stream", "often"):
        plan = open_plan(name)
        check_epochs(plan, make_order(plan, 64, lanes=lanes, block=block), drawn, 0, 2)


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(PLANS),
    lanes=st.sampled_from([1, 2, 3, 8, 32]),
    per_lane=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    block=st.integers(1, 200),
    seed=st.integers(-5, 10**6),
    first_epoch=st.integers(0, 4),
    compose=st.sampled_from(["shuffle", "spread"]),
)
def test_nor_do_other_options(
    open_plan, make_order, drawn, name, lanes, per_lane, accumulation, block, seed, first_epoch, compose
):
    plan = open_plan(name)
    options = {"accumulation": accumulation, "block": block, "seed": seed, "first_epoch": first_epoch}
    compose = "shuffle" if plan.by_rate else compose
    order = make_order(plan, lanes * per_lane, lanes=lanes, compose=compose, **options)
    check_epochs(plan, order, drawn, first_epoch, 2)


@pytest.mark.parametrize("compose", ["shuffle", "spread"])
def test_epochs_of_fewer_samples_than_lanes(open_plan, make_order, drawn, compose):
    plan = open_plan("few")
    order = make_order(plan, 8, lanes=8, compose=compose)
    check_epochs(plan, order, drawn, 0, 12)
    rows, epochs = read(order, 30)
    assert (np.bincount(epochs.ravel())[:20] == 5).all()
    assert crowded(rows, 8) == 0


def test_a_pool_smaller_than_a_batch(tmp_path, make_pool, make_order, drawn):
    make_pool(tmp_path / "pool", [3, 4])
    catalog = import_pool([str(tmp_path / "pool")], tmp_path / "catalog", workers=1).catalog
    plan = make_plan(catalog, "all", PlanRequest("random", keep=1.0))
    order = make_order(plan, 32, lanes=4)
    check_epochs(plan, order, drawn, 0, 5)
    for row in range(7):
        assert abs((read(order, 7)[0] == row).sum() - 32) <= 2  # 7 batches of 32 are 32 epochs


def test_nearly_in_the_order_of_epochs_and_the_rest_of_each_is_carried_on(open_plan, make_order):
    """500 samples an epoch are 62 in each of 8 lanes, and 4 are carried on, to the beginning of the next."""
    order = make_order(open_plan("stream"), 8, lanes=8)
    _, epochs = read(order, 400)
    flat = epochs.ravel()
    assert [order.batches_until(epoch) for epoch in range(5)] == [0, 62, 125, 187, 250]
    assert [order.epoch_at(batch) for batch in (0, 61, 62, 124, 125, 187)] == [0, 0, 1, 1, 2, 3]
    places = [np.flatnonzero(flat == epoch) for epoch in range(4)]
    assert all(len(place) == 500 for place in places)
    for epoch, place in enumerate(places):
        # Samples that change places to keep rows apart may cross an epoch's end; most don't.
        assert np.median(np.abs(place - (500 * epoch + 250))) < 150
        assert (place // 500 == epoch).mean() > 0.9
    assert (flat[496:1000] == 0).any()  # the carried ones


def test_an_order_may_begin_with_any_epoch(open_plan, make_order, drawn):
    plan = open_plan("dbp")
    order = make_order(plan, 16, lanes=8, first_epoch=7)
    check_epochs(plan, order, drawn, 7, 2)
    assert order.batches_until(7) == 0
    assert order.batches_until(8) == 25
    assert order.epoch_at(0) == 7


# --- how it is shared ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compose", ["shuffle", "spread", "diverse"])
@pytest.mark.parametrize("name", ["stream", "often"])
def test_ranks_share_one_sequence(open_plan, make_order, name, compose, short_spans):
    options = {"lanes": 8, "accumulation": 2, "block": 30, "compose": compose}
    whole_rows, whole_epochs = read(make_order(open_plan(name), 16, **options), 60)
    for parts in (2, 8):
        orders = [make_order(open_plan(name), 16, **options) for _ in range(parts)]
        mine = [read(order, 60, part, parts) for part, order in enumerate(orders)]
        assert np.array_equal(np.concatenate([rows for rows, _ in mine], axis=1), whole_rows)
        assert np.array_equal(np.concatenate([epochs for _, epochs in mine], axis=1), whole_epochs)


@pytest.mark.parametrize("compose", ["shuffle", "spread", "diverse"])
@pytest.mark.parametrize("name", ["stream", "often"])
def test_any_batch_can_be_asked_for_first(open_plan, make_order, name, compose, short_spans):
    options = {"lanes": 8, "block": 30, "compose": compose}
    rows, epochs = read(make_order(open_plan(name), 16, **options), 100)
    at_random = make_order(open_plan(name), 16, **options)
    for number in np.random.default_rng(0).permutation(100).tolist():
        batch = at_random.batch(number)
        assert np.array_equal(batch.rows, rows[number])
        assert np.array_equal(batch.epochs, epochs[number])
    for number in (99, 57, 1):
        fresh = make_order(open_plan(name), 16, **options)
        assert np.array_equal(fresh.batch(number, 1, 2).rows, rows[number, 8:])


def test_ranks_read_from_lanes_of_their_own(open_plan, make_order):
    """A rank's samples of an epoch come from a contiguous run of units: so a node reads few tars at a time."""
    plan = open_plan("all")
    order = make_order(plan, 16, lanes=8)
    shards = [
        set((np.searchsorted(plan.shard_offsets, read(order, 62, part, 4)[0].ravel(), "right") - 1).tolist())
        for part in range(4)
    ]
    assert sum(len(own) for own in shards) <= 24 + 2 * 4  # 24 shards, of which those at the borders are shared


# --- equal rows apart ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize(
    ("name", "window"),
    [
        ("stream", 96),
        ("dbp", 64),
        ("static", 256),
        ("ranked", 320),
        ("bernoulli", 96),
        ("all", 512),
        ("often", 96),
        ("rates", 16),
    ],
)
def test_no_row_comes_twice_in_a_window(open_plan, make_order, name, window, short, request):
    """Any `window` samples in a row, over the borders of batches, spans and epochs."""
    if short:
        request.getfixturevalue("short_spans")
    plan = open_plan(name)
    for accumulation in (1, 2):
        order = make_order(plan, window // accumulation, lanes=8, accumulation=accumulation, block=25)
        rows, epochs = read(order, 12_000 // order.options.batch_size)
        assert len(np.unique(epochs)) > 4
        assert crowded(rows, window) == 0


@pytest.mark.parametrize("name", ["all", "stream", "dbp"])
@pytest.mark.parametrize("per_lane", [1, 4, 5])
def test_nor_where_settled_spans_meet_plain_ones(open_plan, make_order, name, per_lane, short_spans):
    """Several spans an epoch, whose ends fall on batches' ends or don't, with and without carried rows."""
    order = make_order(open_plan(name), 8 * per_lane, lanes=8, block=10)
    rows, _ = read(order, 30_000 // order.options.batch_size)
    assert crowded(rows, order.options.batch_size) == 0


@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize("block", [1, 500])
def test_nor_with_other_lanes_and_blocks(open_plan, make_order, lanes, block):
    for name in ("stream", "often"):
        rows, _ = read(make_order(open_plan(name), 64, lanes=lanes, block=block), 150)
        assert crowded(rows, 64) == 0


def test_plain_spans_beside_carried_rows(tmp_path, make_pool, make_order, monkeypatch):
    """With more lanes than samples in a block, carried rows stand far from the beginning of their epoch."""
    monkeypatch.setattr(order_module, "SPAN_SAMPLES", 256)
    make_pool(tmp_path / "pool", [1100] * 2)
    catalog = import_pool([str(tmp_path / "pool")], tmp_path / "catalog", workers=1).catalog
    plan = make_plan(catalog, "all", PlanRequest("random", budget=2047, seed=1))
    for seed in range(8):
        rows, _ = read(make_order(plan, 32, lanes=32, block=1, seed=seed), 300)
        assert crowded(rows, 32) == 0


# --- compositions --------------------------------------------------------------------------------------------------------


def whole_batches(epochs):
    """Those that lie wholly in one epoch."""
    return np.flatnonzero((epochs == epochs[:, :1]).all(axis=1))


@pytest.mark.parametrize(
    ("name", "most_over"), [("all", 0), ("static", 0), ("ranked", 0), ("stream", 0), ("dbp", 1), ("often", 1)]
)
@pytest.mark.parametrize("batch_size", [8, 40])
def test_spread_gives_no_batch_more_of_a_cluster_than_its_share(
    open_plan, make_order, drawn, name, most_over, batch_size
):
    plan = open_plan(name)
    rows, epochs = read(make_order(plan, batch_size, lanes=8, compose="spread", block=60), 3000 // batch_size)
    batches = whole_batches(epochs)
    assert len(batches) > 10
    groups = plan.groups[:]
    for number in batches.tolist():
        counts = np.bincount(groups[rows[number]], minlength=len(plan.sizes))
        epoch = drawn(plan, int(epochs[number, 0]))
        of_epoch = np.bincount(groups[list(epoch)], list(epoch.values()), minlength=len(plan.sizes))
        most = np.ceil(of_epoch * batch_size / of_epoch.sum()) + most_over
        assert (counts <= most).all()
    assert crowded(rows, batch_size) == 0


def test_spread_is_another_order_of_the_same(open_plan, make_order):
    options = {"lanes": 8, "block": 30}
    shuffled, spread = (
        epochs_read(*read(make_order(open_plan("all"), 40, compose=compose, **options), 50))
        for compose in ("shuffle", "spread")
    )
    assert shuffled == spread
    first, second = (make_order(open_plan("all"), 40, compose=compose, **options) for compose in ("shuffle", "spread"))
    assert not np.array_equal(first.batch(0).rows, second.batch(0).rows)


def super_batch(order, number):
    """What a batch is picked from: rows and epochs, int [5 · batch size]."""
    span = order._span_of(number)
    settled = order._settled(span)
    return settled.rows[number - order._bounds[span]], settled.epochs[number - order._bounds[span]]


@pytest.mark.parametrize("name", ["all", "dbp", "often"])
def test_diverse_picks_batches_of_more_clusters(open_plan, make_order, name):
    plan = open_plan(name)
    groups = plan.groups[:]
    size = 8
    order = make_order(plan, size, lanes=8, compose="diverse", accumulation=2)
    rows, epochs = read(order, 150)
    supers = [super_batch(order, number) for number in range(150)]
    base_rows, base_epochs = (np.stack(column) for column in zip(*supers, strict=True))
    assert base_rows.shape == (150, SUPER_BATCH * size)
    more = 0
    for number in range(150):
        chosen = Counter(zip(rows[number].tolist(), epochs[number].tolist(), strict=True))
        there = Counter(zip(base_rows[number].tolist(), base_epochs[number].tolist(), strict=True))
        assert chosen <= there
        assert len(set(rows[number].tolist())) == size
        covered, fifth = (len(set(groups[some].tolist())) for some in (rows[number], base_rows[number][:size]))
        assert covered == min(size, len(set(groups[base_rows[number]].tolist())))
        assert covered >= fifth
        more += covered > fifth
    assert more > 100
    assert crowded(rows, 2 * size) == 0


def test_diverse_in_a_pool_of_fewer_rows_than_a_super_batch(order_pool, make_order):
    plan = make_plan(order_pool, "six", PlanRequest("random", budget=6, dynamic=False))
    rows, _ = read(make_order(plan, 4, lanes=4, compose="diverse"), 30)
    assert len(np.unique(rows)) == 6
    assert all(len(set(batch.tolist())) == 4 for batch in rows)


def test_plans_by_rate_cannot_be_composed_by_clusters(open_plan, make_order):
    for compose in ("spread", "diverse"):
        with pytest.raises(UserError, match=f"carries rates, not clusters: it can't be composed by '{compose}'"):
            make_order(open_plan("rates"), 8, lanes=8, compose=compose)


# --- lists of concepts --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def lists(order_pool, tmp_path_factory):
    """Lists of concepts "tags" of `order_pool`, and the list of each row: skewed, some empty."""
    generator = np.random.default_rng(5)
    lists = [set(np.minimum(generator.geometric(0.15, generator.integers(0, 6)), 40).tolist()) for _ in range(1000)]
    keys = [key for part in order_pool.parts() for key in order_pool.samples(part, ["key"]).column(0).to_pylist()]
    path = tmp_path_factory.mktemp("tags") / "tags.jsonl"
    rows = (
        json.dumps({"key": key, "tags": [f"c{tag:02d}" for tag in each]}) for key, each in zip(keys, lists, strict=True)
    )
    path.write_text("\n".join(rows))
    make_concepts(order_pool, [path], ConceptsRequest(name="tags"))
    return lists


@pytest.mark.parametrize("name", ["all", "stream", "often", "rates"])
@pytest.mark.parametrize("compose", ["diverse:tags", "most-concepts:tags"])
def test_batches_are_picked_by_concepts(open_plan, make_order, lists, name, compose):
    order = make_order(open_plan(name), 16, lanes=8, compose=compose)
    for number in (0, 1, 7, 30):
        base, _ = super_batch(order, number)
        _, firsts = np.unique(base, return_index=True)
        there = base[np.sort(firsts)] if len(firsts) >= 16 else base
        mine = [sorted(lists[row]) for row in there.tolist()]
        counts = np.array(list(map(len, mine)), np.int32)
        pick = pick_covering if compose.startswith("diverse") else pick_richest
        expected = there[pick(counts, np.array([tag for each in mine for tag in each], np.int32), 16)]
        assert order.batch(number).rows.tolist() == expected.tolist()
        assert len({*expected.tolist()}) == min(16, len(firsts))


@pytest.mark.parametrize("compose", ["diverse:tags", "most-concepts:tags"])
def test_ranks_share_batches_of_concepts(open_plan, make_order, lists, compose):
    whole = make_order(open_plan("stream"), 24, lanes=8, compose=compose)
    for number in (19, 3):
        for parts in (1, 2, 4, 8):
            fresh = pickle.loads(pickle.dumps(make_order(open_plan("stream"), 24, lanes=8, compose=compose)))
            pieces = [fresh.batch(number, part, parts).rows for part in range(parts)]
            assert np.concatenate(pieces).tolist() == whole.batch(number).rows.tolist()


def test_richest_batches_have_more_concepts_and_diverse_ones_more_different_ones(open_plan, make_order, lists):
    orders = {compose: make_order(open_plan("all"), 16, lanes=8, compose=compose) for compose in COMPOSED}
    several, different = {}, {}
    for compose, order in orders.items():
        rows = read(order, 12)[0].tolist()
        several[compose] = np.mean([len(lists[row]) for batch in rows for row in batch])
        different[compose] = np.mean([len(set().union(*(lists[row] for row in batch))) for batch in rows])
    assert several["most-concepts:tags"] > several["shuffle"] + 1
    assert different["diverse:tags"] > different["shuffle"] + 3


COMPOSED = ("shuffle", "diverse:tags", "most-concepts:tags")


def test_the_identity_holds_the_lists(open_plan, make_order, lists):
    orders = [make_order(open_plan("all"), 16, lanes=8, compose=compose) for compose in (*COMPOSED, "diverse")]
    assert len({order.identity for order in orders}) == 4


# --- how well it is shuffled ---------------------------------------------------------------------------------------------


def mean_distance(classes, batch_size):
    """Mean over batches of the total variation distance between a batch's classes and the pool's."""
    shares = np.bincount(classes) / len(classes)
    batches = classes[: len(classes) // batch_size * batch_size].reshape(-1, batch_size)
    counts = np.stack([np.bincount(batch, minlength=len(shares)) for batch in batches])
    return np.abs(counts / batch_size - shares).sum(axis=1).mean() / 2


def test_shards_sorted_by_class_are_shuffled_as_if_they_were_not(tmp_path, make_pool, make_order):
    """64 shards of 90 samples, each of one of 16 classes; a perfect shuffle's mean is taken over 20 of them."""
    make_pool(tmp_path / "pool", [90] * 64)
    catalog = import_pool([str(tmp_path / "pool")], tmp_path / "catalog", workers=1).catalog
    plan = make_plan(catalog, "all", PlanRequest("random", keep=1.0))
    classes = np.arange(64 * 90) // (4 * 90)
    order = make_order(plan, 64, lanes=64)
    found = np.mean(
        [mean_distance(classes[read(order, 270)[0].ravel()][part * 5760 :][:5760], 64) for part in range(3)]
    )
    generator = np.random.default_rng(0)
    perfect = np.mean([mean_distance(generator.permutation(classes), 64) for _ in range(20)])
    assert found < 1.05 * perfect
    unshuffled = mean_distance(classes, 64)
    assert unshuffled > 3 * perfect  # the measure sees what it should


def test_seeds_and_epochs_give_other_orders(open_plan, make_order):
    plan = open_plan("static")
    rows, epochs = read(make_order(plan, 8, lanes=8), 150)
    first, second = (rows.ravel()[epochs.ravel() == epoch] for epoch in (0, 1))
    assert (first[:400] == second[:400]).mean() < 0.05
    other, _ = read(make_order(plan, 8, lanes=8, seed=1), 150)
    assert (rows == other).mean() < 0.05
    neighbours = {tuple(sorted(pair)) for pair in pairwise(first.tolist())}
    again = {tuple(sorted(pair)) for pair in pairwise(second.tolist())}
    assert len(neighbours & again) < 0.05 * len(neighbours)


# --- identity ------------------------------------------------------------------------------------------------------------

GOLDEN = {
    "shuffle": [361, 602, 365, 393, 953, 978, 528, 987, 245, 95, 118, 300, 776, 804, 775, 688],
    "spread": [939, 977, 568, 697, 574, 505, 27, 825, 229, 251, 456, 680, 777, 658, 754, 650],
    "diverse": [985, 298, 335, 649, 753, 433, 943, 974, 650, 928, 659, 664, 398, 306, 411, 432],
}


@pytest.mark.parametrize("compose", ["shuffle", "spread", "diverse"])
def test_the_order_is_the_same_in_every_release(open_plan, make_order, compose):
    """Whoever must change these values raises the order's FORMAT too, so that states of the old order are refused."""
    order = make_order(open_plan("often"), 16, lanes=4, block=50, seed=5, compose=compose)
    assert order_module.FORMAT == 1
    assert order.batch(99).rows.tolist() == GOLDEN[compose]


def test_the_identity_changes_with_whatever_changes_the_order(open_plan, make_order):
    changes = [
        {},
        {"seed": 1},
        {"lanes": 4},
        {"block": 5},
        {"compose": "spread"},
        {"accumulation": 2},
        {"first_epoch": 1},
    ]
    orders = [make_order(open_plan("all"), 16, **{"lanes": 8, "block": 9, **change}) for change in changes]
    orders += [
        make_order(open_plan("all"), 24, lanes=8, block=9),
        make_order(open_plan("stream"), 16, lanes=8, block=9),
    ]
    assert len({order.identity for order in orders}) == len(orders)
    assert make_order(open_plan("all"), 16, lanes=8, block=9).identity == orders[0].identity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` 0: must be at least 1"),
        ({"lanes": 0}, "`lanes` 0: must be at least 1"),
        ({"block": 0}, "`block` 0: must be at least 1"),
        ({"accumulation": 0}, "`accumulation` 0: must be at least 1"),
        ({"first_epoch": -1}, "`first_epoch` -1: must be at least 0"),
        ({"batch_size": 60}, r"64 lanes: must divide the global batch of 60 samples; leave lanes out, or give 60"),
        (
            {"batch_size": 7, "lanes": 2},
            r"2 lanes: must divide the global batch of 7 samples; leave lanes out, or give 7",
        ),
        ({"compose": "clustered"}, "composition 'clustered': must be one of shuffle, spread, diverse, most-concepts"),
        ({"compose": "spread:tags"}, "composition 'spread:tags': spread takes no concepts; leave out ':tags'"),
        ({"compose": "most-concepts"}, "composition 'most-concepts': name the concepts, such as most-concepts:tags"),
        ({"compose": "diverse:"}, "composition 'diverse:': name the concepts, such as diverse:tags"),
        ({"compose": "diverse:absent"}, "no concepts named 'absent'"),
    ],
)
def test_options_out_of_bounds_are_refused(open_plan, make_order, options, message):
    with pytest.raises(UserError, match=message):
        make_order(open_plan("all"), **{"batch_size": 64, **options})


def test_a_plan_that_draws_nothing_is_told(order_pool, make_rates_plan, make_order, monkeypatch):
    from tailwise.loader import sections

    monkeypatch.setattr(sections, "EMPTY_EPOCHS", 20)
    plan = make_rates_plan(order_pool, "nothing", np.full(1000, 1e-12))
    with pytest.raises(UserError, match="plan 'nothing' drew nothing in 20 epochs"):
        make_order(plan, 8, lanes=8).batch(0)


# --- lanes --------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(share=st.integers(1, 4000), ranks=st.integers(1, 128))
def test_lanes_fit_batch_and_ranks(share, ranks):
    lanes = choose_lanes(share * ranks, ranks)
    assert share * ranks % lanes == 0
    assert lanes % ranks == 0
    assert lanes <= max(MOST_LANES, ranks)
    if share * ranks % 64 == 0 and 64 % ranks == 0:
        assert lanes == 64  # the default of before, which orders depend on


@pytest.mark.parametrize(
    ("batch", "ranks", "lanes"), [(4096, 8, 64), (28000, 8, 32), (28000, 1, 32), (96, 3, 48), (32, 1, 32)]
)
def test_lanes_are_powers_of_two_where_they_can_be(batch, ranks, lanes):
    assert choose_lanes(batch, ranks) == lanes


@pytest.mark.parametrize(
    ("name", "batch_size", "lanes", "block"), [("stream", 16, 8, 40), ("all", 21, 7, 100), ("dbp", 30, 6, 20)]
)
def test_how_one_epoch_follows_another(open_plan, make_order, name, batch_size, lanes, block):
    """As loader-order.md says: one batch holds both, and fewer samples than lanes come later, in the first lane's first block."""
    order = make_order(open_plan(name), batch_size, lanes=lanes, block=block)
    stop = order.batches_until(4)
    epochs = np.array([order.batch(number).epochs for number in range(stop)])
    late = []
    for epoch in range(3):
        border = order.batches_until(epoch + 1)  # the batch in which the epoch ends
        assert epochs[:border].max() == epoch
        assert set(epochs[border].tolist()) <= {epoch, epoch + 1}
        after, place = np.nonzero(epochs[border + 1 :] == epoch)
        late += after.tolist()
        assert len(after) < lanes
        assert after.max(initial=0) <= -(-block // order.per_lane)
        assert place.max(initial=0) < order.per_lane  # batches go lane after lane
    assert late  # such samples exist
