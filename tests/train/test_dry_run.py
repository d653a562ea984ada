"""`train --dry-run`: it says what a run does and writes, and checks what can be checked; the run then does just that."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from open_clip_train.params import parse_args

from tailwise.catalog import Catalog
from tailwise.plan import Plan
from tailwise.requests import PlanRequest
from tailwise.steps.planning.plan import make_plan


@pytest.fixture
def recipe(tiny_model, tmp_path):
    """Two phases of 1,600 and 320 samples in steps of 32."""
    settings = {"model": tiny_model, "device": "cpu", "precision": "fp32", "workers": 0, "lr": 1e-3, "warmup": 4}
    phase = {"samples_seen": 1600, "checkpoint_every": 20, "global_batch": 32, "open_clip": settings}
    content = {
        **dict.fromkeys(("name", "about", "source", "command", "plan"), "x"),
        "expect": {},
        "phases": [phase, {**phase, "samples_seen": 320}],
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "two.yaml"


def files(*folders):
    return {
        str(path): path.stat().st_mtime_ns for folder in folders for path in Path(folder).rglob("*") if path.is_file()
    }


def test_a_run_writes_what_the_dry_run_says_and_gives_open_clip_the_arguments(
    drawn_plan, recipe, tmp_path, run_tailwise
):
    catalog = drawn_plan.catalog.folder
    logs = tmp_path / "my logs"
    words = ["--recipe", recipe, "--samples-seen", "320,64", "--record", tmp_path / "record"]
    command = ["train", catalog, "epochs", *words]
    after = ["--", "--logs", logs, "--name", "run", "--save-frequency", "4", "--report-to", ""]
    before = files(catalog, tmp_path)
    shown = run_tailwise(*command, "--dry-run", *after).stdout
    told = json.loads(run_tailwise(*command, "--dry-run", "--json", *after).stdout)
    assert files(catalog, tmp_path) == before
    assert not logs.exists()
    assert (told["plan"], told["dry_run"]) == ("epochs", True)
    first, second = told["phases"]
    assert [phase["samples"] for phase in told["phases"]] == [320, 64]
    assert [phase["batches"] for phase in told["phases"]] == [10, 2]
    assert [(phase["first_epoch"], phase["last_epoch"]) for phase in told["phases"]] == [(0, 0), (1, 1)]
    assert {phase["state"] for phase in told["phases"]} == {"new"}
    assert "10 batches of 32 samples (1 ranks × 32), 10 steps, 320 samples" in shown
    assert "epoch 1 of plan 'epochs'" in shown
    assert "dry run: all checks passed; nothing was started or written" in shown.splitlines()
    names = "tailwise.json, params.txt, out.log, replaced-rank-R.jsonl, checkpoints/epoch_latest.pt, checkpoints/epoch_"
    assert shown.count(f"  writes there: {names}") == 2
    commands = re.findall(r"open_clip: python -m open_clip_train\.main (.*)", shown)
    assert [shlex.split(line) for line in commands] == [first["open_clip"], second["open_clip"]]

    run_tailwise(*command, *after)
    written = {path for path in files(tmp_path) if path not in before}
    predicted = {path for phase in told["phases"] for path in phase["writes"]}
    final = {path for path in written if path.startswith(f"{logs}/run-phase1/final/")}
    assert final
    assert (written - final) | {f"{logs}/run-phase1/final"} == predicted
    for phase in told["phases"]:
        params = Path(phase["folder"], "params.txt").read_text()
        for name, value in vars(parse_args(phase["open_clip"])).items():
            if name not in {"resume", "device", "rank", "local_rank", "world_size", "report_to", "name", "logs"}:
                assert f"{name}: {value}\n" in params, name


def test_a_dry_run_says_what_is_resumed(drawn_plan, recipe, tmp_path, run_tailwise):
    catalog, logs = drawn_plan.catalog.folder, tmp_path / "logs"
    command = ["train", catalog, "epochs", "--recipe", recipe, "--samples-seen", "320,64"]
    after = ["--", "--logs", logs, "--name", "run"]
    run_tailwise(*command, *after)
    refused = run_tailwise(*command, "--dry-run", *after, code=2)
    assert refused.stderr.count("\n") == 1
    assert "holds a run already: go on with it by --resume" in refused.stderr
    told = json.loads(run_tailwise(*command, "--dry-run", "--json", "--resume", *after).stdout)
    assert [(phase["state"], phase["writes"]) for phase in told["phases"]] == [("finished", [])] * 2

    # As if it had been killed after three segments of the first phase, of two batches each.
    folder = logs / "run-phase1"
    state = json.loads((folder / "tailwise.json").read_text())
    (folder / "tailwise.json").write_text(json.dumps({**state, "finished": False}))
    latest = folder / "checkpoints" / "epoch_latest.pt"
    checkpoint = torch.load(latest, weights_only=True)
    torch.save({**checkpoint, "epoch": 3}, latest)
    before = files(catalog, tmp_path)
    told = json.loads(run_tailwise(*command, "--dry-run", "--json", "--resume", *after).stdout)["phases"][0]
    assert (told["state"], told["segments_done"], told["segments"]) == ("resumed", 3, state["decides"]["segments"])
    assert told["first_batch"] == 3 * told["batches_of_a_segment"]
    shown = run_tailwise(*command, "--dry-run", "--resume", *after).stdout
    assert f"resumed: 3 of {told['segments']} segments are done; the next batch is {told['first_batch']} of 10" in shown
    assert files(catalog, tmp_path) == before
    latest.write_bytes(latest.read_bytes()[:1000])
    refused = run_tailwise(*command, "--dry-run", "--resume", *after, code=2)
    assert f"checkpoint {latest} can't be read" in refused.stderr


def test_counts_of_a_random_draw_are_not_kept(drawn_plan, recipe, tmp_path, run_tailwise):
    catalog = Catalog.open(drawn_plan.catalog.folder)
    plan = make_plan(catalog, "by-chance", PlanRequest("random", keep=0.5, draw="bernoulli"))
    command = ["train", catalog.folder, "by-chance", "--recipe", recipe, "--", "--logs", tmp_path / "logs"]
    before = files(catalog.folder, tmp_path)
    told = run_tailwise(*command[:5], "--dry-run", "--json", *command[5:])
    assert files(catalog.folder, tmp_path) == before
    first, second = json.loads(told.stdout)["phases"]
    sizes = [int(Plan(catalog, "by-chance").draw(epoch).sum()) for epoch in range(4)]
    assert first["last_epoch"] == next(epoch for epoch in range(4) if sum(sizes[: epoch + 1]) // 64 * 2 >= 50)
    assert second["first_epoch"] == first["last_epoch"] + 1
    assert str(plan.folder / "units") in first["writes"]


@pytest.mark.parametrize(
    ("options", "more", "said"),
    [
        (
            [],
            ["--model", "ViT-B-33"],
            "--model 'ViT-B-33': open_clip has no model of this name: did you mean 'ViT-B-32'?",
        ),
        (
            [],
            ["--model", "ViT-B-32", "--pretrained", "openia"],
            "--pretrained 'openia' is no file, and no tag of ViT-B-32",
        ),
        ([], ["--model", "local-dir:nowhere"], "nowhere/open_clip_config.json can't be read"),
        ([], ["--imagenet-val", "nowhere"], "--imagenet-val 'nowhere' is no folder"),
        ([], ["--accum-freq", "3"], "the recipe's step of 32 samples can't be shared by 1 ranks × 3 batches"),
        (["--lanes", "5"], [], "5 lanes: must divide the global batch of 32 samples"),
        (["--samples-seen", "31,320"], [], "31 samples are less than a step of 32"),
        (["--samples-seen", "1,2,3"], [], "--samples-seen 1,2,3: 3 numbers for 2 phases: give one number"),
        (["--samples-seen", "1.5"], [], "--samples-seen 1.5: give a whole number of at least 1, or one for each phase"),
        (["--samples-seen", "640,0"], [], "--samples-seen 640,0: give a whole number of at least 1"),
        (["--epochs", "3"], [], "--epochs 3: the recipe has 2 phases: give --samples-seen instead"),
        ([], ["--logs", "{file}"], "can't be written to: give another --logs"),
    ],
)
def test_what_can_be_checked_is_refused_in_a_line(drawn_plan, recipe, tmp_path, run_tailwise, options, more, said):
    (tmp_path / "file").touch()
    more = [word.format(file=tmp_path / "file") if "{file}" in word else word for word in more]
    logs = [] if "--logs" in more else ["--logs", tmp_path / "logs"]
    before = files(drawn_plan.catalog.folder, tmp_path)
    command = ["train", drawn_plan.catalog.folder, "epochs", "--recipe", recipe, *options]
    refused = run_tailwise(*command, "--dry-run", "--", *logs, *more, code=2)
    assert said in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert files(drawn_plan.catalog.folder, tmp_path) == before


@pytest.mark.parametrize("dry", [["--dry-run"], []])
@pytest.mark.parametrize(
    ("lengths", "needed", "option"),
    [
        (["--samples-seen", "9000000,320"], "11,250", "--samples-seen"),
        (["--samples-seen", "640,8000800"], "10,002", "--samples-seen"),
        (["--epochs", "10002"], "10,002", "--epochs"),
    ],
)
def test_more_epochs_than_a_plan_has_are_refused_with_a_remedy(
    drawn_plan, recipe, tiny_model, tmp_path, run_tailwise, dry, lengths, needed, option
):
    if option == "--samples-seen":
        lengths = ["--recipe", recipe, *lengths]
    after = ["--", "--model", tiny_model, "--batch-size", "32", "--logs", tmp_path / "logs"]
    refused = run_tailwise("train", drawn_plan.catalog.folder, "epochs", *lengths, *dry, *after, code=2)
    assert refused.stderr.count("\n") == 1
    assert (
        f"the training needs about {needed} epochs of plan 'epochs', which draws 800 samples an epoch; a plan has 10,001 epochs: "
        f"give fewer {option}, or a plan that draws more samples"
    ) in refused.stderr
    assert not (tmp_path / "logs").exists()


def test_shards_are_looked_at(drawn_plan, recipe, tmp_path, run_tailwise):
    catalog = drawn_plan.catalog
    shard = Path(catalog.shards().column("path")[0].as_py())
    command = ["train", catalog.folder, "epochs", "--recipe", recipe, "--dry-run"]
    after = ["--", "--logs", tmp_path / "logs"]
    shard.rename(shard.with_suffix(".away"))
    try:
        refused = run_tailwise(*command, *after, code=2)
        assert f"1 of 4 shards can't be read as they were imported, the first is {shard}: missing" in refused.stderr
        assert "dry run: all checks passed" in run_tailwise(*command, "--check", "none", *after).stdout
        replaced = run_tailwise(*command, "--damaged", "replace", "--max-replaced", "0.5", *after)
        assert "dry run: all checks passed" in replaced.stdout
    finally:
        shard.with_suffix(".away").rename(shard)


def test_ranks_of_a_launcher_are_taken_without_one(drawn_plan, recipe, tmp_path, run_tailwise, monkeypatch):
    """So a login node can check a job of many ranks."""
    for name, value in (("WORLD_SIZE", "8"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    command = ["train", drawn_plan.catalog.folder, "epochs", "--recipe", recipe, "--dry-run", "--json"]
    told = json.loads(run_tailwise(*command, "--", "--logs", tmp_path / "logs").stdout)["phases"][0]
    assert (told["ranks"], told["batch_size"], told["global_batch"]) == (8, 4, 32)
    assert sum("replaced-rank-" in path for path in told["writes"]) == 8
    monkeypatch.setenv("WORLD_SIZE", "5")
    refused = run_tailwise(*command, "--", "--logs", tmp_path / "logs", code=2)
    assert "can't be shared by 5 ranks" in refused.stderr


def test_ranks_of_a_launcher_print_once_and_start_nothing(drawn_plan, recipe, tmp_path, fork_launcher):
    before = files(drawn_plan.catalog.folder, tmp_path)
    log = tmp_path / "log"
    words = [drawn_plan.catalog.folder, "epochs", "--recipe", recipe, "--dry-run", "--", "--logs", tmp_path / "logs"]
    launcher = fork_launcher(words, log)
    launcher.join(300)
    assert launcher.exitcode == 0, log.read_text()
    said = log.read_text()
    assert said.count("50 batches of 32 samples (2 ranks × 16)") == 1
    assert said.count("dry run: all checks passed") == 1
    log.unlink()
    assert files(drawn_plan.catalog.folder, tmp_path) == before


def test_json_is_of_the_dry_run_alone(drawn_plan, recipe, run_tailwise):
    command = ["train", drawn_plan.catalog.folder, "epochs", "--recipe", recipe, "--json"]
    assert "--json does nothing without --dry-run" in run_tailwise(*command, code=2).stderr
