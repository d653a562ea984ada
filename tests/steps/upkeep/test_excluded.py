import csv
import itertools
import json
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tailwise.catalog import Catalog, layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.drops import DROPPED_SCHEMA
from tailwise.catalog.files import file_stamp, note_digest
from tailwise.cli import app
from tailwise.errors import UserError
from tailwise.plan import Plan
from tailwise.requests import ClusterRequest, GroupRequest, PlanRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.drops import write_drops
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.upkeep import excluded as module
from tailwise.steps.upkeep.excluded import EXCLUDED_SCHEMA, write_excluded
from tailwise.steps.upkeep.remove import remove

EPOCHS = 12
REQUESTS = {
    "stream": PlanRequest("dynamics", keep=0.5, clustering="clean"),
    "bernoulli": PlanRequest("dynamics", keep=0.5, clustering="clean", draw="bernoulli"),
    "often": PlanRequest("flat", keep=2.0, max_repeats=20, clustering="clean"),
    "annealed": PlanRequest("dynamics", keep=0.3, clustering="clean", alpha_end=1.0, anneal_epochs=5),
    "static": PlanRequest("dbp", keep=0.4, pick="random", clustering="clean"),
    "static-bernoulli": PlanRequest("dynamics", keep=0.4, dynamic=False, draw="bernoulli", clustering="clean"),
    "ranked": PlanRequest("dbp", keep=0.3, clustering="clean"),
    "few": PlanRequest("dbp", budget=4, pick="random", min_per_cluster=0, clustering="clean"),
    "pool": PlanRequest("random", keep=0.5),
    "pool-without": PlanRequest("random", keep=0.5, without=["sizes"]),
}


@pytest.fixture(scope="session")
def make_drops():
    """`make_drops(catalog, name, lines, kind="dedup", without=())` writes a drop list of DROPPED_SCHEMA rows."""

    def write(catalog, name, lines, kind="dedup", without=()):
        snapshot = catalog.snapshot()
        columns = zip(*sorted(lines), strict=True)
        table = pa.table(
            [pa.array(list(values), field.type) for values, field in zip(columns, DROPPED_SCHEMA, strict=True)],
            schema=DROPPED_SCHEMA,
        )
        config = {"snapshot": snapshot.number, "without": list(without)}
        with Artifact(catalog.drops_folder(name), kind, config, {"snapshot": snapshot.id}) as artifact:
            artifact.finish({"dropped": write_drops(artifact, catalog.parts(), [table])})

    return write


@pytest.fixture(scope="session")
def _curated_source(_small_catalog_source, make_drops, tmp_path_factory):
    """A catalog with two drop lists, one without the other, samples without embedding, and a clustering "clean"; and what they hit.

    Rows kept by the dedup lie in all shards and parts. The lists don't agree with each other's rows: "sizes" was made without
    "duplicates", and yet drops three that this drops.
    """
    folder = tmp_path_factory.mktemp("curated")
    small_catalog = Catalog.open(shutil.copytree(_small_catalog_source / "catalog", folder / "catalog"))
    generator = np.random.default_rng(1)
    rows = generator.permutation(600)
    duplicates, sizes, lacking = rows[:120], np.append(rows[117:200], rows[590]), rows[195:210]
    kept = {int(row): int(generator.choice(rows[300:])) for row in duplicates}
    near = {row: float(np.float32(generator.random())) for row in kept}
    lines = [(row, ("duplicate", "identical")[row % 2], None, row % 12, kept[row], near[row]) for row in kept]
    make_drops(small_catalog, "duplicates", lines)
    lines = [(int(row), "caption too short", 3.0, None, None, None) for row in sizes]
    make_drops(small_catalog, "sizes", lines, "filter", ["duplicates"])
    for part in small_catalog.parts():
        path = small_catalog.embedding_folder("image") / f"{part.name}.npy"
        array = np.load(path)
        mine = lacking[(lacking >= part.first_row) & (lacking < part.span.stop)]
        array[mine - part.first_row] = 0
        np.save(path, array)
        note_digest(path)
    cluster(small_catalog, ClusterRequest(k=12, name="clean", without=["sizes"]))
    taken = [int(row) for row in (*rows[:4], *rows[118:121], rows[205], *rows[400:410])]
    (folder / "keys.txt").write_text("".join(f"{row:06d}\n" for row in taken))
    return folder, {"duplicates": kept, "near": near, "sizes": sizes, "lacking": lacking, "taken": taken}


