"""Whole trainings in this process: what is told, refused, recorded, and that a resumed run goes on."""

import json
import math
import re

import pytest
import torch
from typer.testing import CliRunner

from tailwise.cli import app
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.requests import PlanRequest, TrainRequest
from tailwise.steps.planning.plan import make_plan
from tailwise.train.guard import find_trainer
from tailwise.train.launch import train
from tailwise.train.phases import decide


@pytest.fixture
def arguments(tiny_model, tmp_path):
    words = ["--model", tiny_model, "--device", "cpu", "--precision", "fp32", "--batch-size", "16", "--workers", "0"]
    return [
        *words,
        "--logs",
        str(tmp_path / "logs"),
        "--name",
        "run",
        "--lr",
        "1e-3",
        "--warmup",
        "4",
        "--log-every-n-steps",
        "1",
    ]


def test_a_run_is_told_recorded_and_resumed(drawn_plan, arguments, tmp_path, read_record):
    told = []
    options = TrainRequest(epochs=1, checkpoint_every=12, record=tmp_path / "record")
    arguments = [*arguments, "--batch-size", "24", "--accum-freq", "2"]
    runs = train(drawn_plan, arguments, options, report=told.append)
    text = "\n".join(told)
    assert "epoch 0 of plan 'epochs'" in text
    assert "32 batches of 24 samples (1 ranks × 24), 16 steps, 768 samples" in text
    assert "3 segments of 12 batches, the last of 8" in text
    assert "left out: 1 batch (24 samples)" in text
    assert "note" not in text
    assert (runs[0].segments.count, runs[0].segments.length, runs[0].segments.last) == (3, 12, 8)

    lines = read_record(tmp_path / "record" / "run.rank-0.jsonl")
    assert [(line["segment"], line["batch"]) for line in lines] == [(number // 12, number) for number in range(32)]
    rows = [row for line in lines for row in line["rows"]]
    copies = drawn_plan.draw(0)
    assert len(set(rows)) == len(rows) == 768
    assert all(copies[row] == 1 for row in rows)
    assert {epoch for line in lines for epoch in line["epochs"]} == {0}

    folder = tmp_path / "logs" / "run"
    state = json.loads((folder / "tailwise.json").read_text())
    assert state["finished"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["epoch_3.pt", "epoch_latest.pt"]
    log = (folder / "out.log").read_text()
    assert len(re.findall(r"Train Epoch: \d+ \[ *\d+/288 ", log)) == 16

    rates = [float(rate) for rate in re.findall(r" LR: ([\d.]+)", log)]
    falling = [
        0.5 * (1 + math.cos(math.pi * step / 12)) * 1e-3 for step in range(12)
    ]  # to the last step, after a warm-up of 4
    assert rates[4:] == pytest.approx(falling, abs=1e-6)
    last_loss = float(re.findall(r" Loss: ([\d.]+)", log)[-1])
    assert told[-4:] == [
        f"{folder}: saw 768 samples in 32 batches, epoch 0 of plan 'epochs'; 0 of them replaced",
        f"  epoch 0 draws {(copies > 0).sum():,} distinct samples, {(copies > 0).mean():.1%} of the pool; the last loss is {last_loss:.4g}",
        f"  checkpoint: {folder}/checkpoints/epoch_3.pt",
        f"next: tailwise evaluate {folder} --data SET --pool {drawn_plan.catalog.folder}",
    ]

    with pytest.raises(UserError, match="holds a run already: go on with it by `resume`"):
        train(drawn_plan, arguments, options, report=told.append)
    again = TrainRequest(epochs=1, checkpoint_every=12, resume=True)
    train(drawn_plan, arguments, again, report=told.append)
    assert told[-1] == "nothing left to train: all of it is finished"
    changed = (
        (TrainRequest(epochs=1, checkpoint_every=24, resume=True), [], r"batches of a segment 12 → 16"),
        (TrainRequest(epochs=1, checkpoint_every=12, resume=True, seed=5), [], r"seed 0 → 5"),
        (TrainRequest(epochs=1, checkpoint_every=12, resume=True, lanes=8), [], r"lanes 24 → 8"),
        (again, ["--lr", "2e-3"], r"--lr 0\.001 → 0\.002"),
        (again, ["--batch-size", "32"], r"global batch 24 → 32"),
    )
    for given, more, said in changed:
        with pytest.raises(UserError, match=said):
            train(drawn_plan, [*arguments, *more], given, report=told.append)


def test_phases_go_on_from_the_weights_and_epochs_of_the_one_before(drawn_plan, tiny_model, tmp_path, read_record):
    recipe = tmp_path / "two.yaml"
    recipe.write_text(
        f"""
name: two
about: two phases
source: none
command: none
plan: none
expect: {{}}
phases:
  - epochs: 1
    global_batch: 32
    open_clip: {{model: "{tiny_model}", device: cpu, precision: fp32, workers: 0, lr: 1.0e-3, warmup: 4, force-image-size: 16}}
  - samples_seen: 320
    global_batch: 32
    checkpoint_every: 10
    open_clip: {{model: "{tiny_model}", device: cpu, precision: fp32, workers: 0, lr: 0.0, warmup: 4, wd: 0.0, force-image-size: 32}}
"""
    )
    catalog = drawn_plan.catalog.folder
    command = [
        "train",
        catalog,
        "epochs",
        "--recipe",
        recipe,
        "--record",
        tmp_path / "record",
        "--",
        "--logs",
        tmp_path / "logs",
    ]
    result = CliRunner().invoke(app, [str(word) for word in command], catch_exceptions=False)
    assert "phase 1 of 2" in result.output
    assert "epoch 1 of plan" in result.output
    logs = tmp_path / "logs"
    first, second = logs / "epochs-two-phase1", logs / "epochs-two-phase2"
    lines = read_record(tmp_path / "record" / "epochs-two-phase2.rank-0.jsonl")
    assert len(lines) == 10
    assert {epoch for line in lines for epoch in line["epochs"]} == {1}
    copies = drawn_plan.draw(1)
    assert all(copies[row] == 1 for line in lines for row in line["rows"])
    # A learning rate of 0 leaves the weights as they came; only the positions were resized, from 2 × 2 patches and a class to 4 × 4.
    before = torch.load(first / "checkpoints" / "epoch_latest.pt")["state_dict"]
    after = torch.load(second / "checkpoints" / "epoch_latest.pt")["state_dict"]
    positions = "visual.positional_embedding"
    assert before[positions].shape == (5, 64)
    assert after[positions].shape == (17, 64)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if name != positions)
    assert second.name not in (first / "out.log").read_text()
    assert (first / "out.log").read_text().count("Start epoch") == json.loads((first / "tailwise.json").read_text())[
        "decides"
    ]["segments"]

    (second / "tailwise.json").unlink()
    with pytest.raises(UserError, match="phase2 is a run that `tailwise train` did not start"):
        CliRunner().invoke(
            app, [str(word) for word in [*command[:3], "--resume", *command[3:]]], catch_exceptions=False
        )


def test_the_model_s_random_numbers_depend_on_the_segment_alone(drawn_plan, arguments, tmp_path):
    options = TrainRequest(samples_seen=96, checkpoint_every=3)
    train(drawn_plan, arguments, options, report=lambda _: None)
    whole = torch.load(tmp_path / "logs" / "run" / "checkpoints" / "epoch_2.pt")["state_dict"]

    half = tmp_path / "logs" / "half"
    arguments = [*arguments, "--name", "half", "--save-frequency", "1"]
    train(drawn_plan, arguments, options, report=lambda _: None)
    checkpoints = half / "checkpoints"
    (checkpoints / "epoch_1.pt").replace(checkpoints / "epoch_latest.pt")
    (checkpoints / "epoch_2.pt").unlink()
    state = json.loads((half / "tailwise.json").read_text())
    (half / "tailwise.json").write_text(json.dumps({**state, "finished": False}))
    torch.manual_seed(987)
    train(drawn_plan, arguments, TrainRequest(samples_seen=96, checkpoint_every=3, resume=True), report=lambda _: None)
    resumed = torch.load(checkpoints / "epoch_2.pt")["state_dict"]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_another_way_with_damage_is_told_when_a_run_goes_on(drawn_plan, arguments, tmp_path):
    """It may be given, since a tar may be lost meanwhile; but the samples that come may be others."""
    options = {"samples_seen": 32, "checkpoint_every": 1}
    train(drawn_plan, arguments, TrainRequest(**options), report=lambda _: None)
    path = tmp_path / "logs" / "run" / "tailwise.json"
    state = json.loads(path.read_text())
    assert state["about"]["damaged"] == "error"
    for given, said in (
        (
            {"damaged": "replace", "check": "none"},
            ["`check` size, and goes on with none", "`damaged` error, and goes on with replace"],
        ),
        ({"damaged": "replace", "check": "none"}, []),
        ({"check": "none"}, ["`damaged` replace, and goes on with error"]),
    ):
        path.write_text(json.dumps({**json.loads(path.read_text()), "finished": False}))
        told = []
        train(drawn_plan, arguments, TrainRequest(**options, **given, resume=True), report=told.append)
        notes = [line for line in told if "was started with" in line]
        assert len(notes) == len(said)
        assert all(part in line for part, line in zip(said, notes, strict=True))


@pytest.mark.parametrize(
    "options", [TrainRequest(epochs=7), TrainRequest(samples_seen=7 * 700)], ids=["epochs", "samples"]
)
def test_counting_epochs_of_a_random_draw_is_shown(drawn_plan, arguments, options):
    """Their sizes aren't known before all rows were drawn: that takes a while in a large pool."""
    request = PlanRequest("random", keep=0.5, draw="bernoulli")
    plan = make_plan(drawn_plan.catalog, f"random-{options.epochs}", request)
    counted = []

    def track(items, description, total=None):
        assert description == "counting epochs"
        for number, item in enumerate(items):
            yield item
            counted.append((number + 1, total, len(list((plan.folder / "units").glob("epoch-*.npy")))))

    (run,) = decide(plan, arguments, options, None, find_trainer(), Context(track))
    assert len(counted) == counted[-1][1] > 5
    assert [files for _, _, files in counted] == sorted(files for _, _, files in counted)
    assert counted[0][2] <= 2
    assert counted[-1][2] >= 6
    sizes = [int(plan.draw(epoch).sum()) for epoch in range(8)]
    batches = sum(sizes[:7]) // 16 if options.epochs else options.samples_seen // 16
    assert run.batches + run.segments.left_out == batches


@pytest.mark.parametrize(
    ("options", "more", "said"),
    [
        (TrainRequest(), [], "say how long: give `epochs`"),
        (TrainRequest(epochs=1, samples_seen=5), [], "give either `epochs` or `samples_seen`"),
        (TrainRequest(epochs=1), ["--train-data", "x"], "the plan says what is trained on"),
        (TrainRequest(epochs=1), ["--epochs", "3"], "give it before the --"),
        (TrainRequest(samples_seen=5), [], "5 samples are less than a step of 16"),
        (TrainRequest(epochs=1), ["--batch-size", "1000"], "gives 0 batches of 1,000 samples"),
        (TrainRequest(epochs=1, checkpoint_every=1), ["--accum-freq", "2"], "must be at least `accum_freq` 2"),
        (TrainRequest(epochs=1, lanes=7), [], "7 lanes"),
        (TrainRequest(epochs=1, compose="sorted"), [], "sorted"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(drawn_plan, arguments, tmp_path, options, more, said):
    with pytest.raises(UserError, match=said):
        train(drawn_plan, [*arguments, *more], options, report=lambda _: None)
    assert not (tmp_path / "logs").exists()


def test_validation_stays_open_clip_s(drawn_plan, arguments, tmp_path, make_image):
    lines = ["filepath\ttitle"]
    for number in range(6):
        path = tmp_path / f"{number}.png"
        path.write_bytes(make_image(number, "PNG", 32))
        lines.append(f"{path}\tpicture {number}")
    (tmp_path / "val.tsv").write_text("\n".join(lines))
    more = ["--val-data", str(tmp_path / "val.tsv"), "--dataset-type", "csv", "--save-frequency", "1"]
    train(drawn_plan, [*arguments, *more], TrainRequest(samples_seen=64, checkpoint_every=2), report=lambda _: None)
    checkpoints = tmp_path / "logs" / "run" / "checkpoints"
    results = [json.loads(line) for line in (checkpoints / "results.jsonl").read_text().splitlines()]
    assert [(result["epoch"], result["num_samples"]) for result in results] == [(1, 6), (2, 6)]
    assert {path.name for path in checkpoints.glob("*.pt")} == {"epoch_1.pt", "epoch_2.pt", "epoch_latest.pt"}


def test_help_is_open_clip_s(drawn_plan):
    result = CliRunner().invoke(
        app, ["train", str(drawn_plan.catalog.folder), "epochs", "--", "--help"], catch_exceptions=False
    )
    assert result.exit_code == 0
    assert "--gather-with-grad" in result.output


def test_a_long_warm_up_is_noted(drawn_plan, arguments):
    told = []
    train(drawn_plan, [*arguments, "--warmup", "100"], TrainRequest(samples_seen=32), report=told.append)
    assert "the warm-up (100 steps) is as long as the training" in "".join(told)


def test_a_run_of_open_clip_s_own_is_left_alone(drawn_plan, arguments, tmp_path):
    folder = tmp_path / "logs" / "run"
    folder.mkdir(parents=True)
    (folder / "out.log").write_text("mine")
    for resume in (False, True):
        with pytest.raises(UserError, match="did not start"):
            train(drawn_plan, arguments, TrainRequest(epochs=1, resume=resume), report=lambda _: None)
    assert (folder / "out.log").read_text() == "mine"
