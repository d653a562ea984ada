"""The report's figures, and what its files hold."""

import base64
import gzip
import hashlib
import json
import re
import shlex
import shutil

import numpy as np
import pytest

import tailwise
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.comparisons import Neighbours
from tailwise.catalog.drops import DropList
from tailwise.catalog.kinds import COMPARISON
from tailwise.catalog.removals import NOTHING_REMOVED
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.report.clusters import (
    BINS,
    FARTHEST,
    KEPT,
    NEAREST,
    PICK,
    WORDS,
    cluster_figures,
    count_words,
    first_of_each,
    typical_words,
)
from tailwise.report.overview import plans_table
from tailwise.report.page import write_page
from tailwise.report.report import _nearest
from tailwise.report.samples import duplicate_groups, nearest_to_threshold
from tailwise.requests import DedupRequest, FilterRequest, PlanRequest, ReportRequest
from tailwise.steps.upkeep.remove import remove

BLOCK = re.compile(r'<script type="application/json" id="data-([\w-]+)">(.*?)</script>', re.DOTALL)


def blocks(page):
    return {name: json.loads(text) for name, text in BLOCK.findall(page)}


def column(meta, name):
    kind, text = meta["columns"][name]
    return np.frombuffer(base64.b64decode(text), f"<{kind}")


@pytest.fixture(scope="module")
def page(report_folder):
    return (report_folder / "index.html").read_text(encoding="utf-8")


def test_figures_of_clusters_are_those_of_numpy(report_catalog):
    clustering = Clustering.open(report_catalog, "main")
    plans = [tailwise.Plan(report_catalog, name) for name in ("epochs", "subset")]
    found = cluster_figures(clustering, plans, 2, 1000, "pca", Context())
    labels, near = (np.concatenate(list(clustering.parts(name))) for name in ("label", "similarity"))
    assert found.sizes.tolist() == np.bincount(labels).tolist()
    for number, plan in enumerate(plans):
        rates = plan.rate(slice(0, plan.rows))
        np.testing.assert_allclose(found.quotas[number], np.bincount(labels, rates, 6))
        np.testing.assert_allclose(found.similarities[1 + number].sum(), rates.sum())
    edges = np.linspace(-1, 1, BINS + 1)
    assert found.similarities[0].tolist() == np.histogram(near, edges)[0].tolist()
    for kind, sign in ((NEAREST, -1), (FARTHEST, 1)):
        for cluster in range(6):
            rows = found.picks[(found.picks["cluster"] == cluster) & (found.picks["kind"] == kind)]["row"].tolist()
            members = np.flatnonzero(labels == cluster)
            assert rows == members[np.argsort(sign * near[members], kind="stable")][:2].tolist()
    drawn = plans[0].draw(0)
    kept = found.picks[found.picks["kind"] == KEPT]["row"]
    assert len(kept) and (drawn[kept] == 1).all()
    best, share = found.groups["animals"]
    truth = np.concatenate(list(Clustering.open(report_catalog, "animals").parts("label")))
    for cluster in range(6):
        counts = np.bincount(truth[labels == cluster], minlength=6)
        assert best[cluster] == counts.argmax() and share[cluster] == counts.max() / counts.sum()


def test_clusters_beyond_the_bound_have_no_pictures(report_catalog):
    clustering = Clustering.open(report_catalog, "main")
    found = cluster_figures(clustering, [], 5, 6, "pca", Context())
    assert len(np.unique(found.picks["cluster"])) == 3 and len(found.picks) == 6
    largest, smallest = found.sizes.argmax(), found.sizes.argmin()
    assert {largest, smallest} <= set(found.picks["cluster"].tolist())


def test_first_picks_do_not_depend_on_the_pieces():
    random = np.random.default_rng(0)
    picks = np.empty(500, PICK)
    for name, most in (("cluster", 7), ("kind", 3), ("key", 20)):
        picks[name] = random.integers(0, most, 500)
    picks["row"] = random.permutation(500)
    whole = first_of_each(picks, 4)
    pieces = first_of_each(np.concatenate([first_of_each(piece, 4) for piece in np.array_split(picks, 9)]), 4)
    assert whole.tolist() == pieces.tolist()
    assert np.unique(whole[["cluster", "kind"]], return_counts=True)[1].max() == 4


