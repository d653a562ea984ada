"""The trainers of a comparison: in this process, for small models and pools, or open_clip's trainer in a process of its own.

In this process, open_clip's model, loss, optimizer and schedule run on images decoded once. Batches are the loader's, bit for bit, and
steps are those of open_clip's trainer.
"""

from __future__ import annotations

import logging
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from tailwise.catalog.files import read_json, write_array, write_json
from tailwise.catalog.removals import Removals
from tailwise.compare.images import DecodedBatches, decoded_pool
from tailwise.compare.recipe import Training
from tailwise.context import Context
from tailwise.devices import find_device
from tailwise.encoders.open_clip import silenced
from tailwise.errors import UserError, refuse_many
from tailwise.execution.local import as_it_is, begin_worker
from tailwise.extras import require
from tailwise.loader.dataset import Batch
from tailwise.loader.order import Order, OrderOptions, choose_lanes
from tailwise.plan.plan import Plan
from tailwise.storage.local import replacing
from tailwise.text import option_words
from tailwise.train.data import reseed, undisturbed
from tailwise.train.segments import cut

PROBE_STEPS = 4


@dataclass(frozen=True)
class Trained:
    """Result of a training."""

    checkpoint: Path  # file in open_clip's format
    samples: int  # number of samples seen
    seconds: float  # duration of the training alone
    device: str  # name of the device
    last_loss: float | None = None  # mean over the last tenth of the steps; None if the trainer does not report it
    unique: int | None = None  # number of distinct samples seen; None if not reported
    epochs: int | None = None  # number of epochs started; None if not reported


def order_of(plan: Plan, training: Training, compose: str, seed: int) -> Order:
    """Return the order that open_clip's trainer would get."""
    lanes = choose_lanes(training.global_batch, 1)
    return Order(plan, OrderOptions(training.global_batch, seed=seed, lanes=lanes, compose=compose))


