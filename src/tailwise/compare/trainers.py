"""The table of trainers that a comparison can use."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tailwise.catalog.files import read_json, write_json
from tailwise.compare.inprocess import Trained, train_in_process
from tailwise.compare.recipe import Training
from tailwise.context import Context
from tailwise.devices import find_device
from tailwise.errors import UserError
from tailwise.plan.plan import Plan
from tailwise.text import option_words
from tailwise.train.segments import cut

RUN = "training"  # folder of the open_clip trainer within the run's folder
SHOWN_LINES = 5  # of the trainer's log, in an error


def train_by_open_clip(
    plan: Plan,
    training: Training,
    *,
    seed: int,
    compose: str,
    folder: Path,
    cache: Path,  # noqa: ARG001  (images are decoded during the training)
    name: str,
    context: Context | None = None,  # noqa: ARG001  (open_clip writes its own log)
) -> Trained:
    """Train once with open_clip's trainer, by `tailwise train` in its own process; an interrupted training is resumed.

    The parameters are those of `train_in_process`. Raise a UserError if the trainer refuses its arguments or fails; the message has its
    last lines.
    """
    words = [sys.executable, "-m", "tailwise", "train", str(plan.catalog.folder), plan.name]
    words += option_words({"samples-seen": training.samples_seen, "seed": seed, "compose": compose, "resume": True})
    words += ["--", *option_words({**open_clip_arguments(training), "logs": folder, "name": RUN})]
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "trainer.log"
    clock = folder / "seconds.json"
    before = float(read_json(clock)) if clock.exists() else 0.0
    start = time.perf_counter()
    with log.open("ab") as stream:
        # A new session: otherwise Ctrl-C would reach the trainer twice, from the terminal and from here.
        process = subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            seconds = before + time.perf_counter() - start
            write_json(clock, seconds)
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-SHOWN_LINES:]
        raise UserError(f"{name}: the trainer ended with code {code}, see {log}: {' | '.join(lines)}")
    segments = cut(training.samples_seen // training.global_batch)
    device = str(find_device(training.device))
    checkpoint = folder / RUN / "checkpoints" / f"epoch_{segments.count}.pt"
    return Trained(checkpoint, segments.batches * training.global_batch, seconds, device)


def open_clip_arguments(training: Training) -> dict[str, Any]:
    """Return a training as arguments of open_clip's trainer."""
    return {
        "model": training.model,
        "batch-size": training.global_batch,
        "lr": training.lr,
        "warmup": training.warmup,
        "wd": training.wd,
        "beta1": training.beta1,
        "beta2": training.beta2,
        "eps": training.eps,
        "precision": {"fp32": "fp32", "bf16": "amp_bf16"}[training.precision],
        "device": str(find_device(training.device)),
        "workers": training.workers,
        "aug-cfg": training.augment or {"scale": [1.0, 1.0]},
        "delete-previous-checkpoint": True,
        **training.open_clip,
    }


TRAINERS: Mapping[str, Callable[..., Trained]] = {"in-process": train_in_process, "open_clip": train_by_open_clip}


def find_trainer(name: str) -> Callable[..., Trained]:
    """Return the trainer of a name, or raise a UserError that lists the names."""
    if name not in TRAINERS:
        raise UserError(f"train.trainer is {name!r}: must be one of {', '.join(TRAINERS)}")
    return TRAINERS[name]