@pytest.fixture
def curated(_curated_source, tmp_path):
    """A copy of it, and what its lists hit; tmp_path / "keys.txt" names samples to remove."""
    folder, hit = _curated_source
    shutil.copy(folder / "keys.txt", tmp_path)
    return Catalog.open(shutil.copytree(folder / "catalog", tmp_path / "catalog")), hit


def written(catalog, path, plan=None, **options):
    counts = write_excluded(catalog, path, plan, overwrite=True, **options)
    table = pq.read_table(path)
    assert table.schema.equals(EXCLUDED_SCHEMA)
    lines = table.to_pylist()
    assert [line["key"] for line in lines] == sorted(line["key"] for line in lines)  # keys are rows here
    assert counts == dict(sorted(Counter((line["stage"], line["reason"]) for line in lines).items()))
    return {int(line["key"]): line for line in lines}


def shard_paths(catalog):
    """The path of each row's shard."""
    paths = catalog.shards()["path"].to_pylist()
    return [paths[shard] for part in catalog.parts() for shard in catalog.samples(part, ["shard"])["shard"].to_pylist()]


@pytest.mark.parametrize("when", ["before", "after", "never"])
@pytest.mark.parametrize("name", [*REQUESTS, "rates", "static-rates"])
def test_they_are_the_complement_of_what_can_be_drawn(curated, tmp_path, name, when):
    """Whatever the draw, and whether samples were removed before the plan was made or behind it."""
    catalog, hit = curated
    if when == "before":
        remove(catalog, tmp_path / "keys.txt")
    if name in REQUESTS:
        plan = make_plan(catalog, "p", REQUESTS[name])
    else:
        rates = np.random.default_rng(2).choice([0.0, 0.3, 1.0, 2.5], 600)
        (tmp_path / "r.json").write_text(json.dumps({f"{row:06d}": rate for row, rate in enumerate(rates)}))
        plan = make_plan(catalog, "p", PlanRequest("rates", rates=tmp_path / "r.json", dynamic=name == "rates"))
    if when == "after":
        remove(catalog, tmp_path / "keys.txt")
    lines = written(catalog, tmp_path / "removed.parquet", plan)
    ever = np.zeros(600, bool)
    for epoch in range(EPOCHS):
        ever |= plan.draw(epoch) > 0
    hopeful = ever if not plan.dynamic else np.max([plan.rate(slice(0, 600), epoch) for epoch in range(EPOCHS)], 0) > 0
    assert not (ever & ~hopeful).any()
    if when != "never":
        hopeful[hit["taken"]] = False
    assert sorted(lines) == np.flatnonzero(~hopeful).tolist()
    removed = sorted(row for row, line in lines.items() if line["stage"] == "remove")
    assert removed == ([] if when == "never" else sorted(hit["taken"]))