def test_words_are_those_of_a_plain_count():
    import pyarrow as pa

    random = np.random.default_rng(1)
    texts = [" ".join(f"w{at}" for at in random.integers(0, 40, 6)) for _ in range(300)]
    clusters = random.integers(0, 5, 300).astype(np.int32)
    pieces = [slice(0, 100), slice(100, 101), slice(101, 300)]
    tables = [count_words(pa.chunked_array([texts[piece]]), clusters[piece]) for piece in pieces]
    captions = [set(text.split()) for text in texts]
    for cluster, found in enumerate(typical_words(tables, 5)):
        held = [words for words, of in zip(captions, clusters.tolist(), strict=True) if of == cluster]
        holders = {
            w: len({of for ws, of in zip(captions, clusters.tolist(), strict=True) if w in ws})
            for w in set.union(*captions)
        }
        score = {w: sum(w in words for words in held) * np.log(6 / holders[w]) for w in set.union(*held)}
        assert found.split() == sorted(score, key=lambda w: (-round(score[w], 9), w))[:WORDS]
    assert typical_words([count_words(pa.chunked_array([["1 22", ""]]), np.zeros(2, np.int32))], 1) == [""]


def test_the_page_holds_the_figures(page, report_catalog):
    meta = blocks(page)["meta"]
    plan = tailwise.Plan(report_catalog, "epochs")
    assert column(meta, "quota:0").sum() == pytest.approx(plan.counts(0).sum())
    assert sorted(column(meta, "rank").tolist()) == list(range(1, 7))
    assert meta["groups"] == {"animals": [f"animal{at}" for at in range(6)]}
    assert "GPU-hours" in page and ">100<" in page
    sizes = np.sort(column(meta, "size"))[::-1]
    assert f">{100 * sizes[:2].sum() / sizes.sum():.1f} %<i" in page and "never: one fixed subset" in page
    assert meta["catalog"] == shlex.quote(str(report_catalog.folder))  # it is pasted into a shell


def test_duplicates_and_filtered_samples_are_those_of_the_lists(report_catalog):
    dropped = DropList(report_catalog, "duplicates")
    pairs = {(row["row"], row["kept_row"]) for row in dropped.tables(slice(0, 100)).to_pylist()}
    groups = duplicate_groups(dropped, NOTHING_REMOVED)
    assert {(row, group.kept) for group in groups for row in group.rows} <= pairs and groups
    filtered = nearest_to_threshold(DropList(report_catalog, "short"), NOTHING_REMOVED)
    values = [item.value for item in filtered]
    assert values == sorted(values, reverse=True) and max(values) < 5


def test_a_histogram_of_duplicates_is_that_of_its_own_list(report_catalog, tmp_path):
    catalog = tailwise.Catalog.open(shutil.copytree(report_catalog.folder, tmp_path / "catalog"))
    tailwise.dedup(catalog, DedupRequest(epsilon=0.02, clustering="main", name="others"))
    tailwise.dedup(catalog, DedupRequest(epsilon=0.02, clustering="main", order="nearest", name="nearest"))
    lists = [DropList(catalog, name) for name in ("duplicates", "others", "nearest")]
    for item, (counts, epsilon) in zip(lists, _nearest(catalog, lists).values(), strict=True):
        found = [
            near
            for path in COMPARISON.manifests(catalog.folder)
            if (near := Neighbours(catalog, path.parent)).config["clustering"] == item.clustering
            and near.config["order"] == item.config["order"]
        ]
        assert len(found) == 1 and epsilon == item.config["epsilon"]
        similar = found[0].similarity[:]
        assert counts.tolist() == np.histogram(similar[similar >= -1], np.linspace(-1, 1, BINS + 1))[0].tolist()


def test_no_text_or_byte_of_the_pool_is_markup(page):
    assert 'onerror="' not in page and "<b>bold" not in page and "pool <b>" not in page
    held = blocks(page)
    captions = [sample["caption"] for block in held.values() for sample in block.get("samples", {}).values()]
    assert any("onerror" in caption for caption in captions)
    images = {sample["image"] for block in held.values() for sample in block.get("samples", {}).values()}
    decoded = [base64.b64decode(uri.partition(",")[2]) for uri in images if uri.startswith("data:")]
    assert all(content[8:12] == b"WEBP" and b"comment" not in content for content in decoded)
    assert {uri for uri in images if not uri.startswith("data:")} <= {"not an image"}


