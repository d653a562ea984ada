import json

import numpy as np
import pyarrow as pa
import pytest

from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.drops import DROPPED_SCHEMA
from tailwise.catalog.files import file_digest, note_digest, read_record, write_array, write_record
from tailwise.errors import UserError
from tailwise.kernels import ranks
from tailwise.plan import METHODS, Plan
from tailwise.plan.methods import PICKS, register_method
from tailwise.plan.quotas import UNITS
from tailwise.requests import ClusterRequest, GroupRequest, PlanRequest, ScoreRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.drops import write_drops
from tailwise.steps.grouping.group import group as group_by
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.planning.weighted import quotas_of
from tailwise.steps.scoring.scores import score_parts


@pytest.fixture
def clustered(small_catalog):
    cluster(small_catalog, ClusterRequest(k=12, density="auto"))
    return small_catalog


def asked(method, **options):
    """A request, with a score that every pool has where the method goes by one."""
    by_score = PICKS[METHODS[method].pick].by == "score"
    return PlanRequest(method, score=ScoreRequest("image-bytes") if by_score else None, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [0.1, 0.277, 0.5, 1.0])
def test_every_method_meets_its_budget_within_its_bounds(clustered, method, keep):
    plan = make_plan(clustered, "p", asked(method, keep=keep))
    budget = round(keep * 600)
    assert plan.quotas.sum() == budget * UNITS
    assert ((plan.quotas >= 0) & (plan.quotas <= plan.sizes * UNITS)).all()
    for epoch in range(5):
        copies = plan.draw(epoch)
        assert copies.sum() == budget
        assert copies.max() == 1
        assert np.array_equal(np.bincount(plan.groups[:], copies, len(plan.sizes)), plan.counts(epoch))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_repeatable_to_the_byte(clustered, method, tree_bytes):
    make_plan(clustered, "a", asked(method, keep=0.3, seed=5))
    make_plan(clustered, "b", asked(method, keep=0.3, seed=5))
    assert tree_bytes(clustered.plan_folder("a")) == tree_bytes(clustered.plan_folder("b"))


@pytest.mark.parametrize("method", [name for name, item in METHODS.items() if item.dynamic])
def test_dynamic_methods_draw_anew_and_static_ones_do_not(clustered, method):
    dynamic = make_plan(clustered, "d", PlanRequest(method, keep=0.3))
    static = make_plan(clustered, "s", PlanRequest(method, keep=0.3, dynamic=False))
    assert not np.array_equal(dynamic.draw(0), dynamic.draw(1))
    assert np.array_equal(static.draw(0), static.draw(7))
    assert not (static.quotas % UNITS).any()  # whole samples


def test_seeds_differ(clustered):
    first, second = (make_plan(clustered, f"p{seed}", PlanRequest("random", keep=0.5, seed=seed)) for seed in (0, 1))
    assert not np.array_equal(first.draw(0), second.draw(0))


@pytest.mark.parametrize("method", ["dbp", "ssp"])
@pytest.mark.parametrize("pick", ["hardest", "easiest"])
def test_ranked_picks_take_the_members_farthest_from_or_nearest_to_the_centroid(clustered, method, pick):
    plan = make_plan(clustered, "p", PlanRequest(method, keep=0.4, pick=pick))
    similarity = np.concatenate(list(Clustering.open(clustered, "main").parts("similarity")))
    drawn = plan.draw(0).astype(bool)
    for group in range(len(plan.sizes)):
        inside = plan.groups[:] == group
        taken, left = similarity[inside & drawn], similarity[inside & ~drawn]
        assert len(taken) == plan.quotas[group] // UNITS
        if len(left):
            assert taken.max() <= left.min() if pick == "hardest" else taken.min() >= left.max()


def test_dynamics_shrinks_the_head_and_grows_the_tail(clustered):
    plan = make_plan(clustered, "p", PlanRequest("dynamics", keep=0.5))
    order = np.argsort(-plan.sizes)
    assert (np.diff(plan.cluster_rates()[order]) >= -1e-9).all()
    assert (np.diff(plan.quotas[order]) <= 1).all()
    assert plan.cluster_rates()[order[0]] < 0.5 < plan.cluster_rates()[order[-1]]