def test_each_has_its_first_cause(curated, tmp_path):
    catalog, hit = curated
    plan = make_plan(catalog, "p", REQUESTS["ranked"])
    remove(catalog, tmp_path / "keys.txt", reason="takedown")
    lines = written(catalog, tmp_path / "removed.parquet", plan)
    paths = shard_paths(catalog)
    groups = plan.groups[:]
    ranked = [row for row in range(600) if groups[row] >= 0 and not plan.draw(0)[row]]
    seen = Counter()
    labels = np.concatenate([*Clustering.open(catalog, "clean").parts(layout.LABEL)])
    captions = list(itertools.chain(*(catalog.samples(part)["caption"].to_pylist() for part in catalog.parts())))
    nothing = dict.fromkeys(("kept_shard", "kept_key", "similarity"))
    for row, line in lines.items():
        group = int(groups[row])
        expected = {"shard": paths[row], "key": f"{row:06d}", "cluster": group if group >= 0 else None, **nothing}
        expected |= {"caption": captions[row], "group": f"cluster {labels[row]}" if labels[row] >= 0 else None}
        if row in hit["taken"]:
            cause = "remove", "takedown"
            words = "removed: takedown"
        elif row in hit["duplicates"]:
            cause = "dedup", f"duplicates: {('duplicate', 'identical')[row % 2]}"
            kept = hit["duplicates"][row]
            expected |= {"kept_shard": paths[kept], "kept_key": f"{kept:06d}", "cluster": row % 12}
            expected["similarity"] = near = hit["near"][row]
            words = f"{cause[1].split()[1]}: like {kept:06d}, similarity {near:.3f} (drop list duplicates)"
        elif row in hit["sizes"]:
            cause = "filter", "sizes: caption too short"
            words = "caption too short (drop list sizes)"
        elif row in hit["lacking"]:
            cause = "cluster", "clean: no image embedding"
            words = "no image embedding, so it is in no group of clustering clean"
        else:
            assert row in ranked
            cause = "plan", "not picked (hardest first)"
            size, kept = (groups == group).sum(), plan.draw(0)[groups == group].sum()
            words = (
                f"cluster {group} has {size} samples, {100 * kept / size:.3g} % are kept: not picked (hardest first)"
            )
        seen[cause[0]] += 1
        assert line == {**expected, "explanation": words, "stage": cause[0], "reason": cause[1]}
    assert seen["remove"] == len(hit["taken"])
    assert min(seen[stage] for stage in ("dedup", "filter", "cluster", "plan")) >= 9
    assert seen["plan"] > 200


@pytest.mark.parametrize(
    ("name", "reason"),
    [("static", "not in the one draw of a static plan"), ("few", "quota 0"), ("ranked", "not picked (hardest first)")],
)
def test_reasons_of_plans(curated, tmp_path, name, reason):
    catalog, _ = curated
    lines = written(catalog, tmp_path / "removed.parquet", make_plan(catalog, "p", REQUESTS[name]))
    assert reason in {line["reason"] for line in lines.values() if line["stage"] == "plan"}


def test_without_a_score_and_without_a_group(curated, tmp_path):
    from tailwise.requests import ScoreRequest
    from tailwise.steps.grouping.group import group

    catalog, _ = curated
    widths = pa.table({"key": [f"{row:06d}" for row in range(100, 600)], "topic": ["a", "b"] * 250})
    pq.write_table(widths, tmp_path / "topics.parquet")
    group(catalog, GroupRequest("topic", file=tmp_path / "topics.parquet"))
    plan = make_plan(catalog, "p", PlanRequest("proportional", keep=0.5, clustering="topic"))
    lines = written(catalog, tmp_path / "removed.parquet", plan)
    assert {row: line["reason"] for row, line in lines.items()} == dict.fromkeys(range(100), "topic: no value of topic")
    rates = pa.table({"key": [f"{row:06d}" for row in range(300)], "fame": np.arange(300.0)})
    pq.write_table(rates, tmp_path / "fame.parquet")
    score = ScoreRequest("fame", {"file": str(tmp_path / "fame.parquet")})
    plan = make_plan(
        catalog, "q", PlanRequest("proportional", budget=100, clustering="topic", pick="highest", score=score)
    )
    counts = Counter(
        (line["stage"], line["reason"].split(":")[0])
        for line in written(catalog, tmp_path / "r.parquet", plan).values()
    )
    assert counts["cluster", "topic"] == 100
    assert counts["plan", "no score fame"] == 300
    assert counts["plan", "not picked (highest first)"] == 100


def test_without_a_plan_all_lists_count(curated, tmp_path):
    catalog, hit = curated
    remove(catalog, tmp_path / "keys.txt")
    lines = written(catalog, tmp_path / "removed.parquet")
    assert set(lines) == {*hit["taken"], *hit["duplicates"], *hit["sizes"].tolist()}
    assert {line["stage"] for line in lines.values()} == {"remove", "dedup", "filter"}
    both = set(hit["duplicates"]) & set(hit["sizes"].tolist()) - set(hit["taken"])
    assert both
    assert all(lines[row]["stage"] == "dedup" for row in both)


