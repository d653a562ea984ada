import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tailwise.catalog import Catalog
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.drops import DROPPED_SCHEMA
from tailwise.catalog.files import note_digest
from tailwise.cli import app
from tailwise.errors import UserError
from tailwise.plan import Plan
from tailwise.requests import ClusterRequest, PlanRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.drops import write_drops
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.upkeep.excluded import write_excluded
from tailwise.steps.upkeep.remove import remove
from tailwise.steps.upkeep.why import why

PLANS = {
    "epochs": PlanRequest("dynamics", keep=0.4, clustering="clean"),
    "subset": PlanRequest("dbp", keep=0.3, clustering="clean"),
    "once": PlanRequest("random", keep=0.5, dynamic=False, without=["sizes"]),
    "rare": PlanRequest("random", budget=1),
}
LISTS = {
    "duplicates": ("dedup", (), [(7, "duplicate", None, 3, 590, 0.99), (8, "identical", None, 3, 12, 1.0)]),
    "sizes": ("filter", ("duplicates",), [(9, "caption too short", 3.0, None, None, None)]),
}
REMOVED, NO_EMBEDDING = 20, 30


@pytest.fixture(scope="session")
def _told_source(_small_catalog_source, tmp_path_factory):
    """`small_catalog` with drop lists, a clustering without them, all of PLANS, one row without embedding, and one that is removed."""
    folder = tmp_path_factory.mktemp("told")
    catalog = Catalog.open(shutil.copytree(_small_catalog_source / "catalog", folder / "catalog"))
    for name, (kind, without, lines) in LISTS.items():
        columns = zip(*lines, strict=True)
        table = pa.table(
            [pa.array(list(values), field.type) for values, field in zip(columns, DROPPED_SCHEMA, strict=True)],
            schema=DROPPED_SCHEMA,
        )
        config = {"snapshot": 1, "without": list(without)}
        with Artifact(catalog.drops_folder(name), kind, config, {}) as artifact:
            artifact.finish({"dropped": write_drops(artifact, catalog.parts(), [table])})
    path = catalog.embedding_folder("image") / "part-000000.npy"
    array = np.load(path)
    array[NO_EMBEDDING] = 0
    np.save(path, array)
    note_digest(path)
    cluster(catalog, ClusterRequest(k=12, name="clean", without=["sizes"]))
    for name, request in PLANS.items():
        make_plan(catalog, name, request)
    (folder / "keys.txt").write_text(f"{REMOVED:06d}\n")
    remove(catalog, folder / "keys.txt", reason="takedown 7")
    return catalog.folder


@pytest.fixture
def told(_told_source, tmp_path):
    """A copy of it."""
    return Catalog.open(shutil.copytree(_told_source, tmp_path / "catalog"))


def only(story):
    assert len(story["samples"]) == 1
    return story["samples"][0]


def by_name(items):
    return {item["name"]: item for item in items}


@pytest.mark.parametrize("row", [0, 459, 460, 599])
def test_where_it_lies(told, row):
    """In every part and row group, by key and by uid."""
    part = next(part for part in told.parts() if row < part.span.stop)
    written = told.samples(part).slice(row - part.first_row, 1).to_pylist()[0]
    sample = only(why(told, f"{row:06d}"))
    assert only(why(told, written["uid"].hex().upper())) == sample
    shard = told.shards().to_pylist()[written["shard"]]
    with Path(sample["shard"]).open("rb") as stream:
        stream.seek(sample["caption_offset"])
        assert stream.read(sample["caption_bytes"]).decode() == sample["caption"] == written["caption"]
    assert (sample["row"], sample["shard"], sample["shard_id"]) == (row, shard["path"], written["shard"])
    assert (sample["key"], sample["uid"]) == (f"{row:06d}", written["uid"].hex())
    assert sample["embeddings"] == {"image": True, "text": False}
    assert sample["removed"] is None
    assert json.loads(json.dumps(sample)) == sample


def test_row_groups_are_searched_one_by_one(told):
    """As large parts have them; small ones have one."""
    for part in told.parts():
        pq.write_table(told.samples(part), told.samples_path(part.number), row_group_size=50)
        note_digest(told.samples_path(part.number))
    for row in (0, 49, 50, 459, 460, 599):
        assert only(why(told, f"{row:06d}"))["row"] == row
        assert only(why(told, f"{row:06d}"))["key"] == f"{row:06d}"


def test_its_clusters(told):
    table = pq.read_table(told.clusters_folder("clean") / "clusters.parquet")
    label, rank, similarity = (
        np.load(told.clusters_folder("clean") / f"{name}-part-000001.npy") for name in ("label", "rank", "similarity")
    )
    item = by_name(only(why(told, "000500"))["clusterings"])["clean"]
    assert (item["cluster"], item["rank"], item["similarity"]) == (label[40], rank[40], similarity[40])
    assert item["size"] == table["size"][int(label[40])].as_py()
    assert item["why_none"] is None
    for row in (7, NO_EMBEDDING):
        item = by_name(only(why(told, f"{row:06d}"))["clusterings"])["clean"]
        assert item["cluster"] is None
        assert item["why_none"].startswith("it took no part")
    assert only(why(told, f"{NO_EMBEDDING:06d}"))["embeddings"]["image"] is False