def test_repeats_are_capped(clustered):
    plan = make_plan(clustered, "p", PlanRequest("flat", keep=1.5, max_repeats=3))
    for epoch in range(4):
        copies = plan.draw(epoch)
        assert copies.sum() == 900
        assert copies.max() <= 3
    assert plan.cluster_rates().max() == pytest.approx(3)


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("draw", ["stream", "bernoulli"])
def test_truncated_rates_are_those_of_the_published_code(clustered, repeats, draw):
    """DynamiCS's script: counts ** α, in proportion, for the whole budget; its trainer then draws a sample once at most (R = 1)."""
    request = PlanRequest(
        "dynamics", keep=0.9 * repeats, alpha=0.0, max_repeats=repeats, draw=draw, above_one="truncate"
    )
    plan = make_plan(clustered, "p", request)
    theirs = np.minimum(0.9 * repeats * 600 / len(plan.sizes) / plan.sizes, repeats)
    np.testing.assert_allclose(plan.cluster_rates(), theirs, atol=1 / plan.sizes.min() / 2)
    assert (plan.cluster_rates() == repeats).any()
    drawn, exact = plan.quotas.sum() / UNITS, (theirs * plan.sizes).sum()
    assert drawn == round(exact) < round(0.9 * repeats * 600) == plan.config["budget"]
    if draw == "stream":
        assert [int(plan.draw(epoch).sum()) for epoch in (0, 3)] == [drawn, drawn]
    assert "above_one" not in make_plan(clustered, "q", PlanRequest("dynamics", keep=0.5, above_one="refill")).config


def test_truncated_rates_of_a_file_are_drawn_once_at_most(clustered, tmp_path):
    (tmp_path / "rates.json").write_text(json.dumps({f"{row:06d}": row % 3 / 2 + row % 2 for row in range(600)}))
    given, truncated = (
        make_plan(clustered, way, PlanRequest("rates", rates=tmp_path / "rates.json", above_one=way))
        for way in ("refill", "truncate")
    )
    assert given.rates[:].max() == 2
    assert np.array_equal(truncated.rates[:], np.minimum(given.rates[:], 1))


def test_a_truncated_draw_is_told_beside_what_was_asked_for(clustered, run_tailwise):
    command = ["plan", str(clustered.folder), "p", "--method", "flat", "--keep", "0.9", "--above-one", "truncate"]
    told = run_tailwise(*command).stdout
    drawn = int(Plan(clustered, "p").draw(0).sum())
    assert f"budget {drawn} of 600 samples ({drawn / 600:.1%} of the pool; 540 samples, 90.0%, were asked for; " in told
    assert "540 samples, 90.0%, were asked for" in run_tailwise("explain", str(clustered.folder), "p").stdout
    figures = json.loads(run_tailwise(*command, "--json").stdout)
    assert (figures["budget"], figures["budget_asked"]) == (drawn, 540)


def test_draws_of_any_rows_equal_the_whole_draw(clustered):
    rows = np.array([599, 3, 77, 3, 460])
    requests = [
        PlanRequest("dynamics", keep=0.5),
        PlanRequest("dynamics", keep=0.5, draw="bernoulli"),
        PlanRequest("dbp", keep=0.2),
    ]
    for number, request in enumerate(requests):
        plan = make_plan(clustered, f"p{number}", request)
        whole = plan.draw(3)
        assert np.array_equal(plan.draw(3, rows), whole[rows])
        assert np.array_equal(plan.draw(3, slice(100, 200)), whole[100:200])
        assert np.allclose(plan.rate(rows), plan.rate(slice(0, 600))[rows])


def test_part_borders_change_no_draw(_small_catalog_source, tmp_path):
    from tailwise.steps.importing.pool import import_pool

    draws = []
    for part_rows in (1, 400, 10**6):
        sources = [str(_small_catalog_source / name) for name in ("pool", "embeddings")]
        catalog = import_pool(sources, tmp_path / str(part_rows), workers=1, part_rows=part_rows).catalog
        cluster(catalog, ClusterRequest(k=40, points_per_centroid=10))
        plan = make_plan(catalog, "p", PlanRequest("dynamics", keep=0.5))
        plan.keep_slots(3)
        draws.append(np.stack([plan.draw(epoch) for epoch in range(5)]))
        (tmp_path / "rates.json").write_text(json.dumps({f"{row:06d}": row % 3 for row in range(600)}))
        for request in (
            PlanRequest("dbp", keep=0.3),
            PlanRequest("top-score", score="caption-characters", keep=0.3),
            PlanRequest("rates", rates=tmp_path / "rates.json"),
        ):
            plan = make_plan(catalog, request.method, request)
            draws[-1] = np.vstack([draws[-1], plan.draw(1), plan.draw(1, np.arange(600)[::-1])[::-1]])
    assert np.array_equal(draws[0], draws[1])
    assert np.array_equal(draws[0], draws[2])


