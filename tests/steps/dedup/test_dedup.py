import itertools
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import tailwise
from tailwise.catalog import Catalog
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.drops import DROPPED_SCHEMA as SCHEMA
from tailwise.catalog.drops import DropList
from tailwise.catalog.files import note_digest, read_record, write_record
from tailwise.cli import app
from tailwise.errors import UserError
from tailwise.execution.shuffle import cluster_buckets
from tailwise.kernels.keyed import hash_range, stream_key
from tailwise.kernels.similarity import BELOW_ONE
from tailwise.requests import ClusterRequest, DedupRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.dedup import members
from tailwise.steps.dedup import suggest as guides
from tailwise.steps.dedup.dedup import dedup
from tailwise.steps.dedup.members import Layout
from tailwise.steps.dedup.suggest import EPSILONS, suggest
from tailwise.steps.drops import write_drops
from tailwise.steps.importing.pool import import_pool

# --- the plain reference: one sample after the other, all pairs, nothing collapsed -------------------------------------


def column(catalog, kind, name="main"):
    return np.concatenate(list(Clustering.open(catalog, name).parts(kind)))


def embeddings(catalog):
    return np.concatenate(catalog.embedding_parts("image", catalog.snapshot()))


def similarities(x):
    wide = x.astype(np.float64)
    norms = np.sqrt((wide**2).sum(1))
    same = (x[:, None] == x[None]).all(2)
    return np.where(same, 1.0, np.minimum(wide @ wide.T / (norms[:, None] * norms), BELOW_ONE))


def places(catalog, name="main", probe=2):
    """The clusters that each row takes part in: its own, and the next nearest ones; −1 where there are none."""
    labels, clustering = column(catalog, "label", name), Clustering.open(catalog, name)
    dots = embeddings(catalog).astype(np.float64) @ clustering.centroids.astype(np.float64).T
    dots[np.arange(len(labels)), labels] = np.inf
    nearest = np.argsort(-dots, axis=1, kind="stable")[:, :probe]
    return np.where(labels[:, None] >= 0, nearest, -1)


def reference(catalog, epsilon, rule, order, *, gone=(), base=None, name="main", probe=2):
    """{dropped row: (kept row, similarity)}; `order` sorts rows, `base` is (old rows, those of them that were dropped)."""
    x, near = embeddings(catalog), places(catalog, name, probe)
    near[list(gone)] = -1
    old, dropped_before = base or (0, set())
    present = np.flatnonzero(near[:, 0] >= 0).tolist()
    rows = sorted(present, key=lambda row: (row >= old, row in dropped_before, order[row], row))
    matrix, near = similarities(x[rows]), near[rows]
    together = (near[:, None, :, None] == near[None, :, None, :]).any((2, 3))
    kept, found = [row not in dropped_before for row in rows], {}
    for at, row in enumerate(rows):
        before = [i for i in range(at) if together[at, i] and (kept[i] or rule == "any-earlier")]
        if row < old or not before:
            continue
        copies = [i for i in range(at) if matrix[at, i] == 1 and rows[i] >= old]
        best = max(before, key=lambda i: (matrix[at, i], i in copies, -i))
        if matrix[at, best] > 1 - epsilon or matrix[at, best] == 1:
            kept[at] = False
            found[row] = (rows[best], matrix[at, best])
            if (
                rule == "greedy" and copies and rows[copies[0]] in found
            ):  # goes for the same sample as the first of them
                found[row] = found[rows[copies[0]]]
    return found


def decisions(catalog, name="duplicates"):
    drops = DropList(catalog, name)
    table = pq.read_table(drops.folder / "dropped.parquet")
    assert table.schema == SCHEMA
    rows = table.column("row").to_numpy()
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(np.flatnonzero(drops.mask[:]), rows)
    return {row["row"]: (row["kept_row"], row["similarity"]) for row in table.to_pylist()}


def check(catalog, expected, name="duplicates"):
    assert decisions(catalog, name) == {row: (other, np.float32(value)) for row, (other, value) in expected.items()}


# --- a catalog with near-duplicates, copies and chains ------------------------------------------------------------------