def test_the_policy_allows_the_pages_own_scripts_only(page):
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1].replace("&#39;", "'")
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts}
    allowed = re.search(r"script-src ([^;]+)", policy)[1].split()
    assert hashes == set(allowed) and len(scripts) == 2 and "default-src 'none'" in policy


def test_same_bytes_and_a_folder_when_large(
    report_catalog, report_folder, study_folder, tmp_path, tree_bytes, monkeypatch
):
    output = tmp_path / "again"
    request = ReportRequest(output=output, samples_per_second=1000.0, study=study_folder)
    tailwise.make_report(report_catalog, request)
    assert tree_bytes(output) == tree_bytes(report_folder)
    monkeypatch.setattr("tailwise.report.page.ONE_FILE_BYTES", 1000)
    made = tailwise.make_report(report_catalog, request)
    files = tree_bytes(output)
    assert sorted(files) == ["data/chunk-0.js", "data/lists.js", "index.html"] and made.files == 3
    assert b"&#39;self&#39; file:" in files["index.html"] and b'id="data-chunk-0"' not in files["index.html"]
    monkeypatch.undo()
    tailwise.make_report(report_catalog, request)
    assert tree_bytes(output) == tree_bytes(report_folder)


def test_a_catalog_without_clusters_or_plans_says_what_to_do(report_catalog, tmp_path, small_catalog):
    made = tailwise.make_report(small_catalog, ReportRequest(output=tmp_path / "r"))
    page = made.page.read_text(encoding="utf-8")
    assert "tailwise cluster" in page and made.clusters == 0 and "<script>" not in page
    made = tailwise.make_report(report_catalog, ReportRequest(output=tmp_path / "g", clustering="animals"))
    assert made.clusters == 6 and "Map of clusters" not in made.page.read_text(encoding="utf-8")


def test_removed_samples_and_lost_shards_show_nothing(report_catalog, tmp_path):
    catalog = tailwise.Catalog.open(shutil.copytree(report_catalog.folder, tmp_path / "catalog"))
    keys = [f"{row:03d}<i>" for row in range(0, 100, 2)]
    (tmp_path / "keys.txt").write_text("\n".join(keys))
    remove(catalog, tmp_path / "keys.txt", reason="asked")
    shards = catalog.shards()
    moved = shards.set_column(shards.schema.get_field_index("path"), "path", [[str(tmp_path / "gone.tar")]])
    catalog.replace_shards(moved)
    held = blocks(tailwise.make_report(catalog, ReportRequest(output=tmp_path / "r")).page.read_text(encoding="utf-8"))
    samples = [sample for block in held.values() for sample in block.get("samples", {}).values()]
    assert samples and not {sample["key"] for sample in samples} & set(keys)
    assert {sample["image"] for sample in samples} == {f"{tmp_path / 'gone.tar'}: No such file or directory"}
    assert column(held["meta"], "size").sum() == 50


def test_epochs_until_all_are_shown_are_those_of_the_draws(report_catalog, tmp_path):
    catalog = tailwise.Catalog.open(shutil.copytree(report_catalog.folder, tmp_path / "catalog"))
    for name, request in (
        ("without", PlanRequest(method="dynamics", keep=0.4, without=["duplicates"], clustering="animals")),
        ("repeated", PlanRequest(method="dynamics", keep=1.5, max_repeats=3)),
        ("all", PlanRequest(method="random", keep=1.0, dynamic=False)),
        ("half", PlanRequest(method="random", keep=0.5, dynamic=False)),
    ):
        plan = tailwise.make_plan(catalog, name, request)
        seen, shown = np.zeros(plan.rows, bool), []
        for epoch in range(60):
            seen |= plan.draw(epoch) > 0
            shown.append(int(seen.sum()))
        missing = plan.rows - shown[-1]
        expected = f"{shown.index(shown[-1]) + 1}" + (f", but for {missing} samples" if missing else "")
        cell = plans_table([plan], None).rows[0][-1]
        assert cell == ("never: one fixed subset" if name == "half" else expected)