@pytest.mark.parametrize("narrow", [0, 470])  # all files are wide; only those of later parts are
def test_ranks_of_64_bits_change_no_draw(clustered, monkeypatch, narrow):
    requests = [asked(method, keep=0.3, dynamic=True) for method in ("random", "proportional")]
    requests += [PlanRequest("top-score", score="caption-characters", keep=0.3)]
    draws = []
    for name, bound in (("narrow", ranks.NARROW), ("wide", narrow)):
        monkeypatch.setattr(ranks, "NARROW", bound)
        for number, request in enumerate(requests):
            plan = make_plan(clustered, f"{name}-{number}", request)
            draws.append([plan.draw(epoch) for epoch in (0, 3)])
            plan.keep_slots(4)
            plan = Plan(clustered, plan.name)
            draws[-1] += [plan.draw(4), plan.draw(5, np.arange(600)[::-1])]
    assert np.array_equal(draws[:3], draws[3:])
    folder = clustered.plan_folder("wide-0")
    found = [
        np.load(folder / f"{file}.npy").dtype.itemsize for file in ("rank", "rank-000001", "slots/before-000000004")
    ]
    assert found == [4 if narrow else 8, 8, 8]


def test_a_plan_of_one_file_for_all_parts_is_read(clustered):
    """As older versions wrote it."""
    plan = make_plan(clustered, "p", PlanRequest("dynamics", keep=0.5))
    expected = [plan.draw(epoch) for epoch in range(4)]
    columns = {"group": plan.groups[:], "rank": plan.ranks[:]}
    for name, values in columns.items():
        (plan.folder / f"{name}-000001.npy").unlink()
        write_array(plan.folder / f"{name}.npy", values)
    manifest = read_record(plan.folder / "manifest.json")
    files = {path.name: file_digest(path) for path in plan.folder.glob("*.*") if path.name != "manifest.json"}
    write_record(plan.folder / "manifest.json", {**manifest, "files": files})
    slots = plan.slots(2, slice(0, 600))
    path = plan.folder / "slots" / f"before-{2:09d}.npy"
    write_array(path, slots)
    note_digest(path)
    old = Plan(clustered, "p")
    rows = np.array([599, 3, 500, 0])
    for epoch in (2, 3):
        assert np.array_equal(old.draw(epoch), expected[epoch])
        assert np.array_equal(old.draw(epoch, rows), expected[epoch][rows])
    old.keep_slots(2)
    assert np.array_equal(np.load(path), slots[: clustered.parts()[0].rows])
    assert np.array_equal(Plan(clustered, "p").draw(3), expected[3])


