"""Real processes: two ranks over gloo, killed with -9 in the middle of a segment, against a training that was not interrupted."""

import contextlib
import os
import re
import shlex
import shutil
import signal

import pytest
import torch

from tailwise.catalog import Catalog
from tailwise.requests import PlanRequest
from tailwise.steps.planning.plan import make_plan

SEGMENT = 4
EPOCH = 10  # batches: epochs change in the middle of a segment
LAST = 6  # number of the batch that a training is killed at


def killed(record):
    """The code of a training whose process is killed when it has written batch LAST to a record."""
    return f"""
import os, signal
from tailwise.cli import main
from tailwise.train.data import Record

add = Record.add

def killed(self, segment, number, batch):
    add(self, segment, number, batch)
    if (str(self.path), number) == ({str(record)!r}, {LAST}):
        os.kill(os.getpid(), signal.SIGKILL)

Record.add = killed
main()
"""


@pytest.fixture(scope="module")
def short_plan(drawn_plan, tmp_path_factory):
    """Plan "epochs": 320 of the 1,600 drawings."""
    folder = tmp_path_factory.mktemp("short") / "catalog"
    shutil.copytree(drawn_plan.catalog.folder, folder, ignore=shutil.ignore_patterns("plans"))
    return make_plan(Catalog.open(folder), "epochs", PlanRequest("random", keep=0.2))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model):
    path = tmp_path_factory.mktemp("recipe") / "two.yaml"
    settings = (
        f'model: "{tiny_model}", device: cpu, precision: fp32, workers: 1, log-every-n-steps: 1, lr: 1.0e-3, warmup: 12'
    )
    path.write_text(
        f"""
name: two
about: two phases
source: none
command: none
plan: none
expect: {{}}
phases:
  - {{epochs: 2, checkpoint_every: {SEGMENT}, global_batch: 32, open_clip: {{{settings}}}}}
  - {{samples_seen: 256, checkpoint_every: {SEGMENT}, global_batch: 32, open_clip: {{{settings}, force-patch-dropout: 0.25}}}}
"""
    )
    return path


def command(plan, recipe, folder, *options):
    catalog = plan.catalog.folder
    words = ["--recipe", recipe, "--record", folder / "record", *options, "--", "--logs", folder, "--name", "run"]
    return [catalog, "epochs", *words]


def finish(processes, log):
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * len(processes), log.read_text()[-5000:]


def by_batch(lines):
    """{batch: rows, epochs, checksums}; where a batch was repeated after a kill, both must be the same."""
    seen = {}
    for line in lines:
        content = {name: value for name, value in line.items() if name != "batch"}
        assert seen.setdefault(line["batch"], content) == content
    return seen


def logged(path):
    """{(segment, samples): learning rate, scale, loss}, as open_clip logged them; the last of those that were repeated."""
    pattern = re.compile(r"Train Epoch: (\d+) \[ *(\d+)/.*(LR: .*)$", re.MULTILINE)
    return {(int(segment), int(samples)): rest for segment, samples, rest in pattern.findall(path.read_text())}


def test_killed_and_resumed_equals_uninterrupted(
    short_plan, recipe, tmp_path, fork_train, read_record, wait_until, descendants, running
):
    whole, broken, single = (tmp_path / name for name in ("whole", "broken", "single"))
    for folder in (whole, broken, single):
        folder.mkdir()
    finish(fork_train(command(short_plan, recipe, whole), whole / "log", 2), whole / "log")

    record = broken / "record" / "run-phase1.rank-0.jsonl"
    processes = fork_train(command(short_plan, recipe, broken), broken / "log", 2, killed(record))
    wait_until(record.exists, processes[0].is_alive, broken / "log")
    begun = [pid for process in processes for pid in (process.pid, *descendants(process.pid))]
    processes[0].join(300)
    for pid in begun:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(map(running, begun)))
    assert len(read_record(record)) == LAST + 1, (broken / "log").read_text()[-5000:]
    assert not (broken / "run-phase2").exists()
    finish(fork_train(command(short_plan, recipe, broken, "--resume"), broken / "log", 2), broken / "log")
    # Only one segment was begun again.
    assert len(read_record(record)) == LAST + 1 + 2 * EPOCH - LAST // SEGMENT * SEGMENT

    for phase, segments in (("run-phase1", 5), ("run-phase2", 2)):
        for rank in (0, 1):
            name = f"record/{phase}.rank-{rank}.jsonl"
            seen = by_batch(read_record(whole / name))
            assert list(seen) == list(range(segments * SEGMENT))
            assert by_batch(read_record(broken / name)) == seen
        assert logged(whole / phase / "out.log") == logged(broken / phase / "out.log")
        assert len(logged(whole / phase / "out.log")) == segments * SEGMENT
        first, second = (torch.load(folder / phase / "checkpoints" / "epoch_latest.pt") for folder in (whole, broken))
        assert same(first, second)

    # One rank with the same global batch sees the same samples in the same batches.
    finish(fork_train(command(short_plan, recipe, single), single / "log"), single / "log")
    for phase in ("run-phase1", "run-phase2"):
        ranks = [by_batch(read_record(whole / f"record/{phase}.rank-{rank}.jsonl")) for rank in (0, 1)]
        alone = by_batch(read_record(single / f"record/{phase}.rank-0.jsonl"))
        assert list(alone) == list(ranks[0])
        for number, content in alone.items():
            for name in ("rows", "epochs"):
                assert content[name] == ranks[0][number][name] + ranks[1][number][name]


