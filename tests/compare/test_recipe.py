"""Recipes of comparisons: what is refused, what may be changed, and that ours are whole."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tailwise.catalog.files import write_json
from tailwise.cli import app
from tailwise.cli.run import step_commands
from tailwise.compare.recipe import FOLDER, choose, load_compare_recipe
from tailwise.compare.study import RESULT, Run, Study
from tailwise.errors import UserError
from tailwise.pipeline.run import Runner
from tailwise.plan.methods import METHODS
from tailwise.steps.planning.plan import OTHER_METHODS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.sample_seen=5"], "did you mean 'samples_seen'"),
        (["evaluate.train_count=5"], "did you mean 'train_counts'"),
        (["catalogue=5"], "did you mean 'catalog'"),
        (["train.samples_seen=10"], "less than a batch of 32"),
        (["train.precision=fp16"], "must be one of fp32, bf16"),
        (["train.device=gpu"], "device is 'gpu': must be auto, cpu, cuda or cuda:N"),
        (["train.augment={scale: [0.5, 2]}"], "at most 1"),
        (["train.augment={scales: [0.5, 1]}"], "must be {scale: [least, most]}, above 0, at most 1"),
        (["train.augment={scale: [0.5, x]}"], "train, augment, scale 2 is 'x': must be a number"),
        (["train.augment={5: [0.5, 1]}"], "must be {scale: [least, most]}"),
        (["train.lr=fast"], "train: lr is 'fast': must be a number"),
        (["train.global_batch=1"], "train: global_batch is 1: must be a whole number of at least 2"),
        (["train.workers=true"], "train: workers is True: must be a whole number of at least 0"),
        (["train.max_rejected=2"], "max_rejected is 2: must be a number of at least 0 and at most 1"),
        (["train.model="], "train lacks 'model': add it, or give it with `set` train.model=…"),
        (["seeds=[0, -1]"], "seed 2 is -1: must be a whole number of at least 0"),
        (["rows={}"], "must be options of `tailwise plan` by name"),
        (["rows={a: 5}"], "row 'a' is 5: must be options of `tailwise plan`, such as {method: random}"),
        (["rows={a/b: {}}"], "row 'a/b': name is 'a/b': must be text of 1 to 100 characters, without slashes"),
        (["seeds=[0, 0]"], "each may be there once"),
        (["seeds=3"], "must be a list"),
        (["baseline=none"], "no row 'none': the recipe has random static, random dynamic"),
        (["rows.random static.compose=mixed"], "must be one of shuffle, spread, diverse"),
        (["rows.random static.seed=3"], "which the comparison gives"),
        (["rows.Random Static={method: random}"], "differ in case"),
        (["evaluate.data="], "lacks 'data'"),
        (["name"], "give KEY=VALUE"),
        (["name.deeper=3"], "holds nothing"),
        (["prepare=[5]"], "must be one command"),
    ],
)
def test_mistakes_are_refused_by_name(make_recipe, settings, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        load_compare_recipe(str(make_recipe()), settings)


def test_settings_reach_any_depth_and_names_with_dots(make_recipe):
    path = make_recipe(
        rows={"random dynamic": {"method": "random", "keep": 0.5}, "α 0.2": {"method": "dynamics", "max_repeats": 2}}
    )
    settings = ["train.lr=3e-4", "rows.α 0.2.keep=0.25", "rows.α 0.2.compose=spread", "seeds=[4]"]
    settings += ["train.augment={scale: [0.4, 1]}"]
    recipe = load_compare_recipe(str(path), settings)
    assert recipe.train.lr == 3e-4
    assert recipe.train.augment == {"scale": [0.4, 1.0]}
    assert recipe.seeds == (4,)
    row = recipe.row("α 0.2")
    assert (row.compose, row.plan) == ("spread", {"method": "dynamics", "max-repeats": 2, "keep": 0.25})
    assert yaml.safe_load(path.read_text())["rows"]["α 0.2"] == {"method": "dynamics", "max_repeats": 2}


def test_rows_and_seeds_are_chosen_by_name(make_recipe):
    recipe = load_compare_recipe(str(make_recipe()))
    rows, seeds = choose(recipe, ["random-dynamic"], [1])
    assert ([row.name for row in rows], seeds) == (["random dynamic"], [1])
    with pytest.raises(UserError, match="seed 7 isn't the recipe's"):
        choose(recipe, seeds=[7])
    with pytest.raises(UserError, match="no row 'dynamic'"):
        choose(recipe, only=["dynamic"])


def test_runs_go_seed_by_seed_and_plans_are_named_by_what_they_are(make_recipe, tmp_path):
    recipe = load_compare_recipe(str(make_recipe()))
    runs = Study(recipe, tmp_path).runs()
    assert [(run.row.name, run.seed) for run in runs] == [
        ("random static", 0), ("random dynamic", 0), ("random static", 1), ("random dynamic", 1),
    ]  # fmt: skip
    other = load_compare_recipe(str(make_recipe()), ["rows.random static.keep=0.3"])
    names = {run.plan.options["name"] for run in [*runs, *Study(other, tmp_path).runs()]}
    assert len(names) == 6  # the dynamic ones are the same
    assert all(name.startswith("compare-random-") for name in names)


def test_a_file_that_changed_is_another_setting(make_recipe, tmp_path):
    (tmp_path / "s.csv").write_text("key,score\n0,1\n")
    scs = {"method": "scs", "score": "score", "score_file": str(tmp_path / "s.csv"), "keep": 0.2}
    study = Study(
        load_compare_recipe(str(make_recipe(rows={"random dynamic": {"method": "random"}, "scs": scs}))), tmp_path
    )
    plain, run = study.runs(seeds=[0])
    before, evaluated = study.identity(run), study.evaluated
    result = {"format": 1, "identity": before, "evaluated": evaluated}

    def found(content):
        write_json(run.folder / RESULT, content)
        return study.result(run)

    assert "file score-file" in before and "file score-file" not in study.identity(plain)
    assert found(result) == result
    known = [{k: v for k, v in each.items() if not k.startswith("file ")} for each in (before, evaluated)]
    old = {"format": 1, "identity": known[0], "evaluated": known[1]}  # of a version that noted no hashes
    assert found(old) == old
    (tmp_path / "s.csv").write_text("key,score\n0,2\n")
    with pytest.raises(UserError, match=r"made with other settings \(file score-file "):
        found(result)
    assert found(old) == old
    (tmp_path / "s.csv").write_text("key,score\n0,1\n")
    assert found(result) == result
    counts = Path(evaluated["train_counts"])
    given = counts.read_text()
    counts.write_text(given + "\n")
    assert found(result) is None  # to be evaluated again
    counts.write_text(given)


TRUTHS = {  # recipes that name a file of true classes, and their first rows
    "web-lt": ["random dynamic", "dynamics", "flat"],
    "fashion-lt": ["random dynamic", "dynamics", "flat"],
    "web-lt-rules": ["random dynamic", "scs on rarity", "cabs-dm"],
}


@pytest.mark.parametrize("name", [path.stem for path in FOLDER.glob("*.yaml")])
def test_our_recipes_are_whole_and_name_real_options(name, tmp_path):
    settings = [f"catalog={tmp_path}", "evaluate.data=set", "sources=[pool]"]
    recipe = load_compare_recipe(name, [*settings, *(["truth.file=truth.tsv"] if name in TRUTHS else [])])
    rows = [row.name for row in recipe.rows]
    if name == "demo":
        assert rows == ["random", "planned"]
    elif name in TRUTHS:
        assert rows[:3] == TRUTHS[name]
    elif name == "tinyimagenet-lt-rules":
        assert rows == ["random dynamic", "dynamics by concept", "soft cap"]
    else:
        assert rows[:5] == ["random static", "random dynamic", "flat", "dbp after dedup", "dynamics"]
        assert rows[-1] == "full data"
    for step in [*recipe.prepare, *(Run(row, 0, tmp_path).plan for row in recipe.rows)]:
        assert Runner(step_commands(), tmp_path, recipe.sources).job(step).line
    assert {row.plan.get("method", "density") for row in recipe.rows} <= {*METHODS, *OTHER_METHODS}


def test_the_demos_recipe_names_the_command_that_makes_its_catalog(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, ["compare", "demo"])
    assert str(found.exception) == "recipe 'demo' needs the catalog demo/catalog: make it with `tailwise demo`"


def test_help_names_all_recipes():
    text = CliRunner().invoke(app, ["compare", "--help"], env={"COLUMNS": "200"}).output
    assert f"a name: {', '.join(sorted(path.stem for path in FOLDER.glob('*.yaml')))}." in text
