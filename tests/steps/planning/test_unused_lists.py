import json

import numpy as np
import pytest
from typer.testing import CliRunner

from tailwise.catalog.drops import DropList
from tailwise.cli import app
from tailwise.errors import UserError
from tailwise.requests import ClusterRequest, FilterRequest, PlanRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.planning.unused_lists import left_out_of_plan, unused_by_clustering, unused_by_plan
from tailwise.steps.scoring.filter import filter_samples


@pytest.fixture
def listed(small_catalog):
    """A clustering of all samples, and one without "large", which was made without "short"."""
    cluster(small_catalog, ClusterRequest(k=8, name="all"))
    filter_samples(small_catalog, FilterRequest("caption-characters", maximum=7, name="short"))
    filter_samples(small_catalog, FilterRequest("image-bytes", keep=0.5, name="large", without=["short"]))
    cluster(small_catalog, ClusterRequest(k=8, name="left", without=["large"]))
    return small_catalog


def masks(catalog):
    return {name: DropList(catalog, name).mask[:] for name in ("short", "large")}


@pytest.mark.parametrize(
    "request_",
    [
        PlanRequest("dynamics", keep=0.3, clustering="all"),
        PlanRequest("dynamics", keep=0.3, clustering="all", without=["short"]),
        PlanRequest("dynamics", keep=0.3, clustering="all", without=["large"]),
        PlanRequest("dynamics", keep=0.3, clustering="left"),
        PlanRequest("random", keep=0.1, dynamic=False),
        PlanRequest("dbp", keep=0.1, clustering="all"),
    ],
)
def test_lists_are_named_whose_samples_a_plan_can_draw(listed, request_):
    plan = make_plan(listed, "p", request_)
    drawn = sum(plan.draw(epoch).astype(int) for epoch in range(30)) > 0
    found = {item.name: item for item in unused_by_plan(plan)}
    expected = {name: int((mask & drawn).sum()) for name, mask in masks(listed).items()}
    assert {name: item.drawable for name, item in found.items()} == {name: n for name, n in expected.items() if n}
    for item in found.values():
        assert item.samples == masks(listed)[item.name].sum()
        assert f"`without` {item.name}" in item.note()
    out = left_out_of_plan(plan)
    assert out.removed + out.dropped + out.ungrouped == 600 - plan.manifest["summary"]["eligible"]
    assert out.ungrouped == 0


def test_clusterings_name_them_too(listed):
    assert [item.name for item in unused_by_clustering(listed, "all")] == ["large", "short"]
    assert unused_by_clustering(listed, "left") == []


def test_a_list_of_an_older_snapshot_counts_by_its_rows(listed, tmp_path, make_pool):
    make_pool(tmp_path / "more", [10], first_shard=70)
    import_pool([str(tmp_path / "more")], listed.folder, workers=1)
    plan = make_plan(listed, "p", PlanRequest("random", keep=1.0))
    notes = {item.name: (item.drawable, item.note()) for item in unused_by_plan(plan)}
    assert {name: count for name, (count, _) in notes.items()} == {n: int(m.sum()) for n, m in masks(listed).items()}
    assert all("is for snapshot 1: make one for the newest snapshot" in note for _, note in notes.values())


def test_the_commands_say_so(listed, tmp_path):
    folder = str(listed.folder)

    def run(*arguments):
        result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout

    command = ("plan", folder, "p", "--method", "flat", "--keep", "0.3", "--clusters", "all")
    short = int(np.sum(masks(listed)["short"]))
    note = f"note: drop list 'short' is not used: {short} of its {short} samples can still be drawn"
    output = str(tmp_path / "x")
    commands = [
        command,
        ("explain", folder, "p"),
        ("export", folder, "p", output, "--to", "rates-json"),
    ]
    for words in commands:
        assert note in run(*words)
        told = json.loads(run(*words, "--json", *(["--overwrite"] if words[0] == "export" else [])))
        assert [item["name"] for item in told["unused_drop_lists"]] == ["large", "short"]
    told = json.loads(run(*command, "--json"))
    assert (told["pool"], told["budget"], told["share_of_pool"], told["eligible"]) == (600, 180, 0.3, 600)
    assert "samples are in its clusters" in run("cluster", folder, "--clusters", "8", "--name", "all")
    assert "is not used" not in run("plan", folder, "q", "--method", "flat", "--keep", "0.3", "--clusters", "left")
    told = run("explain", folder, "q")
    assert "budget 180 of 600 samples (30.0% of the pool); 300 samples can be drawn (50.0% of the pool)" in told


def test_a_damaged_manifest_is_named(listed):
    plan = make_plan(listed, "p", PlanRequest("dynamics", keep=0.3, clustering="all"))
    manifest = listed.clusters_folder("all") / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"identity"', '"identitx"'))
    for look in (lambda: unused_by_plan(plan), lambda: unused_by_clustering(listed, "all")):
        with pytest.raises(UserError, match=r"manifest.json is damaged \(its checksum is wrong\)"):
            look()


def test_a_damaged_list_is_no_deleted_one(listed):
    plan = make_plan(listed, "p", PlanRequest("dynamics", keep=0.3, clustering="all", without=["short"]))
    manifest = listed.drops_folder("short") / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"identity"', '"identitx"'))
    with pytest.raises(UserError, match=r"manifest.json is damaged \(its checksum is wrong\)"):
        left_out_of_plan(plan)
    manifest.unlink()
    assert left_out_of_plan(plan).dropped == 0