def test_a_csv_for_people_runs_no_formulas(make_tar, make_image, tmp_path):
    """Of a grouping, whose values are named; captions, keys and reasons come from outside."""
    from tailwise.steps.grouping.group import group
    from tailwise.steps.importing.pool import import_pool

    hostile = '=HYPERLINK("http://x","y")\n@SUM(1)'
    rows = [(f"{at:03d}", "t-shirt" if at < 8 else "+ring") for at in range(10)]
    members = [
        item for key, _ in rows for item in ((f"{key}.jpg", make_image(int(key))), (f"{key}.txt", hostile.encode()))
    ]
    make_tar(tmp_path / "00000.tar", members)
    catalog = import_pool([str(tmp_path / "00000.tar")], tmp_path / "catalog", workers=1).catalog
    pq.write_table(
        pa.table({"key": [key for key, _ in rows], "type": [kind for _, kind in rows]}), tmp_path / "types.parquet"
    )
    group(catalog, GroupRequest("type", file=tmp_path / "types.parquet"))
    plan = make_plan(catalog, "p", PlanRequest("proportional", keep=0.5, clustering="type", dynamic=False))
    (tmp_path / "keys.txt").write_text("003\n")
    remove(catalog, tmp_path / "keys.txt", reason="=1+1")
    for _ in range(2):  # the second finds the same bytes
        counts = write_excluded(catalog, tmp_path / "out.csv", plan)
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert len(lines) == sum(counts.values()) >= 5
    assert {line["caption"] for line in lines} == {f"'{hostile}"}
    words = {(line["group"], line["explanation"], line["reason"]) for line in lines}
    reason = "not in the one draw of a static plan"
    assert words == {
        ("t-shirt", "removed: =1+1", "'=1+1"),
        ("t-shirt", f"group 't-shirt' has 8 samples, 50 % are kept: {reason}", reason),
        ("'+ring", f"group '+ring' has 2 samples, 50 % are kept: {reason}", reason),
    }
    with pytest.raises(UserError, match="exists: name another file"):
        write_excluded(catalog, tmp_path / "out.csv")
    write_excluded(catalog, tmp_path / "out.csv", overwrite=True)
    (tmp_path / "mine.csv").write_text("a,b\n")
    with pytest.raises(UserError, match="not a file of this format"):
        write_excluded(catalog, tmp_path / "mine.csv", overwrite=True)


def test_pieces_make_no_difference(curated, tmp_path, monkeypatch):
    catalog, _ = curated
    plan = make_plan(catalog, "p", REQUESTS["static"])
    write_excluded(catalog, tmp_path / "a.parquet", plan)
    monkeypatch.setattr(module, "CHUNK_ROWS", 7)
    write_excluded(catalog, tmp_path / "b.parquet", plan)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["catalog"]  # no scratch is left


def test_mistakes(curated, tmp_path):
    catalog, _ = curated
    plan = make_plan(catalog, "p", REQUESTS["stream"])
    path = tmp_path / "removed.parquet"
    counts, before = write_excluded(catalog, path, plan), file_stamp(path)
    assert write_excluded(catalog, path, plan) == counts
    with pytest.raises(UserError, match="exists: name another file, or replace it with `overwrite`"):
        write_excluded(catalog, path, plan, epochs=1)
    assert file_stamp(path) == before
    catalog.drops_folder("sizes").rename(tmp_path / "away")
    with pytest.raises(UserError, match="no drop list named 'sizes'"):
        write_excluded(catalog, tmp_path / "other.parquet", plan)
    (tmp_path / "away").rename(catalog.drops_folder("sizes"))
    catalog.clusters_folder("clean").rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"no clustering named 'clean' .*plan 'p' was made from it: restore"):
        write_excluded(catalog, tmp_path / "other.parquet", plan)
    assert not (tmp_path / "other.parquet").exists()


