"""Every row of the table of kinds: `status` lists it, `verify` reads all its files, `run` knows what makes and what takes it."""

import shutil

import pytest

from tailwise.catalog import Catalog
from tailwise.catalog.kinds import KINDS, MADE_BY, WITHOUT, named_inputs
from tailwise.catalog.layout import MANIFEST
from tailwise.cli.run import step_commands
from tailwise.errors import UserError
from tailwise.pipeline.run import Runner
from tailwise.pipeline.steps import STEPS, Step
from tailwise.requests import (
    CaptionsRequest,
    ClusterRequest,
    ConceptsRequest,
    DedupRequest,
    FilterRequest,
    NamedScoreRequest,
    PlanRequest,
)
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.dedup.dedup import dedup
from tailwise.steps.grouping.concepts import make_concepts
from tailwise.steps.grouping.match import match_entries
from tailwise.steps.importing.captions import join_captions
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.scoring.filter import filter_samples
from tailwise.steps.scoring.named import make_named_score
from tailwise.steps.upkeep.status import status
from tailwise.steps.upkeep.verify import verify

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.section)


@pytest.fixture(scope="module")
def _full_catalog(_small_catalog_source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    shutil.copytree(_small_catalog_source / "catalog", folder / "catalog")
    catalog = Catalog.open(folder / "catalog")
    cluster(catalog, ClusterRequest(k=12))
    dedup(catalog, DedupRequest(epsilon=0.01))
    dedup(catalog, DedupRequest(exact="bytes"))
    filter_samples(catalog, FilterRequest("caption-words", keep=0.9))
    make_named_score(catalog, NamedScoreRequest(name="long", mix="caption-words / 2"))
    (folder / "entries.txt").write_text("group\n")
    match_entries(catalog, folder / "entries.txt", workers=1)
    make_concepts(catalog, [], ConceptsRequest(name="words", entries=folder / "entries.txt", workers=1))
    (folder / "tags.jsonl").write_text('{"key": "000001", "tags": ["one"]}\n')
    make_concepts(catalog, [folder / "tags.jsonl"], ConceptsRequest(name="tags", max_misses=1))
    make_plan(catalog, "p", PlanRequest("dbp", keep=0.5))
    (folder / "captions.tsv").write_text("key\tcaption\n000001\tone\n")
    join_captions(catalog, [folder / "captions.tsv"], CaptionsRequest(name="recap"))
    return catalog


@pytest.fixture
def full_catalog(_full_catalog, tmp_path):
    """A catalog with an artifact of each kind."""
    shutil.copytree(_full_catalog.folder, tmp_path / "catalog")
    return Catalog.open(tmp_path / "catalog")


def test_no_artifact_is_of_another_kind(full_catalog):
    made = {path.parent.parent.name for path in full_catalog.folder.glob(f"*/*/{MANIFEST}")}
    assert made == {kind.folder for kind in KINDS}


@every_kind
def test_status_lists_it(full_catalog, kind):
    listed = status(full_catalog)[kind.section]
    assert [item["name"] for item in listed] == kind.finished(full_catalog.folder)
    assert listed
    assert all(item.keys() == {"name", *kind.columns, "snapshot", "state"} for item in listed)
    for column in {*kind.columns} - {
        "merge",
        "group_by",
        "extends",
        "without",
        "against",
        "both",
        "file",
        "head",
    }:  # not of these artifacts
        assert any(item[column] for item in listed)


@every_kind
def test_verify_reads_all_its_files(full_catalog, kind):
    manifest = kind.path(full_catalog.folder, kind.finished(full_catalog.folder)[0]) / MANIFEST
    files = {path for path in manifest.parent.rglob("*") if path.is_file() and path != manifest}
    assert files
    for path in files:
        path.write_bytes(path.read_bytes() + b"x")
    assert set(verify(full_catalog)[1]) == files
    manifest.write_bytes(manifest.read_bytes() + b"x")
    assert verify(full_catalog)[1] == [manifest]


@every_kind
def test_it_is_found_among_the_inputs_of_others(kind):
    cases = [({label: "h"}, {key: "x"}) for label, key in kind.inputs.items()]
    cases += [({kind.prefix + "x": "h"}, {})] if kind.prefix else []
    for inputs, config in cases:
        identity = {"inputs": {"snapshot": "s", **inputs}, "config": config}
        assert list(named_inputs(identity)) == [(kind, "x", "h")]
    assert WITHOUT in {kind.prefix for kind in KINDS}


NEEDED = {
    "captions": {"tables": "t.csv", "name": "c"},
    "concepts": {"tables": "t.parquet", "name": "c"},
    "embed": {"encoder": "pixels"},  # options without which a command does nothing
    "cluster": {"k": 3},
    "group": {"by": "shard"},
    "filter": {"by": "width"},
    "score": {"name": "s", "mix": "width"},
    "plan": {"name": "p", "method": "random"},
    "export": {"to": "keys", "output": "out"},
    "draw": {"output": "out"},
    "excluded": {"output": "out"},
}
ALONE = {  # options that stand in place of those needed
    ("group", "concepts"): {"concepts": "x"},
    ("concepts", "both"): {"name": "c", "both": ["x", "y"]},
}
DEFAULTS = {"cluster": "main", "import": "dynamics", "dedup": "duplicates"}


@every_kind
def test_run_knows_what_makes_it_and_what_takes_it(kind, tmp_path):
    commands = step_commands()
    runner = Runner(commands, tmp_path, ["tars"], tmp_path)

    def job(command, **options):
        return runner.job(Step(command, {**NEEDED.get(command, {}), **options}))

    main = job("cluster")  # dedup takes it by default
    for command in kind.made_by:
        assert command in STEPS
        assert MADE_BY[command] is kind
        assert command not in DEFAULTS or job(command).makes == DEFAULTS[command]
    for command, option in kind.named_by.items():
        makers = kind.makers_for.get(command, tuple(kind.made_by))
        assert option in commands[command].options
        alone = ALONE.get((command, option))
        takes = runner.job(Step(command, alone)) if alone else job(command, **{option: "x"})
        with pytest.raises(UserError, match=f"{option} is 'x', .* add a step {' or '.join(makers)}$"):
            runner.check([main, takes])
        for maker in makers:
            made = [job(maker, **{"clustering" if maker == "import" else "name": name}) for name in ("x", "y")]
            runner.check([main, *made, takes])
    assert kind.makers_for.keys() <= kind.named_by.keys()