def test_appended_shards_leave_an_old_plan_as_it_was(
    clustered, make_pool, make_vectors, make_embeddings, tmp_path, tree_bytes
):
    from tailwise.steps.importing.pool import import_pool

    plan = make_plan(clustered, "old", PlanRequest("dynamics", keep=0.5))
    before, files = plan.draw(4), tree_bytes(clustered.plan_folder("old"))
    pool = make_pool(tmp_path / "more", [50], first_shard=7)
    keys = [key for keys in pool.values() for key in keys]
    make_embeddings(tmp_path / "emb", make_vectors(keys, 16))
    import_pool([str(tmp_path / "more"), str(tmp_path / "emb")], clustered.folder, workers=1)
    assert clustered.snapshot().rows == 650
    again = Plan(clustered, "old")
    assert again.rows == 600
    assert np.array_equal(again.draw(4), before)
    assert tree_bytes(clustered.plan_folder("old")) == files
    # The old clustering still speaks of the old snapshot, and so does a new plan made from it.
    assert make_plan(clustered, "new", PlanRequest("flat", keep=0.5)).rows == 600
    with pytest.raises(UserError, match="`snapshot` 1 → 2"):
        cluster(clustered, ClusterRequest(k=12))
    cluster(clustered, ClusterRequest(k=12, name="second"))
    assert make_plan(clustered, "newest", PlanRequest("flat", keep=0.5, clustering="second")).rows == 650


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (PlanRequest("dbq", keep=0.5), "unknown method 'dbq': did you mean 'dbp'"),
        (PlanRequest("dynamics"), "either `keep` SHARE"),
        (PlanRequest("dynamics", keep=0.5, budget=3), "either `keep` SHARE"),
        (PlanRequest("dynamics", keep=0.0), "`keep` 0.0"),
        (PlanRequest("dynamics", keep=1.01), "at most 1"),
        (PlanRequest("dynamics", budget=601), "must lie between 1 and 600"),
        (PlanRequest("dynamics", budget=0), "must lie between 1 and 600"),
        (PlanRequest("dynamics", keep=0.5, max_repeats=256), "`max_repeats` 256"),
        (
            PlanRequest("dynamics", keep=0.5, temperature=0.1),
            "`temperature` does nothing with method 'dynamics'",
        ),
        (PlanRequest("dynamics", keep=0.5, alpha=1.5), "`alpha` 1.5"),
        (PlanRequest("dbp", keep=0.5, neighbours=0), "`neighbours` 0"),
        (PlanRequest("dynamics", per_cluster=3), "`per_cluster` does nothing with method 'dynamics': use cap or flat"),
        (PlanRequest("cap", keep=0.5, per_cluster=3), "or `per_cluster` SAMPLES"),
        (PlanRequest("cap", per_cluster=0), "`per_cluster` 0"),
        (PlanRequest("ssp", keep=0.5, class_balance=1.5), "`class_balance` 1.5"),
        (PlanRequest("random", keep=0.5, class_balance=0.5), "`class_balance` does nothing with method 'random'"),
        (PlanRequest("dynamics", keep=0.5, anneal_epochs=3), "`anneal_epochs` 3 does nothing without"),
        (PlanRequest("dynamics", keep=0.5, alpha_end=1.0), "`alpha_end` needs `anneal_epochs`"),
        (PlanRequest("dynamics", keep=0.5, alpha_end=2.0, anneal_epochs=2), "`alpha` 2.0"),
        (PlanRequest("flat", keep=0.5, alpha_end=1.0, anneal_epochs=2), "`alpha` does nothing"),
        (
            PlanRequest("dynamics", keep=0.5, dynamic=False, alpha_end=1.0, anneal_epochs=2),
            "a static plan can't be annealed",
        ),
        (
            PlanRequest("dynamics", keep=0.5, score=ScoreRequest("width")),
            "`score` width does nothing with `pick` random",
        ),
        (PlanRequest("top-score", keep=0.5), "text embeddings"),
        (PlanRequest("dynamics", keep=0.5, without=("dups",)), "no drop list named 'dups'"),
        (PlanRequest("dbp", keep=0.5, temperature=0.0), "`temperature` 0.0"),
        (PlanRequest("dbp", budget=11), "under the clusters' minimum of 12"),
        (PlanRequest("dbp", keep=0.5, dynamic=True), "`dynamic` with `pick` hardest"),
        (PlanRequest("dbp", keep=0.5, draw="bernoulli"), "`draw` bernoulli with `pick` hardest"),
        (PlanRequest("dbp", keep=0.5, max_repeats=2), "`max_repeats` 2 with `pick` hardest"),
        (PlanRequest("dynamics", keep=0.5, draw="dice"), "unknown draw 'dice'"),
        (PlanRequest("dynamics", keep=0.5, pick="best"), "unknown pick 'best'"),
        (PlanRequest("random", keep=0.5, pick="hardest"), "needs clusters"),
        (PlanRequest("random", keep=0.5, min_per_cluster=2), "`min_per_cluster` does nothing with method 'random'"),
        (PlanRequest("dynamics", budget=30, min_per_cluster=3), "under the clusters' minimum of 36"),
        (PlanRequest("dbp", keep=0.5, min_per_cluster=-1), "`min_per_cluster` -1"),
        (
            PlanRequest("dynamics", keep=0.5, above_one="truncat"),
            "unknown `above_one` 'truncat': did you mean 'truncate'",
        ),
        (PlanRequest("dbp", keep=0.5, above_one="truncate"), "`above_one` truncate does nothing with method 'dbp'"),
        (PlanRequest("cap", per_cluster=3, above_one="truncate"), "`per_cluster` is a bound itself; use refill"),
        (PlanRequest("random", keep=0.5, above_one="truncate"), "`above_one` does nothing with method 'random'"),
        (PlanRequest("flat", keep=0.5, clustering="fine"), r"no clustering named 'fine' \(there: main\)"),
    ],
)
def test_bad_requests_are_one_line_and_leave_nothing(clustered, request_, message):
    with pytest.raises(UserError, match=message) as caught:
        make_plan(clustered, "p", request_)
    assert "\n" not in str(caught.value)
    assert not clustered.plan_folder("p").exists()


