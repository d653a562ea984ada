"""Plan bundles: the same epochs on another copy of the pool, in other tars and another order, with 5 % of the samples missing."""

import hashlib
import json
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tailwise.cli import app
from tailwise.errors import UserError
from tailwise.export import export
from tailwise.export.plan_bundle import CARD, RECORD, SAMPLES
from tailwise.loader.epoch import EpochDataset
from tailwise.plan.explain import first_epoch
from tailwise.plan.plan import Plan
from tailwise.requests import ExportRequest, GroupRequest, PlanRequest
from tailwise.steps.grouping.group import group
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.upkeep.remove import remove

ROWS = 240
EPOCHS = (0, 1, 2, 5, 9)
UIDS = [hashlib.md5(b"uid %d" % row).hexdigest() for row in range(ROWS)]
LOST = {*range(7, ROWS, 20)}  # 5 %


def write_tars(make_tar, image, folder, rows, shards, *, uid=True):
    """Tars of some samples; their JSON notes url, sha256 and, if asked for, the uid."""
    for shard, mine in enumerate(np.array_split(np.array(rows), shards)):
        members = []
        for row in mine.tolist():
            about = {"url": f"https://x/{row}", "sha256": hashlib.sha256(b"%d" % row).hexdigest()}
            about |= {"uid": UIDS[row]} if uid else {}
            members += [(f"{row:04d}.jpg", image), (f"{row:04d}.txt", f"word{row % 7} of {row}".encode())]
            members.append((f"{row:04d}.json", json.dumps(about).encode()))
        make_tar(folder / f"{shard:05d}.tar", members)
    return folder


@pytest.fixture(scope="module")
def pools(tmp_path_factory, make_tar, make_image):
    """Catalogs of a pool, of a copy in another order, of one that lacks 5 % and has others, and of one whose sources note no uid."""
    folder, image = tmp_path_factory.mktemp("bundles"), make_image()
    order = np.random.default_rng(3).permutation(ROWS).tolist()
    kept = [row for row in order if row not in LOST]
    tars = {
        "ours": (range(ROWS), 4, True),
        "copy": (order, 3, True),
        "lacking": (kept, 5, True),
        "unnamed": (kept, 2, False),
    }
    for name, (rows, shards, uid) in tars.items():
        write_tars(make_tar, image, folder / "tars" / name, list(rows), shards, uid=uid)
        import_pool(folder / "tars" / name, folder / name, workers=1, part_rows=100)
    groups = [f"{row:04d},{'abc'[(row % 10 > 5) + (row % 10 > 8)]}" for row in range(ROWS)]
    (folder / "groups.csv").write_text("\n".join(["key,g", *groups]))
    (folder / "entries.txt").write_text("\n".join(f"word{n}" for n in range(7)))
    rates = {f"{row:04d}": (row % 6) / 2 for row in range(ROWS)}
    (folder / "rates.json").write_text(json.dumps(rates))
    from tailwise.catalog import Catalog

    ours = Catalog.open(folder / "ours")
    group(ours, GroupRequest(by="g", file=folder / "groups.csv"))
    shared = {"keep": 0.4, "clustering": "g", "seed": 5}
    requests = {
        "stream": PlanRequest("dynamics", **shared),
        "repeats": PlanRequest("flat", max_repeats=3, **{**shared, "keep": 1.2}),
        "annealed": PlanRequest("dynamics", alpha=0.0, alpha_end=1.0, anneal_epochs=4, **shared),
        "bernoulli": PlanRequest("dynamics", draw="bernoulli", **shared),
        "once": PlanRequest("flat", dynamic=False, **shared),
        "ranked": PlanRequest("top-score", score="caption-characters", keep=0.3),
        "rates": PlanRequest("rates", rates=folder / "rates.json", seed=2),
        "balanced": PlanRequest("text-balance", entries=folder / "entries.txt", per_entry=9, seed=4, dynamic=True),
        "scs": PlanRequest("scs", score="caption-characters", keep=1.5, seed=1),
        "scs-rates": PlanRequest("scs", score="caption-characters", keep=1.5, draw="bernoulli"),
        "stream-rates": PlanRequest("rates", rates=folder / "rates.json", draw="stream"),
        "mixture": PlanRequest("mixture", shares={"a": 0.5, "b": 0.3, "c": 0.2}, keep=0.4, clustering="g"),
        "mixed-scs": PlanRequest("mixture", of="scs", shares={"b": 0.5, "c": 0.5}, clustering="g", max_repeats=30),
    }
    for name, request in requests.items():
        export(make_plan(ours, name, request), "plan-bundle", folder / f"bundle-{name}")
    return folder, {name: Catalog.open(folder / name) for name in tars}, tuple(requests)


PLANS = ("stream", "repeats", "annealed", "bernoulli", "once", "ranked", "rates", "balanced")
PLANS += ("scs", "scs-rates", "stream-rates", "mixture", "mixed-scs")