def train_in_process(
    plan: Plan,  # the samples to draw
    training: Training,
    *,
    seed: int,  # of weights, order and crops
    compose: str,  # how the order composes batches
    folder: Path,  # for `checkpoint.pt` and `losses.npy` (float32, one per step)
    cache: Path,  # folder of the decoded pool
    name: str,  # of the run
    context: Context | None = None,  # runs the tasks and shows progress
) -> Trained:
    """Train once.

    Raise a UserError if open_clip is not installed, the model is unknown, or the pool is too large to keep decoded.
    """
    context = context or Context()
    folder.mkdir(parents=True, exist_ok=True)
    device = find_device(training.device)
    with undisturbed(), _deterministic(device):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  (as open_clip's trainer does, before it makes the model)
        torch.manual_seed(seed)
        model = _make(training.model, device)
        source = _Source(plan, training, order_of(plan, training, compose, seed), cache, model, context)
        steps = Steps(model, training, source.steps, device)
        losses = np.empty(source.steps, np.float32)
        seen = np.zeros(plan.rows, np.bool_)
        start = time.perf_counter()
        shown = context.progress(source, name, source.steps, size=training.global_batch, unit="samples")
        for number, batch in enumerate(shown):
            if number % source.segment == 0:
                reseed(seed, 0, number // source.segment, 0)
            seen[batch.rows.numpy()] = True
            losses[number] = steps.take(number, batch.images, batch.texts)
        seconds = time.perf_counter() - start
    if not np.isfinite(losses).all():
        raise ArithmeticError(f"{name}: the loss became {losses[~np.isfinite(losses)][0]}; lower train.lr")
    write_array(folder / "losses.npy", losses)
    checkpoint = folder / "checkpoint.pt"
    state = {item: value.detach().cpu().contiguous() for item, value in model.state_dict().items()}
    with replacing(checkpoint) as path:
        torch.save({"epoch": 1, "name": name, "state_dict": state}, path)
    return Trained(
        checkpoint,
        source.steps * training.global_batch,
        seconds,
        torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        float(losses[-max(1, len(losses) // 10) :].mean()),
        int(seen.sum()),
        source.order.epoch_at(source.steps - 1) + 1,
    )


class Steps:
    """Optimizer steps as open_clip's trainer takes them."""

    def __init__(self, model: Any, training: Training, steps: int, device: torch.device) -> None:  # noqa: ANN401
        """Make optimizer, schedule and loss for `steps` steps of an open_clip model with `output_dict` on `device`."""
        import open_clip  # noqa: PLC0415  (an extra)
        from open_clip_train.scheduler import cosine_lr  # noqa: PLC0415

        self._model, self._device = model.train(), device
        self._bf16 = training.precision == "bf16"
        # As open_clip's trainer: gains, biases and the logit scale have no weight decay.
        trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
        plain, rest = ([value for name, value in trained if _is_plain(name, value) is kind] for kind in (True, False))
        self._optimizer = torch.optim.AdamW(
            [{"params": plain, "weight_decay": 0.0}, {"params": rest, "weight_decay": training.wd}],
            lr=training.lr,
            betas=(training.beta1, training.beta2),
            eps=training.eps,
            fused=True,  # else the embedding of 49,408 tokens takes 7 % of a step, not 1 %
        )
        self._schedule = cosine_lr(self._optimizer, training.lr, training.warmup, steps)
        self._loss = open_clip.ClipLoss()

    def take(self, number: int, images: torch.Tensor, texts: torch.Tensor) -> float:
        """Take one step on normalised images [G, 3, T, T] and tokens [G, L]; return the loss before it."""
        images = images.to(self._device).contiguous(memory_format=torch.channels_last)
        texts = texts.to(self._device)
        self._schedule(number)
        self._optimizer.zero_grad()
        with _precision(self._device, bf16=self._bf16):
            loss: torch.Tensor = self._loss(**self._model(images, texts))
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        with torch.no_grad():
            self._model.logit_scale.clamp_(0, math.log(100))
        return float(loss.detach())


@contextmanager
def _precision(device: torch.device, *, bf16: bool) -> Iterator[None]:
    """Set autocast as in open_clip's trainer. On a CPU, unfused attention over a few tokens is faster than the fused kernel."""
    plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" and bf16 else nullcontext()
    with plain, torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
        yield


class _Source:
    def __init__(
        self,
        plan: Plan,
        training: Training,
        order: Order,
        cache: Path,
        model: Any,  # noqa: ANN401
        context: Context,
    ) -> None:
        """Decode the pool, and refuse one of which too much can't be read."""
        self.order = order
        segments = cut(training.samples_seen // training.global_batch)
        self.steps, self.segment = segments.batches, segments.length
        factory = _open_clip()
        pool = decoded_pool(plan.catalog, plan.snapshot, cache, most_pixels=training.cache_pixels, context=context)
        removals = Removals.of(plan.catalog, plan.snapshot)
        broken = int((~pool.readable).sum()) - len(removals.rows)  # removed samples were not decoded
        causes = "other samples would replace them"
        what, rows = "{} samples{} of the pool can't be read", plan.rows - len(removals.rows)
        refuse_many(broken, rows, training.max_rejected, what, causes, "train.max_rejected")
        transform = factory.transform.image_transform_v2(
            factory.transform.PreprocessCfg(**model.visual.preprocess_cfg),
            is_train=True,
            aug_cfg=augmentation(training),
        )
        self.dataset = DecodedBatches(order, pool, removals, transform, factory.get_tokenizer(training.model))
        self._workers = training.workers

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the training."""
        how: dict[str, Any] = {"collate_fn": as_it_is, "worker_init_fn": begin_worker, "generator": torch.Generator()}
        batches = DataLoader(self.dataset, None, sampler=range(self.steps), num_workers=self._workers, **how)
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch


def augmentation(training: Training) -> dict[str, Any]:
    """Return the augmentation in open_clip's words. Without one, an image keeps its whole area; a long one is cropped to 4:3."""
    return dict(training.augment or {"scale": [1.0, 1.0]})


def preprocessing(model: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return a model's preprocessing: size (one number), mean, std, interpolation, resize_mode, fill_color."""
    config = dict(model.visual.preprocess_cfg)
    size = config["size"]
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UserError(f"the model takes images of {size}: must be square to be cached; use `trainer: open_clip`")
    return {**config, "size": int(sides.pop())}


def seconds_per_step(training: Training) -> float:
    """Return the duration of a step on this machine, measured over a few steps on random samples."""
    device = find_device(training.device)
    with undisturbed():
        model = _make(training.model, device)
        steps = Steps(model, training, PROBE_STEPS + 2, device)
        size = preprocessing(model)["size"]
        images = torch.randn(training.global_batch, 3, size, size, device=device)
        texts = _open_clip().get_tokenizer(training.model)(["a photo of something"] * training.global_batch).to(device)
        seconds = []
        for number in range(PROBE_STEPS + 1):
            start = time.perf_counter()
            steps.take(number, images, texts)
            seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def _open_clip() -> Any:  # noqa: ANN401
    require("train", "open_clip", "open_clip_train", purpose="training")
    import open_clip  # noqa: PLC0415  (an extra)

    return open_clip


def _make(name: str, device: torch.device) -> Any:  # noqa: ANN401
    """Return a model with random weights."""
    factory = _open_clip()
    try:
        with silenced(logging.WARNING):  # open_clip warns that no pretrained weights are loaded
            model = factory.create_model(name, device=device, output_dict=True)
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        remedy = "give local-dir:FOLDER or a name that open_clip knows"
        raise UserError(f"train.model {name!r} can't be made ({error}): {remedy}") from error
    return model.to(memory_format=torch.channels_last)


def _is_plain(name: str, value: torch.Tensor) -> bool:
    return value.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale"))


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Make results on a GPU repeatable: choose algorithms of cuDNN and cuBLAS whose sums do not depend on timing."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


# --- open_clip's trainer ----------------------------------------------------------------------------------------------


_LOGGED = re.compile(rb"Train Epoch: (\d+) \[ *(\d+)/")
RUN = "training"  # folder of the open_clip trainer within the run's folder


def train_by_open_clip(
    plan: Plan,
    training: Training,
    *,
    seed: int,
    compose: str,
    folder: Path,
    cache: Path,  # noqa: ARG001  (images are decoded during the training)
    name: str,
    context: Context | None = None,
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
    segments = cut(training.samples_seen // training.global_batch)
    with log.open("ab") as stream:
        written = stream.tell()
        # A new session: otherwise Ctrl-C would reach the trainer twice, from the terminal and from here.
        process = subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            steps = _logged_steps(process, log, written, segments.length, training.global_batch)
            progress = (context or Context()).progress
            for _ in progress(steps, name, segments.batches, size=training.global_batch, unit="samples"):
                pass
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            seconds = before + time.perf_counter() - start
            write_json(clock, seconds)
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
        raise UserError(f"{name}: the trainer ended with code {code}, see {log}: {' | '.join(lines)}")
    device = str(find_device(training.device))
    checkpoint = folder / RUN / "checkpoints" / f"epoch_{segments.count}.pt"
    return Trained(checkpoint, segments.batches * training.global_batch, seconds, device)


def _logged_steps(process: subprocess.Popen[bytes], log: Path, written: int, segment: int, batch: int) -> Iterator[int]:
    """Yield the number of each step that a trainer logs behind the first `written` bytes, until it ends; `segment` is in steps."""
    seen = 0
    with log.open("rb") as stream:
        stream.seek(written)
        while process.poll() is None:
            for epoch, samples in _LOGGED.findall(stream.read()):
                done = int(epoch) * segment + int(samples) // batch
                yield from range(seen, done)
                seen = max(seen, done)
            with suppress(subprocess.TimeoutExpired):
                process.wait(1)


def open_clip_arguments(training: Training) -> dict[str, Any]:
    """Return a training as arguments of open_clip's trainer."""
    shared = ("model", "lr", "warmup", "wd", "beta1", "beta2", "eps", "workers")
    return {
        **{name: getattr(training, name) for name in shared},
        "batch-size": training.global_batch,
        "precision": {"fp32": "fp32", "bf16": "amp_bf16"}[training.precision],
        "device": str(find_device(training.device)),
        "aug-cfg": augmentation(training),
        "delete-previous-checkpoint": True,
        **training.open_clip,
    }


TRAINERS: Mapping[str, Callable[..., Trained]] = {"in-process": train_in_process, "open_clip": train_by_open_clip}
