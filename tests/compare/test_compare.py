"""Whole comparisons: every run once, summed up as plain arithmetic does, and gone on with after a kill."""

import csv
import html
import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tailwise.cli import app
from tailwise.cli.run import step_commands
from tailwise.compare.ledger import hours
from tailwise.compare.recipe import load_compare_recipe
from tailwise.compare.study import Study
from tailwise.compare.summary import figures
from tailwise.errors import UserError
from tailwise.pipeline.run import Runner

pytestmark = pytest.mark.usefixtures("one_thread")


def tailwise(*arguments):
    result = CliRunner().invoke(app, [str(item) for item in arguments], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Made by the first test that needs it, for all: a folder for one comparison of two rows and two seeds."""
    return tmp_path_factory.mktemp("finished") / "out"


@pytest.fixture
def compared(finished, make_recipe):
    """The recipe, and the folder of its comparison."""
    recipe = make_recipe()
    if not (finished / "summary.html").exists():
        planned = tailwise("compare", recipe, "--output", finished, "--dry-run")
        assert "4 of 4 runs to do, 256 samples each, about" in planned
        assert not finished.exists()
        told = tailwise("compare", recipe, "--output", finished, "--png")
        assert "[1/4] random static, seed 0: 256 samples in" in told
        assert "[4/4] random dynamic, seed 1: 256 samples in" in told
    return recipe, finished


def results(folder):
    found = [json.loads(path.read_text()) for path in folder.glob("runs/*/*/result.json")]
    return {(item["row"], item["seed"]): item for item in found}


def test_the_table_is_what_the_runs_say(compared):
    _, folder = compared
    found = results(folder)
    assert sorted(found) == [(row, seed) for row in ("random dynamic", "random static") for seed in (0, 1)]
    assert {item["trained"]["samples"] for item in found.values()} == {256}
    summary = json.loads((folder / "summary.json").read_text())
    rows = {row["row"]: row for row in summary["rows"]}
    ((name, metrics),) = summary["sets"].items()
    assert metrics == ["top1", "mean_per_class", "head", "medium", "few"]
    for metric in metrics:
        values = {key: figures(item)[name][metric] for key, item in found.items()}
        static, dynamic = (
            np.array([values[row, seed] for seed in (0, 1)]) for row in ("random static", "random dynamic")
        )
        figure = rows["random static"]["sets"][name][metric]
        assert figure["mean"] == pytest.approx(static.mean())
        assert figure["sd"] == pytest.approx(static.std(ddof=1))
        difference = figure["difference"]
        assert difference["mean"] == pytest.approx((static - dynamic).mean())
        half = 12.7062047 * (static - dynamic).std(ddof=1) / np.sqrt(2)  # Student's 97.5 % for one degree of freedom
        assert difference["high"] - difference["mean"] == pytest.approx(half)
        assert difference["significant"] == (abs((static - dynamic).mean()) > half)
        assert rows["random dynamic"]["sets"][name][metric]["difference"] is None
    with (folder / "results.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert len(lines) == 2 * len(metrics)
    by_key = {(line["row"], line["metric"]): line for line in lines}
    assert float(by_key["random static", "few"]["mean"]) == pytest.approx(
        rows["random static"]["sets"][name]["few"]["mean"]
    )


def test_the_summaries_say_what_they_rest_on(compared):
    _, folder = compared
    text, page = (folder / "summary.md").read_text(), (folder / "summary.html").read_text()
    assert (
        "| random static | method random, keep 0.2, static yes | 160 (20.0 % of the pool) | 800 | stream, once | 256 | 160 | "
        "0.32 (0 … 2) | 2 |" in text
    )
    assert (
        "| random dynamic | method random, keep 0.2 | 160 (20.0 % of the pool) | 800 | stream, each epoch | 256 | 256 | 0.32 (0 … 1) | 2 |"
        in text
    )
    assert "Every run has seen 256 samples of a pool of 800; seeds 0, 1; 4 of 4 runs are done." in text
    for said in ("samples seen 256", "torch 2", "processors", "with 80 % power", "Holm", "random dynamic", "±"):
        assert said in text
    for said in ("<dt>samples seen</dt><dd>256</dd>", "<dt>torch</dt><dd>2", "found in 80 % of studies", "Holm"):
        assert said in page
    for kind in ("<script", "src=", "<link", "url("):
        assert kind not in page
    assert "script-src &#39;none&#39;" in page
    assert (folder / "differences.svg").read_text().startswith("<?xml")


def test_the_ledger_has_the_time_of_plans_and_trainings_and_is_shown_everywhere(compared, drawn_pool):
    recipe, folder = compared
    ledgers = {row["row"]: row["ledger"] for row in json.loads((folder / "summary.json").read_text())["rows"]}
    shown = [(folder / name).read_text() for name in ("summary.md", "summary.html")]
    shown.append(tailwise("compare", recipe, "--output", folder))
    for row, ledger in ledgers.items():
        runs = [item for (name, _), item in results(folder).items() if name == row]
        assert sorted(ledger["steps"]) == sorted(f"plans/{item['plan']['name']}" for item in runs)
        for step, seconds in ledger["steps"].items():
            assert 0 < seconds == json.loads((folder / "seconds" / f"{step}.json").read_text())
        wanted = {"training": np.mean([item["trained"]["seconds"] for item in runs])}
        wanted |= {
            "lists and plan": np.mean([*ledger["steps"].values()]),
            "embedding": 0,
            "scoring": 0,
            "clustering": 0,
        }
        assert ledger["seconds"] == pytest.approx(wanted)
        assert (ledger["models"], ledger["unknown"]) == ([], [])
        cells = [hours(ledger, phase) for phase in ("lists and plan", "training")]
        markdown, page, terminal = (
            re.sub(r"\s+|[|]", " ", html.unescape(re.sub("<[^>]*>", " ", text))) for text in shown
        )
        assert all(f" {row} 0 0 0 {' '.join(cells)} none " in re.sub(" +", " ", text) for text in (markdown, page))
        assert all(cell in terminal for cell in cells)


def test_the_pages_show_the_figures_of_the_summary(compared, drawn_pool, tmp_path):
    """The study's own page, and the section of a report."""
    pytest.importorskip("bokeh")
    _, folder = compared
    tailwise("report", drawn_pool / "catalog", "--output", tmp_path / "report", "--study", folder)
    pages = [(folder / "summary.html").read_text(), (tmp_path / "report" / "index.html").read_text()]
    summary = json.loads((folder / "summary.json").read_text())
    ((name, metrics),) = summary["sets"].items()
    for row, metric in ((row, metric) for row in summary["rows"] for metric in metrics):
        figure = row["sets"][name][metric]
        shown = [f"<td>{100 * figure['mean']:.2f} ± {100 * figure['sd']:.2f}</td>"]
        if difference := figure["difference"]:
            low, mean, high = (f"{100 * difference[end]:+.2f}" for end in ("low", "mean", "high"))
            mark = "" if not difference["significant"] else "**" if difference["p_holm"] < 0.05 else "*"
            shown.append(f"<td>{mean}{mark} ({low}\u00a0…\u00a0{high})</td>")
        assert all(text in page for text in shown for page in pages)
    assert "4 plans of comparisons are not shown" in pages[1]
    assert [page.count('<section id="study"') for page in pages] == [1, 1]
    assert [page.count('href="#study"') for page in pages] == [0, 1]  # the only section needs no link


def test_curves_are_means_of_classes_and_seeds(compared):
    _, folder = compared
    summary = json.loads((folder / "summary.json").read_text())
    page = (folder / "summary.html").read_text()
    for row in summary["rows"]:
        tables = [
            pq.read_table(path).to_pylist() for path in folder.glob(f"runs/{row['row'].replace(' ', '-')}/*/*.parquet")
        ]
        assert len(tables) == 2
        (curve,) = row["curves"].values()
        assert [(item["from"], item["to"], item["classes"]) for item in curve] == [
            (2**at, 2 ** (at + 1) - 1, 1) for at in range(6)
        ]
        for item in curve:
            shares = [
                line["accuracy"]
                for lines in tables
                for line in lines
                if item["from"] <= line["train_count"] <= item["to"]
            ]
            assert item["mean"] == pytest.approx(np.mean(shares))
            title = f"{item['from']} to {item['to']} training samples, 1 classes: {100 * item['mean']:.2f} ± {100 * item['sd']:.2f} %"
            assert title in page


def test_a_study_is_the_folder_of_a_comparison(compared, drawn_pool, tmp_path):
    report = ["report", str(drawn_pool / "catalog"), "--output", str(tmp_path / "report"), "--study"]
    (tmp_path / "summary.json").write_text('{"config": {}, "sets": []}')  # as an evaluation writes it
    for folder, said in ((compared[1] / "runs", "has no summary.json"), (tmp_path, "is not of a comparison")):
        with pytest.raises(UserError, match=said):
            tailwise(*report, folder)
    assert not (tmp_path / "report").exists()


def test_a_repeated_command_trains_nothing_and_gives_the_same_files(compared, tree_bytes):
    recipe, folder = compared
    before = tree_bytes(folder)
    told = tailwise("compare", recipe, "--output", folder)
    assert told.count("done already") == 4
    assert tree_bytes(folder) == before
    assert (folder / "differences.png").read_bytes().startswith(b"\x89PNG")
    planned = tailwise("compare", recipe, "--output", folder, "--dry-run", "--only", "random static")
    assert "0 of 2 runs to do" in planned


def test_shares_of_a_row_may_be_a_mapping(make_recipe, tmp_path):
    mixed = {"method": "mixture", "clustering": "shard", "shares": {1: 3.0, "a,b": 1}, "keep": 0.2}
    recipe = make_recipe(rows={"mixed": mixed, "random dynamic": {"method": "random", "keep": 0.2}})
    planned = tailwise("compare", recipe, "--output", tmp_path / "out", "--dry-run")
    assert (
        "mixed, seed 0: method mixture, clustering shard, shares 1 3, shares a,b 1, keep 0.2, compose shuffle"
        in planned
    )
    (plan, *_) = [run.plan for run in Study(load_compare_recipe(str(recipe)), tmp_path / "out").runs()]
    assert Runner(step_commands(), tmp_path / "catalog").job(plan).asked["shares"] == {"1": 3, "a,b": 1}


def test_other_settings_are_refused_and_another_evaluation_trains_nothing(compared, make_recipe, tmp_path):
    recipe, folder = compared
    with pytest.raises(UserError, match=r"made with other settings \(train"):
        tailwise("compare", recipe, "--output", folder, "--set", "train.lr=1e-4")
    with pytest.raises(UserError, match=r"random-static.*other settings \(plan.keep 0.2 → 0.3\)"):
        tailwise("compare", recipe, "--output", folder, "--set", "rows.random static.keep=0.3")
    shutil.copytree(folder, tmp_path / "copy")
    losses = next((tmp_path / "copy").glob("runs/random-static/seed-0/losses.npy"))
    losses.unlink()  # a training would write it anew
    told = tailwise("compare", recipe, "--output", tmp_path / "copy", "--set", "evaluate.bootstrap=10")
    assert "done already" not in told
    assert not losses.exists()
    assert results(tmp_path / "copy").keys() == results(folder).keys()


def test_a_killed_comparison_goes_on_and_ends_as_if_it_had_not_been(compared, fork_python, tmp_path, wait_until):
    recipe, folder = compared
    words = ["compare", recipe, "--output", tmp_path / "out", "--only", "random static"]
    process = fork_python("from tailwise.cli import main; main()", *words, out=tmp_path / "log")
    wait_until(lambda: list((tmp_path / "out").glob("runs/*/seed-0/result.json")) or not process.is_alive())
    process.kill()
    process.join()
    left = results(tmp_path / "out")
    assert ("random static", 0) in left
    tailwise("compare", recipe, "--output", tmp_path / "out")
    again, wanted = results(tmp_path / "out"), results(folder)
    assert again.keys() == wanted.keys()
    for key, item in again.items():
        assert item["evaluations"] == wanted[key]["evaluations"]
        assert item["trained"]["last_loss"] == wanted[key]["trained"]["last_loss"]


def test_json_goes_to_standard_output_alone(compared):
    recipe, folder = compared
    result = CliRunner().invoke(app, ["compare", str(recipe), "--output", str(folder), "--json"])
    assert json.loads(result.stdout)["runs"] == {"done": 4, "all": 4}
    assert "done already" in result.stderr


def test_what_a_row_asks_is_checked_before_anything_runs(make_recipe, tmp_path):
    recipe = make_recipe(rows={"random dynamic": {"method": "random", "keep": 0.2}, "odd": {"metod": "random"}})
    with pytest.raises(UserError, match="did you mean 'method'"):
        tailwise("compare", recipe, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="the recipe imports a pool"):
        tailwise("compare", make_recipe(prepare=[{"import": None}]), "--output", tmp_path / "out")
    with pytest.raises(UserError, match="trainer is 'fast'"):
        tailwise("compare", make_recipe(), "--output", tmp_path / "out", "--set", "train.trainer=fast")