def set_embeddings(catalog, rows):
    for part in catalog.parts():
        np.save(catalog.embedding_folder("image") / f"{part.name}.npy", rows[part.span].astype(np.float16))
        note_digest(catalog.embedding_folder("image") / f"{part.name}.npy")


@pytest.fixture(scope="module")
def _catalog_source(_small_catalog_source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dedup") / "catalog"
    shutil.copytree(_small_catalog_source / "catalog", folder)
    small_catalog = Catalog.open(folder)
    rows = embeddings(small_catalog).astype(np.float64)
    random = np.random.default_rng(7)
    for _ in range(120):
        source, target = random.integers(0, len(rows), 2)
        rows[target] = rows[source] + random.normal(scale=random.choice([0.003, 0.02, 0.05]), size=16)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[random.integers(0, 600, 40)] = rows[random.integers(0, 600, 40)]
    rows[[5, 300, 590]] = 0
    set_embeddings(small_catalog, rows)
    cluster(small_catalog, ClusterRequest(k=15, seed=1))
    return folder


@pytest.fixture
def catalog(_catalog_source, tmp_path):
    """`small_catalog` with 40 copies, 120 near-copies (of near-copies, too), 3 samples without embedding; clustered."""
    return Catalog.open(shutil.copytree(_catalog_source, tmp_path / "catalog"))


def orders(catalog):
    similarity = column(catalog, "similarity").astype(np.float64)
    hashes = hash_range(stream_key(3, "keep-order"), 0, 600).astype(object)
    return {"farthest": similarity, "nearest": -similarity, "random": hashes}


@pytest.mark.parametrize("probe", [1, 3, 16])
@pytest.mark.parametrize("rule", ["greedy", "any-earlier"])
def test_every_number_of_clusters_equals_the_plain_reference(catalog, rule, probe):
    """16: more than there are, so that all are compared with all."""
    for epsilon in (0.01, 0.05, 0.3):
        dedup(catalog, DedupRequest(epsilon=epsilon, rule=rule, probe=probe, name=f"list{epsilon}"))
        check(catalog, reference(catalog, epsilon, rule, orders(catalog)["farthest"], probe=probe), f"list{epsilon}")


@pytest.mark.parametrize("keep", ["farthest", "nearest", "random"])
@pytest.mark.parametrize("rule", ["greedy", "any-earlier"])
def test_every_epsilon_rule_and_order_equals_the_plain_reference(catalog, rule, keep):
    for number, epsilon in enumerate((0.0, 0.001, 0.01, 0.05, 0.3)):
        dedup(catalog, DedupRequest(epsilon=epsilon, rule=rule, order=keep, seed=3, name=f"list{number}"))
        expected = reference(catalog, epsilon, rule, orders(catalog)[keep])
        check(catalog, expected, f"list{number}")
        assert len(expected) > 20
    assert len(list((catalog.folder / "neighbours").iterdir())) == 2  # one artifact, and its lock's file


def test_greedy_s_kept_rows_are_kept(catalog):
    dedup(catalog, DedupRequest(epsilon=0.05))
    found = decisions(catalog)
    assert not {kept_row for kept_row, _ in found.values()} & set(found)
    table = pq.read_table(catalog.drops_folder("duplicates") / "dropped.parquet").to_pylist()
    labels, near = column(catalog, "label"), places(catalog)
    for row in table:
        assert row["cluster"] == labels[row["row"]]
        assert set(near[row["row"]]) & set(near[row["kept_row"]])
        assert row["reason"] == ("identical embedding" if row["similarity"] == 1 else "near-duplicate")
        assert row["value"] is None
    assert {row["reason"] for row in table} == {"identical embedding", "near-duplicate"}


def test_samples_of_no_cluster_are_never_dropped(catalog):
    rows = embeddings(catalog)
    assert not rows[[5, 300, 590]].any()  # identical to each other
    dedup(catalog, DedupRequest(epsilon=1.0))
    assert not {5, 300, 590} & set(decisions(catalog))


def test_by_a_score_highest_first_and_those_without_last(catalog, monkeypatch):
    scores = np.random.default_rng(0).integers(0, 50, 600).astype(np.float32)  # with ties
    scores[::9] = np.nan
    asked = []

    def parts(catalog, snapshot, request, track):
        asked.append(request.name)
        return (scores[part.span] for part in catalog.parts(snapshot))

    monkeypatch.setattr("tailwise.steps.scoring.scores.score_parts", parts)
    dedup(catalog, DedupRequest(epsilon=0.02, order="score", score="mine"))
    order = np.where(np.isnan(scores), np.inf, -scores)
    check(catalog, reference(catalog, 0.02, "greedy", order))
    assert set(asked) == {"mine"}
    scores[1] += 1
    with pytest.raises(UserError, match="score"):  # other values under the same name: another list
        dedup(catalog, DedupRequest(epsilon=0.02, order="score", score="mine"))


def test_a_real_score(catalog):
    dedup(catalog, DedupRequest(epsilon=0.02, order="score", score="caption-characters"))
    captions = itertools.chain(*(catalog.samples(part, ["caption"])["caption"].to_pylist() for part in catalog.parts()))
    check(catalog, reference(catalog, 0.02, "greedy", [-len(caption) for caption in captions]))


def drop(catalog, name, rows):
    """A drop list made by hand."""
    table = SCHEMA.empty_table().from_pylist([{"row": row, "reason": "by hand"} for row in rows], SCHEMA)
    config = {"without": [], "snapshot": catalog.snapshot().number}
    with Artifact(catalog.drops_folder(name), "filter", config, {}) as artifact:
        write_drops(artifact, catalog.parts(), [table])
        artifact.finish({})


def test_what_other_lists_drop_takes_no_part(catalog):
    gone = list(range(0, 600, 4))
    drop(catalog, "others", gone)
    dedup(catalog, DedupRequest(epsilon=0.05, without=["others"]))
    expected = reference(catalog, 0.05, "greedy", orders(catalog)["farthest"], gone=gone)
    check(catalog, expected)
    assert not set(expected) & set(gone)
    assert set(decisions(catalog)) != set(reference(catalog, 0.05, "greedy", orders(catalog)["farthest"]))
    cluster(catalog, ClusterRequest(k=5, name="after", without=["duplicates"]))
    assert (column(catalog, "label", "after") < 0).sum() == len({*gone, *expected, 5, 300, 590})


# --- repeatable, whatever the machine -----------------------------------------------------------------------------------


def lists(catalog):
    return [catalog.drops_folder(name) for name in ("a", "b")]


def make_all(catalog):
    dedup(catalog, DedupRequest(epsilon=0.05, name="a", order="nearest"))
    dedup(catalog, DedupRequest(epsilon=0.01, name="b", order="nearest", rule="any-earlier"))


def content(catalog, tree_bytes):
    folders = [*lists(catalog), catalog.folder / "neighbours"]
    return [tree_bytes(folder) for folder in folders]


@pytest.fixture(scope="module")
def expected_bytes(_catalog_source, tree_bytes, tmp_path_factory):
    catalog = Catalog.open(shutil.copytree(_catalog_source, tmp_path_factory.mktemp("whole") / "catalog"))
    make_all(catalog)
    return content(catalog, tree_bytes)


@pytest.mark.parametrize("layout", [Layout(1, True), Layout(1, False), Layout(150, False), Layout(10**6, False)])
def test_result_depends_on_neither_buckets_nor_chunks_nor_threads(
    catalog, expected_bytes, tree_bytes, monkeypatch, layout, small_pieces
):
    monkeypatch.setattr(members, "plan_layout", lambda *_: layout)
    with small_pieces():
        make_all(catalog)
    assert content(catalog, tree_bytes) == expected_bytes


def test_small_memory_spills_and_large_memory_gathers():
    sizes = np.full(1000, 1000)
    small = members.plan_layout(sizes, 10**6, 768, 1 << 30)
    assert not small.gathers
    assert small.bucket_rows <= (1 << 30) / (2 * 768)
    assert members.plan_layout(sizes, 10**6, 768, 4 << 30).gathers
    with pytest.raises(UserError, match=r"1,000,000 members of 768 dimensions: comparing them needs about 13.1 GB"):
        members.plan_layout(np.array([10**6]), 10**6, 768, 4 << 30)


@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize("stops_at", [1, 6])
def test_goes_on_after_an_interruption_with_the_same_bytes(
    catalog, expected_bytes, tree_bytes, monkeypatch, gathers, stops_at, interrupted, watched
):
    monkeypatch.setattr(members, "plan_layout", lambda *_: Layout(60, gathers))
    with interrupted(members, "most_similar_earlier", lambda *_, **__: len(calls) == stops_at) as calls:
        make_all(catalog)
    assert not (catalog.drops_folder("a") / "manifest.json").exists()
    sizes = np.bincount(places(catalog)[places(catalog) >= 0])
    finished = [int(path.stem) for path in catalog.folder.glob("neighbours/.*/*/work/*/results/*.npy")]
    left = ~np.isin(cluster_buckets(sizes, 60), finished) & (sizes > 1)
    assert left.any()
    assert left.all() == (stops_at == 1)
    with watched(members, "most_similar_earlier") as calls:
        make_all(catalog)
    assert sorted(len(x) for (x,) in calls) == sorted(sizes[left])
    assert content(catalog, tree_bytes) == expected_bytes


def test_an_interruption_while_deciding_keeps_the_comparison(catalog, expected_bytes, tree_bytes, interrupted, watched):
    from tailwise.steps.dedup import dedup as stage

    with interrupted(stage, "look_back"):
        make_all(catalog)
    with watched(members, "most_similar_earlier") as calls:
        make_all(catalog)
    assert calls == []
    assert content(catalog, tree_bytes) == expected_bytes


def test_a_rerun_does_nothing_even_without_the_neighbours(catalog, tree_bytes):
    made = dedup(catalog, DedupRequest(epsilon=0.05))
    before = tree_bytes(catalog.drops_folder("duplicates"))
    shutil.rmtree(catalog.folder / "neighbours")
    assert dedup(catalog, DedupRequest(epsilon=0.05)).summary == made.summary
    assert not (catalog.folder / "neighbours").exists()
    with pytest.raises(UserError, match=r"`epsilon` 0\.05 → 0\.06"):
        dedup(catalog, DedupRequest(epsilon=0.06))
    assert tree_bytes(catalog.drops_folder("duplicates")) == before


def test_the_summary_counts(catalog):
    summary = dedup(catalog, DedupRequest(epsilon=0.05)).summary
    found = decisions(catalog)
    assert summary["samples"] == 600
    assert summary["judged"] == 597
    assert summary["dropped"] == len(found) == 597 - summary["kept"]
    assert summary["dropped_identical"] == sum(similarity == 1 for _, similarity in found.values())
    assert summary["dropped_identical"] + summary["dropped_near"] == len(found)
    assert summary["largest_cluster"] == np.bincount(column(catalog, "label")[column(catalog, "label") >= 0]).max()


# --- a target share -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.75, 0.85, 0.9, 551 / 600])
@pytest.mark.parametrize("rule", ["greedy", "any-earlier"])
def test_a_target_share_finds_an_epsilon_that_keeps_it_and_a_list_that_this_epsilon_gives(
    catalog, tree_bytes, rule, share
):
    made = dedup(catalog, DedupRequest(target_share=share, rule=rule, name="share")).summary
    target, epsilon = round(share * 600), made["epsilon"]
    assert round(epsilon * 1e6) == pytest.approx(epsilon * 1e6)
    again = dedup(catalog, DedupRequest(epsilon=epsilon, rule=rule, name="again")).summary
    more = dedup(catalog, DedupRequest(epsilon=round(epsilon + 1e-6, 6), rule=rule, name="more")).summary
    first, second = (tree_bytes(catalog.drops_folder(name)) for name in ("share", "again"))
    assert {name: content for name, content in first.items() if name != "manifest.json"} == {
        name: content for name, content in second.items() if name != "manifest.json"
    }
    assert {**again, "epsilon": epsilon, "pool": 600} == made
    assert made["kept"] == target or more["kept"] < target < made["kept"]
    check(catalog, reference(catalog, epsilon, rule, orders(catalog)["farthest"]), "share")


def test_a_share_that_no_epsilon_keeps_is_one_line(catalog):
    for share, message in (
        (1.0, "but 597 take part: the largest possible share is 0.995"),
        (0.99, r"dropping by identical embeddings leaves 563: the largest possible share is 0\.938333"),
        (
            0.001,
            r"asks that 1 of 600 samples stay, but dropping by ε = 1 leaves \d+: the smallest possible share is 0\.0",
        ),
    ):
        with pytest.raises(UserError, match=message) as caught:
            dedup(catalog, DedupRequest(target_share=share))
        assert "\n" not in str(caught.value)
        assert not (catalog.drops_folder("duplicates")).exists()


def test_samples_of_equal_similarity_go_together(catalog):
    """Two pairs of one similarity, and nothing else that is alike: either both are left out, or none."""
    rows = np.random.default_rng(0).normal(size=(600, 16))
    rows[1::2] = -rows[::2]
    rows[[1, 3]] = rows[[0, 2]] = [[0.8, 0.6, *[0] * 14], [0, 0, 0.8, 0.6, *[0] * 12]]
    rows[[1, 3], [0, 2]], rows[[1, 3], [1, 3]] = 0.6, 0.8
    rows[4:] = 0
    set_embeddings(catalog, rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9))
    cluster(catalog, ClusterRequest(k=1, name="one", force=True))
    for rule in ("greedy", "any-earlier"):
        made = dedup(catalog, DedupRequest(target_share=3 / 600, rule=rule, clustering="one", name=f"{rule}-3"))
        assert made.summary["kept"] == 4
        made = dedup(catalog, DedupRequest(target_share=2 / 600, rule=rule, clustering="one", name=f"{rule}-2"))
        assert made.summary["kept"] == 2
        with pytest.raises(UserError, match=r"leaves 2: the smallest possible share is 0\.003334"):
            dedup(catalog, DedupRequest(target_share=1 / 600, rule=rule, clustering="one", name=f"{rule}-1"))