def test_the_page_says_what_is_of_an_earlier_snapshot(report_catalog, tmp_path, make_tar, make_image):
    catalog = tailwise.Catalog.open(shutil.copytree(report_catalog.folder, tmp_path / "catalog"))
    make_tar(tmp_path / "new" / "1.tar", [("new.jpg", make_image()), ("new.txt", b"a new sample")])
    tailwise.import_pool([str(tmp_path / "new")], catalog.folder, workers=1)
    page = tailwise.make_report(catalog, ReportRequest(output=tmp_path / "r")).page.read_text(encoding="utf-8")
    for name, where in (("Plan epochs", "not in it"), ("Clustering main", "in no cluster")):
        assert f"{name} was made for snapshot 1: 1 newer samples are {where}." in page
    assert "drop lists duplicates, short" in page


def test_lists_are_shown_without_clusters(small_catalog, tmp_path):
    tailwise.filter_samples(small_catalog, FilterRequest(by="caption-characters", minimum=8.0, name="short"))
    page = tailwise.make_report(small_catalog, ReportRequest(output=tmp_path / "r")).page.read_text(encoding="utf-8")
    assert len(blocks(page)["lists"]["filtered"]) == 1 and page.count("<script>") == 1


def test_a_compressed_tar_shows_why_it_has_no_pictures(tmp_path, make_tar_bytes, make_image, run_tailwise):
    (tmp_path / "pool").mkdir()
    members = [("a.jpg", make_image()), ("a.txt", b"short"), ("b.jpg", make_image()), ("b.txt", b"a longer one")]
    (tmp_path / "pool" / "0.tar.gz").write_bytes(gzip.compress(make_tar_bytes(members)))
    tailwise.import_pool([str(tmp_path / "pool")], tmp_path / "catalog", workers=1)
    catalog = tailwise.Catalog.open(tmp_path / "catalog")
    tailwise.filter_samples(catalog, FilterRequest(by="caption-characters", minimum=8.0, name="short"))
    said = run_tailwise("report", catalog.folder, "--output", tmp_path / "r").stdout
    assert "note: 1 of these samples have no picture" in said
    samples = blocks((tmp_path / "r" / "index.html").read_text(encoding="utf-8"))["lists"]["samples"]
    assert [sample["image"] for sample in samples.values()] == [
        "the tar is compressed: `tailwise unpack` makes it readable"
    ]


def test_an_earlier_report_and_other_files_outlive_a_failure(tmp_path, tree_bytes, monkeypatch):
    monkeypatch.setattr("tailwise.report.page.ONE_FILE_BYTES", 0)
    page = {"title": "t", "about": "a"}
    write_page(tmp_path, page, {"meta": "{}"}, {"chunk-0": "{}", "lists": "{}"})
    (tmp_path / "data" / "mine.js").write_text("mine")
    before = tree_bytes(tmp_path)
    with pytest.raises(OSError, match="no/such"):
        write_page(tmp_path, page, {"meta": "[]"}, {"chunk-1": "{}", "no/such": "{}"})
    assert tree_bytes(tmp_path) == before
    write_page(tmp_path, page, {"meta": "{}"}, {"chunk-1": "{}"})
    assert sorted(tree_bytes(tmp_path)) == ["data/chunk-1.js", "data/mine.js", "index.html"]


def test_a_report_without_its_page_is_written_again(report_catalog, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "chunk-0.js").write_text("of a process that was killed")
    tailwise.make_report(report_catalog, ReportRequest(output=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_mistakes(report_catalog, tmp_path):
    (tmp_path / "index.html").write_text("<p>mine")
    (tmp_path / "summary.json").write_text('{"format": 1, "rests_on": {}, "rows": []}')
    cases = (
        ({"output": tmp_path}, "no report of tailwise"),
        ({"output": tmp_path / "r", "clustering": "mian"}, "did you mean 'main'"),
        ({"output": tmp_path / "r", "plan": ["epoch"]}, "no plan|epoch"),
        (
            {"output": tmp_path / "r", "study": tmp_path},
            "summary.json cannot be shown .*'sets'.*repeat `tailwise compare`",
        ),
    )
    for given, said in cases:
        with pytest.raises(UserError, match=said):
            tailwise.make_report(report_catalog, ReportRequest(**given))
    for given in ({"projection": "tsne"}, {"samples_per_second": 0.0}, {"images": 0}):
        with pytest.raises(UserError):
            ReportRequest(output=tmp_path, **given)
    assert (tmp_path / "index.html").read_text() == "<p>mine"