def test_a_plan_of_another_snapshot_is_refused(clustered):
    make_plan(clustered, "p", PlanRequest("flat", keep=0.5))
    path = clustered.folder / "snapshots" / "000001.json"
    path.write_text(path.read_text().replace(clustered.snapshot().id, "0" * 32))
    with pytest.raises(UserError, match=r"000001\.json is damaged"):
        Plan(clustered, "p")


def test_the_plan_takes_at_most_8_bytes_a_sample(clustered):
    plan = make_plan(clustered, "p", PlanRequest("dynamics", keep=0.5))
    per_row = (plan.groups[:].nbytes + plan.ranks[:].nbytes) / plan.rows
    assert per_row == 8
    assert {path.name for path in plan.folder.iterdir()} == {
        "manifest.json",
        "groups.parquet",
        *("group.npy", "group-000001.npy"),
        *("rank.npy", "rank-000001.npy"),
        "shard_offsets.npy",
    }


@pytest.mark.parametrize("draw", ["stream", "bernoulli"])
def test_rows_are_sliced_like_any_sequence_and_checked(clustered, draw):
    plan = make_plan(clustered, "p", PlanRequest("dynamics", keep=0.5, draw=draw))
    whole = plan.draw(2)
    for rows in (slice(0, 10**6), slice(None), slice(-5, None), slice(3, 500, 7), slice(10, 3), slice(590, 601)):
        assert np.array_equal(plan.draw(2, rows), whole[rows])
        assert np.array_equal(plan.rate(rows), plan.rate(slice(0, 600))[rows])
    assert np.array_equal(plan.draw(2, [5, 1]), whole[[5, 1]])
    for rows, message in (([-1], r"rows -1 … -1"), ([600], r"\[0, 600\)"), ([0.5], "float64"), ([[1]], "1-D")):
        with pytest.raises(UserError, match=message):
            plan.draw(2, np.array(rows))


def test_processes_draw_their_own_rows(fork_python, clustered, tmp_path):
    plan = make_plan(clustered, "p", PlanRequest("dynamics", keep=0.5))
    script = (
        "import sys, numpy as np; from tailwise import Catalog, Plan; plan = Plan(Catalog.open(sys.argv[1]), 'p')\n"
        "first = int(sys.argv[2])\n"
        "rows = [plan.draw(epoch, slice(first, first + 200)) for epoch in (4, 0)]\n"
        "np.save(sys.argv[3], np.stack(rows))"
    )
    files = {first: tmp_path / f"{first}.npy" for first in (400, 0, 200)}
    processes = [
        fork_python(script, clustered.folder, first, path, out=tmp_path / "log") for first, path in files.items()
    ]
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    drawn = np.concatenate([np.load(files[first]) for first in (0, 200, 400)], axis=1)
    assert np.array_equal(drawn, np.stack([plan.draw(4), plan.draw(0)]))


def test_kept_slots_change_no_draw(clustered):
    plan = make_plan(clustered, "p", PlanRequest("dynamics", keep=0.5))
    expected = [plan.draw(epoch) for epoch in range(9)]
    for epoch, kept in (
        (3, [3]),
        (6, [3, 6]),
        (7, [6, 7]),
        (2, [2, 6, 7]),
    ):  # one earlier one stays, and all later ones
        plan.keep_slots(epoch)
        there = sorted(path.name for path in (plan.folder / "slots").iterdir())
        names = [f"before-{number:09d}{part}" for number in kept for part in ("-000001", "")]
        assert there == [f"{name}.{suffix}" for name in names for suffix in ("json", "npy")]
        for number in range(9):
            assert np.array_equal(Plan(clustered, "p").draw(number), expected[number])
    static = make_plan(clustered, "s", PlanRequest("dbp", keep=0.5))
    static.keep_slots(3)
    assert not (static.folder / "slots").exists()