def test_verdicts_of_drop_lists(told):
    first = told.shards()["path"].to_pylist()
    lists = by_name(only(why(told, "000007"))["drop_lists"])
    assert lists["duplicates"] == {
        "name": "duplicates", "kind": "dedup", "snapshot": 1, "verdict": "dropped", "reason": "duplicate", "cluster": 3,
        "similarity": float(np.float32(0.99)), "kept_shard": first[2], "kept_key": "000590",
    }  # fmt: skip
    assert lists["sizes"]["verdict"] == "not asked"
    assert lists["sizes"]["reason"] == "duplicates had dropped it"
    lists = by_name(only(why(told, "000009"))["drop_lists"])
    assert lists["duplicates"]["verdict"] == "kept"
    assert (lists["sizes"]["verdict"], lists["sizes"]["value"]) == ("dropped", 3.0)
    assert {item["verdict"] for item in only(why(told, "000010"))["drop_lists"]} == {"kept"}


@pytest.mark.parametrize("name", PLANS)
def test_its_epochs_are_those_of_the_plan(told, name):
    plan = Plan(told, name)
    draws = np.stack([plan.draw(epoch) for epoch in range(100)])
    for row in (*range(11), REMOVED, NO_EMBEDDING, 599):
        item = only(why(told, f"{row:06d}", [name]))["plans"]
        assert [each["name"] for each in item] == [name]
        item = item[0]
        assert item["rate"] == pytest.approx(plan.rate(slice(row, row + 1))[0])
        assert item["draw"] == plan.draw_name
        if row == REMOVED:
            assert item["never"] == {"stage": "remove", "reason": "takedown 7"}
            assert (item["copies"], item["first_epoch"]) == ([0] * 10, None)
            continue
        assert item["copies"] == draws[:10, row].tolist()
        held = np.flatnonzero(draws[:, row])
        assert item["first_epoch"] == (held[0] if len(held) else None)
        if len(held):
            assert item["never"] is None
    if name == "rare":
        assert item["never"] is None  # it may come after the hundredth epoch


def test_why_and_removed_agree(told, tmp_path):
    for name in PLANS:
        write_excluded(told, tmp_path / "removed.parquet", Plan(told, name), overwrite=True)
        listed = {line["key"]: line for line in pq.read_table(tmp_path / "removed.parquet").to_pylist()}
        reasons = set()
        for row in (*range(0, 600, 40), 7, 8, 9, REMOVED, NO_EMBEDDING):
            never = only(why(told, f"{row:06d}", [name]))["plans"][0]["never"]
            assert (never is None) == (f"{row:06d}" not in listed)
            if never:
                assert never == {key: listed[f"{row:06d}"][key] for key in ("stage", "reason")}
                reasons.add(never["stage"])
        assert reasons >= ({"remove"} if name == "rare" else {"remove", "dedup", "filter"})


def test_several_samples_of_one_key_and_a_later_import(told, tmp_path, make_pool, make_tar, make_image):
    """What is older than a sample never heard of it."""
    image = make_image()
    members = [
        ("000005.jpg", image),
        ("000005.txt", b"again"),
        ("new.jpg", image),
        ("new.txt", b"new"),
        ("lost.jpg", image),
    ]
    make_tar(tmp_path / "more" / "a.tar", members)
    import_pool([str(tmp_path / "more")], told.folder, workers=1)
    story = why(told, "000005")
    assert [sample["row"] for sample in story["samples"]] == [5, 600]
    assert story["samples"][0]["caption"] != story["samples"][1]["caption"] == "again"
    late = only(why(told, "new"))
    assert all("after snapshot 1" in item["why_none"] for item in late["clusterings"])
    assert all("after snapshot 1" in item["reason"] for item in late["drop_lists"])
    assert all("after snapshot 1" in item["never"]["reason"] for item in late["plans"])
    lost = why(told, "lost")
    assert lost["samples"] == []
    assert [(case["stage"], case["reason"]) for case in lost["rejected"]] == [("import", "image without caption")]
    (tmp_path / "keys.txt").write_text("000005\n")
    remove(told, tmp_path / "keys.txt")
    assert [sample["removed"]["reason"] for sample in why(told, "000005")["samples"]] == ["on request"] * 2


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("000005.jpg", "did you mean 000005"),
        ("5", "did you mean 000005"),
        ("/pool/00000.tar/000005.jpg", "did you mean 000005"),
        ("0000o5", "did you mean 0000"),
        ("nothing", "give it as it stands in the shard, without extension"),
        ("", "give it as it stands in the shard"),
        ("f" * 32, "no sample of .* has the key or uid 'ffff"),
    ],
)
def test_an_unknown_key_is_told_with_near_ones(told, asked, near):
    with pytest.raises(UserError, match=near):
        why(told, asked)


def test_an_unknown_plan_is_an_error(told):
    with pytest.raises(UserError, match="no plan named 'other'"):
        why(told, "000005", ["other"])


def test_the_command(told):
    def run(*arguments):
        result = CliRunner().invoke(app, ["why", str(told.folder), *arguments], catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout

    assert json.loads(run("000005", "--json")) == why(told, "000005")
    text = run("000007", "--plan", "subset")
    for line in (
        "row 7",
        "dropped: duplicate, kept 000590 of ",
        "cosine 0.9900",
        "subset: never drawn: dedup, duplicates: duplicate",
    ):
        assert line in text
    assert "plan        epochs" not in text
    assert "removed     on 20" in run(f"{REMOVED:06d}")
    ranked = next(row for row in range(40, 600) if Plan(told, "subset").draw(0)[row] == 0)
    assert ", rank " in run(f"{ranked:06d}", "--plan", "subset")
    assert "in the first 10 epochs: " in run("000040", "--plan", "epochs")