@pytest.mark.parametrize("limit", [0, 1, 700, 4999, 5000])
@pytest.mark.parametrize(
    "kept", [lambda gone: gone, lambda gone: gone // 2, lambda gone: gone - gone % 7, lambda gone: min(gone, 3000)]
)
def test_the_search_ends_next_to_an_epsilon_that_drops_too_much(limit, kept):
    random = np.random.default_rng(limit)
    most = np.cumsum(np.bincount((random.random(5000) ** 3 * guides.GRID + 0.9).astype(int), minlength=guides.GRID + 1))
    most -= most[0] * (limit < most[0])
    asked = []

    def dropped(epsilon):
        asked.append(epsilon)
        return int(kept(most[round(epsilon * guides.GRID)]))

    at, gone = guides._search(most, limit, 0, dropped)
    assert gone == dropped(at / guides.GRID) <= limit
    assert gone == limit or at == guides.GRID or dropped((at + 1) / guides.GRID) > limit
    assert len(asked) < 40


# --- new shards ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _grown_source(tmp_path_factory, make_pool, make_embeddings):
    tmp_path = tmp_path_factory.mktemp("grown")
    random = np.random.default_rng(11)
    centres = random.normal(size=(4, 8))

    def add(folder, sizes, first_shard, known):
        keys = list(itertools.chain(*make_pool(folder, sizes, first_shard).values()))
        for key in keys:
            known[key] = centres[random.integers(4)] + random.normal(scale=0.25, size=8)
            if len(known) > 10 and random.random() < 0.6:
                source = known[list(known)[random.integers(len(known) - 1)]]
                known[key] = source + random.choice([0, 0.02, 0.1]) * random.normal(size=8)
        make_embeddings(folder, {key: known[key] for key in keys})
        return import_pool([str(folder)], tmp_path / "catalog", workers=1, part_rows=25).catalog

    known = {}
    catalog = add(tmp_path / "old", [20, 20, 20], 0, known)
    cluster(catalog, ClusterRequest(k=3))
    dedup(catalog, DedupRequest(epsilon=0.02, order="nearest"))
    dedup(catalog, DedupRequest(epsilon=0.02, order="nearest", rule="any-earlier", name="any"))
    add(tmp_path / "new", [30, 20], 7, known)
    cluster(catalog, ClusterRequest(extends="main", name="main-2"))
    return catalog.folder


@pytest.fixture
def grown(_grown_source, tmp_path):
    """A catalog of 60 samples that was clustered and deduplicated, and then got 50 more."""
    return Catalog.open(shutil.copytree(_grown_source, tmp_path / "grown"))


@pytest.mark.parametrize("base", ["duplicates", "any"])
@pytest.mark.parametrize("rule", ["greedy", "any-earlier"])
@pytest.mark.parametrize("keep", ["farthest", "nearest"])
def test_only_new_samples_are_judged(grown, tree_bytes, rule, base, keep):
    before = tree_bytes(grown.drops_folder(base))
    old = decisions(grown, base)
    order = column(grown, "similarity", "main-2").astype(np.float64) * (1 if keep == "farthest" else -1)
    for number, epsilon in enumerate((0.0, 0.01, 0.2)):
        name = f"list{number}"
        made = dedup(
            grown, DedupRequest(epsilon=epsilon, clustering="main-2", extends=base, rule=rule, order=keep, name=name)
        )
        expected = reference(grown, epsilon, rule, order, base=(60, set(old)), name="main-2")
        assert all(row >= 60 for row in expected)
        check(grown, {**old, **expected}, name)
        assert made.summary["judged"] == 50
        assert made.summary["dropped_before"] == len(old)
    assert tree_bytes(grown.drops_folder(base)) == before
    assert len(expected) > 10


def test_only_clusters_with_new_samples_are_compared(grown, watched):
    compared = []
    labels = column(grown, "label", "main-2")
    drop(grown, "filtered", (60 + np.flatnonzero(labels[60:] != labels[80])).tolist())
    request = DedupRequest(
        epsilon=0.02, clustering="main-2", probe=1, extends="duplicates", without=["filtered"], name="next"
    )
    with watched(members, "most_similar_earlier", lambda x, judged_from, **_: compared.append((judged_from, len(x)))):
        dedup(grown, request)
    mine = labels == labels[80]
    assert compared == [(mine[:60].sum(), mine.sum())]


def test_extending_needs_a_list_of_dedup_for_an_earlier_snapshot(grown):
    with pytest.raises(UserError, match="'main' was made for snapshot 1, and the newest is 2"):
        dedup(grown, DedupRequest(epsilon=0.02, name="next"))
    with pytest.raises(UserError, match="no drop list named 'other'"):
        dedup(grown, DedupRequest(epsilon=0.02, clustering="main-2", extends="other", name="next"))
    drop(grown, "by-hand", [1])
    with pytest.raises(UserError, match="it is a list of filter, not of dedup"):
        dedup(grown, DedupRequest(epsilon=0.02, clustering="main-2", extends="by-hand", name="next"))
    dedup(grown, DedupRequest(epsilon=0.02, clustering="main-2", extends="duplicates", name="next"))
    with pytest.raises(UserError, match="made for the newest snapshot already"):
        dedup(grown, DedupRequest(epsilon=0.02, clustering="main-2", extends="next", name="after"))


def test_what_the_old_list_was_made_without_stays_out(tmp_path, make_pool, make_embeddings, make_vectors):
    def add(number):
        keys = list(itertools.chain(*make_pool(tmp_path / str(number), [30], number).values()))
        make_embeddings(tmp_path / str(number), make_vectors(keys))
        return import_pool([str(tmp_path / str(number))], tmp_path / "catalog", workers=1).catalog

    catalog = add(1)
    cluster(catalog, ClusterRequest(k=2))
    drop(catalog, "filtered", [3, 4])
    dedup(catalog, DedupRequest(epsilon=0.5, without=["filtered"]))
    old = decisions(catalog)
    add(2)
    cluster(catalog, ClusterRequest(extends="main", name="main-2"))
    options = {"epsilon": 0.5, "clustering": "main-2", "extends": "duplicates", "name": "next"}
    with pytest.raises(UserError, match=r"2 samples that 'duplicates' was made without \(filtered\) take part now"):
        dedup(catalog, DedupRequest(**options))
    also = min(old)
    drop(catalog, "filtered-2", [3, 4, also, 40])
    dedup(catalog, DedupRequest(without=["filtered-2"], **options))
    found = decisions(catalog, "next")
    assert {row for row in found if row < 30} == set(old) - {also}
    assert 40 not in found
    assert not {3, 4, also, 40} & {kept_row for row, (kept_row, _) in found.items() if row >= 30}


# --- the guide ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", [1, 2])
def test_the_guide_counts_what_any_earlier_drops_and_what_clusters_hide(catalog, probe):
    guide = suggest(catalog, DedupRequest(seed=3, probe=probe), queries=600, pool_rows=600)
    near, x = places(catalog, probe=probe), embeddings(catalog)
    assert (guide.samples, guide.queries, guide.pool) == (597, 597, 597)
    sizes = np.bincount(near[near >= 0])
    assert guide.compared == (sizes * (sizes - 1) // 2).sum()
    present = np.flatnonzero(near[:, 0] >= 0)
    matrix = similarities(x[present])
    np.fill_diagonal(matrix, -1)
    inside = (near[present][:, None, :, None] == near[present][None, :, None, :]).any((2, 3))
    assert [item.epsilon for item in guide.epsilons] == list(EPSILONS)
    for item in guide.epsilons:
        expected = reference(catalog, item.epsilon, "any-earlier", orders(catalog)["farthest"], probe=probe)
        assert item.dropped == len(expected)
        assert item.share == len(expected) / 597
        pairs = matrix > min(1 - item.epsilon, BELOW_ONE)
        assert (item.pairs, item.pairs_inside) == (pairs.sum(), (pairs & inside).sum())
        assert (item.queries, item.queries_inside) == (pairs.any(1).sum(), (pairs & inside).any(1).sum())
    assert 0 < guide.epsilons[-1].pairs_inside <= guide.epsilons[-1].pairs - (probe == 1)


def test_the_guide_shows_pairs_of_every_band(catalog):
    guide = suggest(catalog, DedupRequest(seed=3))
    keys = np.concatenate([catalog.samples(part, ["key"])["key"].to_numpy() for part in catalog.parts()])
    x, near = embeddings(catalog), places(catalog)
    assert {pair.epsilon for pair in guide.pairs} > {0.0, 0.05}
    for pair in guide.pairs:
        both = [pair.sample.row, pair.earlier.row]
        assert [pair.sample.key, pair.earlier.key] == keys[both].tolist()
        assert pair.sample.caption.startswith("group ")
        assert set(near[both[0]]) & set(near[both[1]])
        assert similarities(x[both])[0, 1] == pair.similarity
        assert pair.similarity > 1 - pair.epsilon or pair.similarity == 1
        smaller = [epsilon for epsilon in EPSILONS if epsilon < pair.epsilon]
        assert not smaller or pair.similarity <= 1 - smaller[-1]
    assert suggest(catalog, DedupRequest(seed=3)) == guide
    assert suggest(catalog, DedupRequest(seed=4)).pairs != guide.pairs


def test_the_guide_draws_from_the_pool(catalog):
    guide = suggest(catalog, DedupRequest(), queries=100, pool_rows=200)
    assert 60 < guide.queries < 140
    assert 140 < guide.pool < 260


# --- mistakes, and the command line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": -0.1}, "`epsilon` -0.1: must lie between 0"),
        ({"epsilon": float("nan")}, "`epsilon` nan: must lie between 0"),
        ({"epsilon": 0.1, "target_share": 0.5}, "`epsilon` and `target_share` both say"),
        ({"target_share": 0.5, "extends": "x"}, "`target_share` does nothing with `extends`"),
        ({"target_share": 1.5}, "`target_share` 1.5: must be above 0 and at most 1"),
        ({"epsilon": 0.1, "rule": "harsh"}, "unknown rule 'harsh': use greedy, any-earlier"),
        ({"epsilon": 0.1, "order": "best"}, "`order` 'best': use farthest, nearest, random, score"),
        ({"epsilon": 0.1, "order": "score"}, "`order` score and `score` NAME need each other"),
        ({"epsilon": 0.1, "score": "width"}, "`order` score and `score` NAME need each other"),
        ({"epsilon": 0.1, "clustering": "fine"}, "no clustering named 'fine'"),
        ({"epsilon": 0.1, "without": ["x"]}, "no drop list named 'x'"),
        ({"epsilon": 0.1, "device": "tpu"}, "`device` 'tpu' cannot be used: use auto, cpu, cuda or cuda:N"),
    ],
)
def test_bad_requests_are_one_line_and_leave_nothing(catalog, options, message):
    with pytest.raises(UserError, match=message) as caught:
        dedup(catalog, DedupRequest(**options))
    assert "\n" not in str(caught.value)
    assert not list(catalog.folder.glob("drops/*"))