@pytest.mark.parametrize(("sizes", "repeats"), [([67_372_040, 10, 3], 255), ([400_000_000], 22), ([8 * 10**9, 1], 255)])
def test_caps_beyond_64_bits_are_none(sizes, repeats):
    from tailwise.plan.methods import Clusters

    sizes = np.array(sizes)
    clusters = Clusters(sizes, np.zeros(len(sizes)), np.zeros(len(sizes)))
    config = {"budget": 10**6, "max_repeats": repeats, "min_per_cluster": 0, "class_balance": 0.0}
    quotas = quotas_of(clusters, METHODS["dynamics"], {"alpha": 0.2}, {**config, "dynamic": True, "draw": "stream"})
    assert quotas.sum() == 10**6 * UNITS
    assert (np.argsort(-quotas, kind="stable") == np.argsort(-sizes, kind="stable")).all()
    assert quotas[0] >= 9 * 10**5 * UNITS
    assert (quotas[1:] <= sizes[1:] * repeats * UNITS).all()


# --- annealing, bounds, picks by score, groupings, what is left out ----------------------------------------------------


@pytest.mark.parametrize("draw", ["stream", "bernoulli"])
def test_alpha_is_annealed(clustered, draw):
    request = PlanRequest("dynamics", keep=0.5, alpha=0.0, alpha_end=1.0, anneal_epochs=4, draw=draw)
    plan = make_plan(clustered, "annealed", request)
    for epoch in range(8):
        alpha = min(epoch, 4) / 4
        still = make_plan(clustered, f"still-{alpha}", PlanRequest("dynamics", keep=0.5, alpha=alpha, draw=draw))
        assert np.array_equal(plan.quotas_at(epoch), still.quotas)
        assert np.array_equal(plan.rate(slice(0, 600), epoch), still.rate(slice(0, 600)))
        copies = plan.draw(epoch)
        if draw == "stream":
            assert copies.sum() == 300
            counts = np.bincount(plan.groups[:], copies, len(plan.sizes))
            assert (np.abs(counts - plan.quotas_at(epoch) / UNITS) <= 1).all()
            assert np.array_equal(counts, plan.counts(epoch))
        else:
            assert np.array_equal(copies, still.draw(epoch))
    assert plan.reachable.all()


def test_slots_of_an_annealed_plan_are_kept_like_others(clustered):
    request = PlanRequest("dynamics", keep=0.7, alpha_end=1.0, anneal_epochs=3)
    plan = make_plan(clustered, "p", request)
    expected = [plan.draw(epoch) for epoch in range(7)]
    plan.keep_slots(4)
    assert all(np.array_equal(Plan(clustered, "p").draw(epoch), expected[epoch]) for epoch in (6, 5, 4, 2))


@pytest.mark.parametrize("method", ["ssp", "dbp", "dynamics"])
@pytest.mark.parametrize("balance", [0.5, 1.0])
def test_class_balance_raises_the_least_quota(clustered, method, balance):
    plan = make_plan(clustered, "p", PlanRequest(method, keep=0.3, class_balance=balance))
    least = np.minimum(int(balance * 180 / 12), plan.sizes)
    assert (plan.quotas >= least * UNITS).all()
    assert plan.quotas.sum() == 180 * UNITS


@pytest.mark.parametrize("method", ["cap", "flat"])
def test_the_budget_may_be_given_per_cluster(clustered, method):
    plan = make_plan(clustered, "p", PlanRequest(method, per_cluster=30))
    assert np.array_equal(plan.quotas, np.minimum(plan.sizes, 30) * UNITS)
    assert plan.dynamic == (method == "flat")