def drawn(plan, epoch):
    """{number of the sample: copies} of an epoch."""
    keys = [key for part in plan.catalog.parts() for key in plan.catalog.samples(part, ["key"]).column(0).to_pylist()]
    return {int(keys[row]): int(plan.draw(epoch)[row]) for row in np.flatnonzero(plan.draw(epoch)).tolist()}


@pytest.mark.parametrize("name", PLANS)
def test_the_epochs_are_the_same_on_a_copy_in_another_order(pools, name):
    folder, catalogs, _ = pools
    ours, theirs = (
        Plan(catalogs["ours"], name),
        make_plan(catalogs["copy"], name, PlanRequest(source=str(folder / f"bundle-{name}"))),
    )
    assert theirs.summary["missing"] == 0 and theirs.summary["matched_by"] == "uid"
    for epoch in EPOCHS:
        assert drawn(theirs, epoch) == drawn(ours, epoch)
    assert theirs.changes == ours.changes and theirs.annealed == (name == "annealed")
    assert first_epoch(theirs).total == pytest.approx(first_epoch(ours).total)
    if ours.changes:  # else the bundle holds copies
        assert theirs.has_clusters == ours.has_clusters


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("pool", ["lacking", "unnamed"])
def test_with_samples_missing_the_other_draws_are_the_same_and_they_are_listed(pools, name, pool):
    folder, catalogs, _ = pools
    request = PlanRequest(source=str(folder / f"bundle-{name}"))
    ours, theirs = Plan(catalogs["ours"], name), make_plan(catalogs[pool], name, request)
    bundle = pq.read_table(folder / f"bundle-{name}" / SAMPLES)
    gone = [uid for uid in bundle["uid"].to_pylist() if UIDS.index(uid) in LOST]
    assert theirs.summary["missing"] == len(gone) > 0
    assert theirs.summary["matched_by"] == ("uid" if pool == "lacking" else "sha256")
    for epoch in EPOCHS:
        assert drawn(theirs, epoch) == {row: count for row, count in drawn(ours, epoch).items() if row not in LOST}
    assert pq.read_table(theirs.folder / "missing.parquet")["uid"].to_pylist() == gone
    assert not theirs.exact
    expected = sum(theirs.rate(np.arange(theirs.rows)))
    assert first_epoch(theirs).total == pytest.approx(expected)
    if name == "stream":
        with pytest.raises(UserError, match="known only after the draw"):
            theirs.counts(0)


def test_a_training_reads_what_an_incomplete_plan_draws(pools):
    folder, catalogs, _ = pools
    for name in ("stream", "rates"):
        plan = make_plan(catalogs["lacking"], f"trained-{name}", PlanRequest(source=str(folder / f"bundle-{name}")))
        for epoch in (0, 3):
            data = EpochDataset(plan, batch_size=8, epoch=epoch)
            rows = Counter(int(data[at]["row"]) for at in range(len(data)))
            copies = plan.draw(epoch)
            assert rows == Counter({row: int(copies[row]) for row in np.flatnonzero(copies).tolist()})


def test_the_same_plan_gives_the_same_bytes_and_the_record_says_what_it_was_made_from(pools, tmp_path, tree_bytes):
    folder, catalogs, _ = pools
    plan = Plan(catalogs["ours"], "stream")
    assert export(plan, "plan-bundle", tmp_path / "b", request=ExportRequest(licence="cc-by-4.0")) == ROWS
    export(plan, "plan-bundle", tmp_path / "b", request=ExportRequest(licence="cc-by-4.0"))  # a repeated command
    export(plan, "plan-bundle", tmp_path / "c", request=ExportRequest(licence="cc-by-4.0"))
    assert tree_bytes(tmp_path / "b") == tree_bytes(tmp_path / "c")
    record = json.loads((tmp_path / "b" / RECORD).read_text())
    assert (
        record["seed"] == 5
        and record["plan"]["config"]["method"] == "dynamics"
        and "clusterings/g" in record["made_from"]
    )
    assert str(folder) not in (tmp_path / "b" / RECORD).read_text()
    card = (tmp_path / "b" / CARD).read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\n") and "tailwise plan my-catalog shared --from" in card
    table = pq.read_table(tmp_path / "b" / SAMPLES)
    assert table["uid"].to_pylist() == UIDS and table["url"][3].as_py() == "https://x/3"
    assert table["sha256"][9].as_py() == hashlib.sha256(b"9").hexdigest()
    with pytest.raises(UserError, match="exists"):
        export(Plan(catalogs["ours"], "rates"), "plan-bundle", tmp_path / "b")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "x").write_text("")
    with pytest.raises(UserError, match="`epoch` does nothing in an export to plan-bundle, which is of all epochs"):
        export(plan, "plan-bundle", tmp_path / "of-one", epoch=3)
    with pytest.raises(UserError, match="holds something else"):
        export(plan, "plan-bundle", tmp_path / "else")
    with pytest.raises(UserError, match="`licence` 'a b'"):
        ExportRequest(licence="a b")