def test_too_little_memory_says_how_much_is_needed(catalog):
    with pytest.raises(UserError, match=r"the largest cluster has \d+ members .* `max_memory` allows 0.001 GB"):
        dedup(catalog, DedupRequest(epsilon=0.1, max_memory="1000KB"))
    dedup(catalog, DedupRequest(epsilon=0.1))


def test_changed_embeddings_are_refused(catalog):
    marker = catalog.embedding_folder("image") / "part-000000.json"
    write_record(marker, {**read_record(marker), "digest": "other"})
    with pytest.raises(UserError, match="the image embeddings have changed since clustering 'main' was made"):
        dedup(catalog, DedupRequest(epsilon=0.1))


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if code:
        assert isinstance(result.exception, UserError)
        return str(result.exception)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command(catalog):
    folder = catalog.folder
    assert "--epsilon is missing" in run("dedup", folder, code=2)
    guide = json.loads(run("dedup", folder, "--suggest", "--json"))
    assert len(guide["epsilons"]) == len(EPSILONS)
    told = run("dedup", folder, "--suggest", "--probe", 3, "--column", "image")
    assert "pairs to look at" in told
    assert told.endswith(f"next: tailwise dedup {folder} --probe 3 --column image --epsilon 0.05\n")
    assert "--epsilon does nothing with --suggest" in run("dedup", folder, "--suggest", "--epsilon", 0.1, code=2)
    told = json.loads(run("dedup", folder, "--epsilon", 0.05, "--rule", "any-earlier", "--json"))
    assert told["name"] == "duplicates"
    assert told["dropped"] == next(item["dropped"] for item in guide["epsilons"] if item["epsilon"] == 0.05)
    assert "ε = 0." in run("dedup", folder, "--target-share", 0.9, "--name", "nine")
    assert "540 of 600 samples stay, 90.00% of the pool" in run(
        "dedup", folder, "--target-share", 0.9, "--name", "nine"
    )
    text = run("dedup", folder, "--epsilon", 0.05, "--name", "d2", "--max-memory", "1GB")
    assert f"{len(decisions(catalog, 'd2'))} of 597 samples" in text


@pytest.mark.shared_data
def test_real_near_duplicates(shared_data, tmp_path):
    folder = shared_data / "tinyimagenet-lt"
    catalog = import_pool([str(folder / "train"), str(folder / "embeddings")], tmp_path / "catalog").catalog
    cluster(catalog, ClusterRequest(k=100))
    tailwise.dedup(catalog, DedupRequest(epsilon=0.07))
    keys = np.concatenate([catalog.samples(part, ["key"])["key"].to_numpy() for part in catalog.parts()])
    lines = [line.split("\t") for line in (folder / "truth.tsv").read_text().splitlines()[1:]]
    origin = {key: source or key for key, _, _, source in lines}
    found = decisions(catalog)
    right = sum(origin[keys[row]] == origin[keys[kept_row]] for row, (kept_row, _) in found.items())
    planted = len(origin) - len(set(origin.values()))
    assert right / len(found) > 0.95
    assert right / planted > 0.7