@pytest.mark.parametrize(("pick", "sign"), [("highest", -1), ("lowest", 1)])
@pytest.mark.parametrize("method", ["top-score", "ssp"])
def test_picks_by_score(clustered, method, pick, sign):
    plan = make_plan(clustered, "p", PlanRequest(method, keep=0.25, pick=pick, score=ScoreRequest("image-bytes")))
    scores = np.concatenate(list(score_parts(clustered, clustered.snapshot(), ScoreRequest("image-bytes"))))
    expected = np.zeros(600, bool)
    for group in range(len(plan.sizes)):
        members = np.flatnonzero(plan.groups[:] == group)
        ranked = members[np.argsort(sign * scores[members], kind="stable")]
        expected[ranked[: plan.quotas[group] // UNITS]] = True
    assert np.array_equal(plan.draw(0).astype(bool), expected)
    assert expected.sum() == 150


def drop(catalog, name, rows, without=()):
    config = {"snapshot": 1, "without": list(without)}
    nothing = {item.name: [None] * len(rows) for item in DROPPED_SCHEMA}
    table = {**nothing, "row": rows, "reason": ["test"] * len(rows)}
    with Artifact(catalog.drops_folder(name), "filter", config, {"snapshot": catalog.snapshot().id}) as artifact:
        dropped = write_drops(artifact, catalog.parts(), [pa.Table.from_pydict(table, schema=DROPPED_SCHEMA)])
        artifact.finish({"dropped": dropped})


@pytest.mark.parametrize("method", METHODS)
def test_what_drop_lists_drop_is_never_drawn(clustered, method):
    drop(clustered, "first", list(range(0, 600, 3)))
    drop(clustered, "second", list(range(1, 600, 6)), without=["first"])
    left = np.setdiff1d(np.arange(600), [*range(0, 600, 3), *range(1, 600, 6)])
    plan = make_plan(clustered, "p", asked(method, keep=0.5, without=("second",)))  # which brings the first along
    assert np.array_equal(np.flatnonzero(plan.draw(0)), left)
    half = make_plan(clustered, "half", asked(method, keep=0.25, without=("second",)))
    assert half.draw(3).sum() == round(0.5 * len(left)) == 150
    assert np.isin(np.flatnonzero(half.draw(3)), left).all()


def test_sizes_and_distances_are_those_of_what_is_left(clustered):
    """As if the clustering's labels had never held the dropped rows."""
    drop(clustered, "some", list(range(0, 600, 4)))
    plan = make_plan(clustered, "p", PlanRequest("dbp", keep=0.3, without=("some",)))
    label = np.concatenate(list(Clustering.open(clustered, "main").parts("label")))
    similarity = np.concatenate(list(Clustering.open(clustered, "main").parts("similarity"))).astype(float)
    kept = np.arange(600) % 4 != 0
    sizes = np.bincount(label[kept], minlength=12)
    assert np.array_equal(plan.sizes, sizes)
    d_intra = 1 - np.bincount(label[kept], similarity[kept], 12) / sizes
    centroids = np.load(clustered.clusters_folder("main") / "centroids.npy").astype(float)
    d_inter = (1 - (centroids @ centroids.T)).sum(1) / 11
    logits = d_intra * d_inter / 0.1
    share = np.exp(logits - logits.max())
    targets = share / share.sum() * 180
    free = (plan.quotas > UNITS) & (plan.quotas < plan.sizes * UNITS)
    shift = (targets - plan.quotas / UNITS)[free]
    assert np.ptp(shift) <= 2  # one λ for all free clusters, up to rounding


def test_a_plan_over_a_column(clustered):
    group_by(clustered, GroupRequest("shard", name="by-shard"))
    plan = make_plan(clustered, "p", PlanRequest("flat", keep=0.5, clustering="by-shard"))
    shards = np.repeat(np.arange(len(plan.shard_offsets) - 1), np.diff(plan.shard_offsets))
    counts = np.bincount(shards, plan.draw(0))
    assert counts.sum() == 300
    assert np.ptp(counts[counts < np.bincount(shards)]) <= 1
    for request, message in (
        (PlanRequest("dbp", keep=0.5, clustering="by-shard"), "has no centroids, and so no distances"),
        (PlanRequest("ssp", keep=0.5, clustering="by-shard"), "`pick` hardest needs a clustering with centroids"),
    ):
        with pytest.raises(UserError, match=message):
            make_plan(clustered, "q", request)


def test_plans_of_a_registered_method_hold_its_weights(clustered):
    from tailwise.plan import methods

    before = dict(methods._METHODS)
    try:
        register_method("mine")(lambda clusters: clusters.size**0.5)
        plan = make_plan(clustered, "p", PlanRequest("mine", keep=0.5))
        assert plan.draw(1).sum() == 300
        assert make_plan(clustered, "p", PlanRequest("mine", keep=0.5)).manifest == plan.manifest
        register_method("mine")(lambda clusters: clusters.size**0.6)
        with pytest.raises(UserError, match=r"with other settings .*quotas"):
            make_plan(clustered, "p", PlanRequest("mine", keep=0.5))
    finally:
        methods._METHODS.clear()
        methods._METHODS.update(before)