def test_removed_samples_are_in_no_bundle_and_are_missing(pools, tmp_path):
    folder, catalogs, _ = pools
    shutil.copytree(folder / "copy", tmp_path / "copy")
    from tailwise.catalog import Catalog

    catalog = Catalog.open(tmp_path / "copy")
    (tmp_path / "gone.txt").write_text(UIDS[10])
    remove(catalog, tmp_path / "gone.txt")
    plan = make_plan(catalog, "after", PlanRequest(source=str(folder / "bundle-stream")))
    assert plan.summary["missing"] == 1 and all(10 not in drawn(plan, epoch) for epoch in range(6))
    assert export(plan, "plan-bundle", tmp_path / "b") == ROWS - 1
    again = make_plan(catalogs["ours"], "twice", PlanRequest(source=str(tmp_path / "b")))
    assert drawn(again, 3) == drawn(plan, 3)
    assert again.summary["missing"] == 0 and not again.exact  # its groups lack the removed one


def test_samples_of_one_url_belong_together_in_order(tmp_path, make_tar, make_image):
    image, catalogs = make_image(), {}
    urls = ["a", "b", "a", "a", "c", "b"]
    for name, order in {"one": (0, 1, 2, 3, 4, 5), "two": (4, 3, 1, 0, 2)}.items():  # the second has one "b" only
        members = []
        for row in order:
            about = json.dumps({"url": f"https://{urls[row]}"}).encode()
            members += [(f"{name}{row}.jpg", image), (f"{name}{row}.txt", b"c"), (f"{name}{row}.json", about)]
        make_tar(tmp_path / "tars" / name / "0.tar", members)
        catalogs[name] = import_pool(tmp_path / "tars" / name, tmp_path / name, workers=1).catalog
    (tmp_path / "r.json").write_text(json.dumps({f"one{row}": row + 1.0 for row in range(6)}))
    export(
        make_plan(catalogs["one"], "p", PlanRequest("rates", rates=tmp_path / "r.json")), "plan-bundle", tmp_path / "b"
    )
    plan = make_plan(catalogs["two"], "p", PlanRequest(source=str(tmp_path / "b")))
    assert plan.draw(0).tolist() == [5, 1, 2, 3, 4] and plan.summary["missing"] == 1


def test_what_is_no_bundle_is_refused(pools, tmp_path):
    folder, catalogs, _ = pools
    catalog, good = catalogs["lacking"], folder / "bundle-stream"

    def refused(message, source=tmp_path / "b", **options):
        with pytest.raises(UserError, match=message):
            make_plan(catalog, "x", PlanRequest(source=str(source), **options))

    def changed(name, content):
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        shutil.copytree(good, tmp_path / "b")
        (tmp_path / "b" / name).write_bytes(content)

    record = json.loads((good / RECORD).read_text())
    refused("is no plan bundle", tmp_path / "absent")
    refused(r"228 of 240|12 of 240 names in .*less than `strict` 0.96", good, strict=0.96)
    refused("`seed` does nothing with method 'bundle'", good, seed=3)
    refused("`match` 'key'", good, match="key")
    changed(RECORD, b"{")
    refused("can't be read")
    changed(RECORD, json.dumps({**record, "format": 9}).encode())
    refused("format 9, this tailwise reads 1")
    changed(RECORD, json.dumps({**record, "files": {**record["files"], "../../x": {}}}).encode())
    refused("is damaged")
    for damage in ({"files": {SAMPLES: "x"}}, {"files": {SAMPLES: None}}, {"by_rate": True}, {"rate_groups": 1}):
        changed(RECORD, json.dumps({**record, **damage}).encode())
        refused("is damaged")
    changed(SAMPLES, b"PAR1")
    refused("is missing, or not the file that")
    strangers = pq.read_table(good / SAMPLES)
    names = {name: pa.array([f"{at:032x}"] * ROWS) for at, name in enumerate(("uid", "sha256", "url"), 7)}
    for name, values in names.items():
        strangers = strangers.set_column(strangers.schema.get_field_index(name), strangers.schema.field(name), values)
    changed("x", b"")
    pq.write_table(strangers, tmp_path / "b" / SAMPLES)
    from tailwise.catalog.files import file_digest

    files = {**record["files"], SAMPLES: {"digest": file_digest(tmp_path / "b" / SAMPLES)}}
    (tmp_path / "b" / RECORD).write_text(json.dumps({**record, "files": files}))
    refused("not one of the 240 samples of the bundle is in this pool")


def test_the_commands(pools, tmp_path):
    _, catalogs, _ = pools

    def run(*words):
        result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0
        return " ".join(result.stdout.split())

    assert "240 entries" in run(
        "export", catalogs["ours"].folder, "stream", "--to", "plan-bundle", "--output", tmp_path / "b"
    )
    told = run("plan", catalogs["lacking"].folder, "theirs", "--from", tmp_path / "b")
    assert "228 of 240 names of the file (95.0%) belong to samples, by uid" in told
    assert "12 samples of the bundle" in told and "missing.parquet" in told
    assert "no sample of the bundle is missing" in run(
        "plan", catalogs["copy"].folder, "theirs", "--from", tmp_path / "b"
    )
    assert "plan 'theirs': method bundle" in run("explain", catalogs["lacking"].folder, "theirs")