def test_a_plan_of_an_earlier_snapshot(small_catalog, tmp_path, make_pool, make_drops):
    """Rows that came later are none of its business, nor are later drop lists."""
    from tailwise.steps.importing.pool import import_pool

    make_plan(small_catalog, "p", PlanRequest("random", keep=0.5, dynamic=False))
    make_drops(small_catalog, "old", [(3, "x", None, None, None, None)])
    make_pool(tmp_path / "more", [10], first_shard=70)
    import_pool([str(tmp_path / "more")], small_catalog.folder, workers=1)
    make_drops(small_catalog, "new", [(605, "y", None, None, None, None)], "filter")
    (tmp_path / "keys.txt").write_text("000700007\n000005\n")
    remove(small_catalog, tmp_path / "keys.txt")
    plan = Plan(small_catalog, "p")
    write_excluded(small_catalog, tmp_path / "p.parquet", plan)
    expected = {f"{row:06d}" for row in np.flatnonzero(plan.draw(0) == 0)} | {"000005"}
    assert set(pq.read_table(tmp_path / "p.parquet")["key"].to_pylist()) == expected
    assert write_excluded(small_catalog, tmp_path / "all.parquet") == {
        ("filter", "new: y"): 1,
        ("remove", "on request"): 2,
    }


@pytest.mark.parametrize("name", ["stream", "bernoulli", "annealed", "pool", "static"])
def test_what_a_training_of_some_epochs_does_not_reach(curated, tmp_path, name):
    catalog, _ = curated
    plan = make_plan(catalog, "p", REQUESTS[name])
    for epochs in (1, 2, 4):
        drawn = sum(plan.draw(epoch).astype(int) for epoch in range(epochs))
        lines = written(catalog, tmp_path / "r.parquet", plan, epochs=epochs)
        assert sorted(lines) == np.flatnonzero(drawn == 0).tolist()
        late = [line for line in lines.values() if line["reason"] == f"not in the first {epochs} epochs"]
        ever = len(written(catalog, tmp_path / "r.parquet", plan))
        assert plan.dynamic or not late
        assert len(late) == len(lines) - ever
    for bad in (0, 10_001):
        with pytest.raises(UserError, match=f"`epochs` {bad}: must lie between 1 and 10,000"):
            write_excluded(catalog, tmp_path / "x.parquet", plan, epochs=bad)
    with pytest.raises(UserError, match="needs a PLAN"):
        write_excluded(catalog, tmp_path / "x.parquet", epochs=2)


def test_the_command(curated, tmp_path):
    catalog, _ = curated
    make_plan(catalog, "p", REQUESTS["ranked"])

    def run(*arguments):
        output = ["--output", str(tmp_path / "out.parquet"), "--overwrite"]
        result = CliRunner().invoke(app, ["removed", str(catalog.folder), *arguments, *output], catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout, pq.read_metadata(tmp_path / "out.parquet").num_rows

    told, rows = run("p", "--json")
    listed = {(item["stage"], item["reason"]): item["samples"] for item in json.loads(told)}
    assert ("plan", "not picked (hardest first)") in listed
    assert sum(listed.values()) == rows
    told, rows = run()
    assert all(word in told for word in (f"{rows} samples", "dedup", "duplicates: identical"))


@pytest.mark.shared_data
def test_real_data_add_up(shared_data, tmp_path, make_drops):
    from tailwise.steps.importing.pool import import_pool

    pool = shared_data / "tinyimagenet-lt"
    catalog = import_pool(
        [str(pool / "train"), str(pool / "embeddings")], tmp_path / "c", workers=1, part_rows=5000
    ).catalog
    keys = list(itertools.chain(*(catalog.samples(part, ["key"])["key"].to_pylist() for part in catalog.parts())))
    truth = [line.split("\t") for line in (pool / "truth.tsv").read_text().splitlines()[1:]]
    rows = {key: row for row, key in enumerate(keys)}
    make_drops(
        catalog, "truth", [(rows[line[0]], "duplicate", None, None, rows[line[3]], 1.0) for line in truth if line[3]]
    )
    write_excluded(catalog, tmp_path / "removed.parquet")
    kept = pq.read_table(tmp_path / "removed.parquet", columns=["key", "kept_key"]).to_pylist()
    assert {line["key"]: line["kept_key"] for line in kept} == {line[0]: line[3] for line in truth if line[3]}


def test_a_list_of_another_format_is_refused(small_catalog, tmp_path):
    with pytest.raises(UserError, match=r"excluded\.xlsx: \.xlsx is no format of this list: give \.csv or \.parquet"):
        write_excluded(small_catalog, tmp_path / "excluded.xlsx")
    assert not (tmp_path / "excluded.xlsx").exists()
