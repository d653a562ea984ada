"""Recipes that would run code: refused before anything runs, unless the user allows it."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tailwise.cli import app
from tailwise.cli.run import step_commands
from tailwise.errors import UserError
from tailwise.pipeline.run import Runner
from tailwise.pipeline.steps import Step
from tailwise.steps.importing.pool import import_pool
from tailwise.train.arguments import refuse_code

COMMANDS = (
    {"val-data": "pipe:touch ran"},
    {"val-data": "a.tar::pipe:touch ran"},
    {"val-dat": "PIPE:touch ran"},  # open_clip takes abbreviations
    {"val-data=pipe:touch ran": True},
    {"val-data": "http://x/';touch ran;'.tar"},
    {"val-data": ["a.tar", "pipe:touch ran"]},
    {"aug-cfg": {"x": "pipe:touch ran"}},
    {"copy-codebase": True},
    {"copy-cod": True},
    {"lr": ["1", "--copy-codebase"]},
)
HARMLESS = {
    "lr": 1e-3,
    "val-data": "https://host/set/{0..3}.tar",
    "csv-separator": ",",
    "local-loss": True,
    "name": "pipeline",
}


@pytest.fixture
def catalog(make_pool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_pool(tmp_path / "shards", [6])
    import_pool([str(tmp_path / "shards")], tmp_path / "cat", workers=1)
    lines = (
        "import pathlib, tailwise",
        "pathlib.Path('ran').touch()",
        "@tailwise.register_method('mine')",
        "def mine(clusters):",
        "    return clusters.size",
    )
    (tmp_path / "m.py").write_text("\n".join(lines) + "\n")
    return tmp_path / "cat"


def invoke(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def refused(result, *names):
    assert isinstance(result.exception, UserError), (result.output, result.exception)
    for name in (*names, "--allow-code"):
        assert name in str(result.exception)


def test_methods_of_a_recipe_run_only_where_they_are_allowed(catalog, tmp_path):
    lines = (
        "name: x",
        "about: x",
        "steps:",
        "  - cluster: {clusters: 1}",
        "  - plan: {name: p, methods: m.py, method: mine, keep: 0.5}",
    )
    (tmp_path / "r.yaml").write_text("\n".join(lines) + "\n")
    for options in ((), ("--dry-run",), ("--set", "plan.methods=m.py")):
        refused(invoke("run", tmp_path / "r.yaml", catalog, *options), "step plan:p", "methods", "m.py")
        assert not (tmp_path / "ran").exists()
    planned = invoke("run", tmp_path / "r.yaml", catalog, "--dry-run", "--allow-code")
    assert planned.exit_code == 0 and "--methods m.py" in planned.output
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("place", ["rows", "prepare"])
def test_methods_of_a_comparison_run_only_where_they_are_allowed(catalog, tmp_path, place):
    options = "{methods: m.py, method: mine, keep: 0.5}"
    rows = options if place == "rows" else "{method: random, keep: 0.5}"
    prepare = "[]" if place == "rows" else f"[{{plan: {options[:-1]}, name: q}}}}]"
    lines = (
        "name: x",
        "about: x",
        "catalog: cat",
        "evaluate: {data: x}",
        "train: {model: ViT-B-32, samples_seen: 512}",
        "seeds: [0]",
        "baseline: a",
        f"rows: {{a: {rows}}}",
        f"prepare: {prepare}",
    )
    (tmp_path / "c.yaml").write_text("\n".join(lines) + "\n")
    refused(invoke("compare", tmp_path / "c.yaml"), "methods", "m.py")
    if place == "rows":
        refused(invoke("compare", tmp_path / "c.yaml", "--dry-run"), "methods", "m.py")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("arguments", COMMANDS)
def test_arguments_of_the_trainer_that_run_commands(arguments):
    with pytest.raises(UserError, match=r"recipe r has .*--allow-code"):
        refuse_code("recipe r", arguments, allowed=False)
    refuse_code("recipe r", arguments, allowed=True)
    refuse_code("recipe r", HARMLESS, allowed=False)
    with pytest.raises(UserError, match="step train:p: open-clip has"):
        Runner(step_commands(), Path("cat")).job(Step("train", {"name": "p", "open-clip": arguments}))


def test_every_reader_of_trainer_arguments_checks_them(catalog, tmp_path):
    invoke("plan", catalog, "p", "--method", "random", "--keep", 0.5)
    lines = (
        "name: x",
        "about: x",
        "source: x",
        "command: x",
        "plan: x",
        "expect: {}",
        "phases: [{epochs: 1, open_clip: {val-data: 'pipe:touch ran'}}]",
    )
    (tmp_path / "t.yaml").write_text("\n".join(lines) + "\n")
    refused(invoke("train", catalog, "p", "--recipe", tmp_path / "t.yaml"), "t.yaml", "pipe:touch ran")
    (tmp_path / "r.yaml").write_text("name: x\nabout: x\nsteps: [{train: {name: p, recipe: t.yaml}}]\n")
    refused(invoke("run", tmp_path / "r.yaml", catalog, "--dry-run"), "t.yaml", "pipe:touch ran")
    (tmp_path / "r.yaml").write_text(
        "name: x\nabout: x\nsteps: [{train: {name: p, recipe: t.yaml, allow_code: true}}]\n"
    )
    refused(invoke("run", tmp_path / "r.yaml", catalog, "--dry-run"), "allow-code")
    lines = (
        "name: x",
        "about: x",
        "catalog: cat",
        "evaluate: {data: x}",
        "train: {model: ViT-B-32, samples_seen: 512, open_clip: {val-data: 'pipe:touch ran'}}",
        "seeds: [0]",
        "baseline: a",
        "rows: {a: {method: random}}",
    )
    (tmp_path / "c.yaml").write_text("\n".join(lines) + "\n")
    refused(invoke("compare", tmp_path / "c.yaml", "--dry-run"), "train.open_clip", "pipe:touch ran")
    assert not (tmp_path / "ran").exists()


def test_a_name_of_a_recipe_is_no_option():
    for step in (Step("plan", {"name": "--methods=m.py", "method": "random"}), Step("train", {"name": "--allow-code"})):
        with pytest.raises(UserError, match="must not begin with a dash"):
            Runner(step_commands(), Path("cat")).job(step)
    with pytest.raises(UserError, match="must not begin with a dash"):
        Runner(step_commands(), Path("cat"), ["--format=auto"]).job(Step("import", {}))