def test_given_lengths_of_phases_are_resumed_after_a_kill(
    short_plan, recipe, tmp_path, fork_train, read_record, descendants, running, wait_until
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    lengths = ["--samples-seen", "128,384"]  # 1 and 3 segments
    finish(fork_train(command(short_plan, recipe, whole, *lengths), whole / "log"), whole / "log")

    record = broken / "record" / "run-phase2.rank-0.jsonl"
    (process,) = fork_train(command(short_plan, recipe, broken, *lengths), broken / "log", code=killed(record))
    wait_until(record.exists, process.is_alive, broken / "log")
    workers = descendants(process.pid)
    process.join(300)
    wait_until(lambda: not any(map(running, workers)))
    assert len(read_record(record)) == LAST + 1, (broken / "log").read_text()[-5000:]

    (other,) = fork_train(
        command(short_plan, recipe, broken, "--samples-seen", "128,256", "--resume"), broken / "other"
    )
    other.join(300)
    assert other.exitcode == 2
    assert "run-phase2 can't be resumed with other settings" in (broken / "other").read_text()

    finish(fork_train(command(short_plan, recipe, broken, *lengths, "--resume"), broken / "log"), broken / "log")
    assert len(read_record(record)) == LAST + 1 + 3 * SEGMENT - LAST // SEGMENT * SEGMENT
    for phase, batches in (("run-phase1", SEGMENT), ("run-phase2", 3 * SEGMENT)):
        seen = by_batch(read_record(whole / f"record/{phase}.rank-0.jsonl"))
        assert list(seen) == list(range(batches))
        assert by_batch(read_record(broken / f"record/{phase}.rank-0.jsonl")) == seen
        assert logged(whole / phase / "out.log") == logged(broken / phase / "out.log")
        first, second = (torch.load(folder / phase / "checkpoints" / "epoch_latest.pt") for folder in (whole, broken))
        assert same(first, second)


def same(first, second):
    """Whether two checkpoints are equal, bit by bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def test_an_interrupted_training_names_the_command_that_resumes_it(
    drawn_plan, tiny_model, tmp_path, fork_train, wait_until, descendants, running
):
    log, logs = tmp_path / "log", tmp_path / "my logs"
    settings = ["--model", tiny_model, "--device", "cpu", "--precision", "fp32", "--batch-size", "16", "--workers", "1"]
    words = [drawn_plan.catalog.folder, "epochs", "--samples-seen", "1600", "--checkpoint-every", "5", "--"]
    (process,) = fork_train([*words, *settings, "--logs", logs, "--warmup", "4"], log)
    wait_until(lambda: list(logs.rglob("epoch_latest.pt")), process.is_alive, log)
    children = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it, to workers as well
    process.join(300)
    assert process.exitcode == 1
    said = log.read_text()
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith("tailwise: interrupted; to go on, run: tailwise train ")
    assert last.endswith(f"--resume -- {shlex.join([*settings, '--logs', str(logs), '--warmup', '4'])}")
    assert not any(map(running, children))
    command = shlex.split(last.partition("to go on, run: tailwise train ")[2])
    finish(fork_train(command, log), log)
    said = log.read_text()
    assert "=> resuming checkpoint" in said
    assert "saw 1,600 samples in 100 batches, epochs 0 to 1 of plan 'epochs'; 0 of them replaced" in said


def test_interrupted_ranks_end_and_one_of_them_gives_the_advice(
    drawn_plan, tiny_model, tmp_path, launch_train, wait_until, descendants, running
):
    log, logs = tmp_path / "log", tmp_path / "logs"
    settings = ["--model", tiny_model, "--device", "cpu", "--precision", "fp32", "--batch-size", "8", "--workers", "1"]
    words = [drawn_plan.catalog.folder, "epochs", "--samples-seen", "64000", "--checkpoint-every", "5", "--"]
    process = launch_train([*words, *settings, "--logs", logs, "--warmup", "4"], log)
    wait_until(lambda: list(logs.rglob("epoch_latest.pt")), lambda: process.poll() is None, log)
    children = descendants(process.pid)
    process.send_signal(signal.SIGTERM)  # to the launcher, which passes it on
    process.wait(timeout=300)
    wait_until(lambda: not any(map(running, children)))
    advice = [line for line in log.read_text().splitlines() if "tailwise: interrupted; " in line]
    assert len(advice) == 1
    assert "start the same ranks with: -m tailwise train" in advice[0]
    assert " --resume -- " in advice[0]
