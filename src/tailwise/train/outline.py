"""Reports of a training: its work and files, phase by phase, before anything starts; and its result."""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tailwise.catalog import layout
from tailwise.context import Context
from tailwise.errors import DamagedError, UserError
from tailwise.loader.pool import check_damaged, find_damaged
from tailwise.plan.explain import explain
from tailwise.plan.plan import Plan
from tailwise.requests import TrainRequest
from tailwise.text import command_line, option_words
from tailwise.train.arguments import LOCAL_MODEL
from tailwise.train.phases import REPLACED, WEIGHTS, Report, Run
from tailwise.train.runs import FILE

LATEST = "epoch_latest.pt"  # the trainer's name of its newest checkpoint


def trainer_arguments(plan: Plan, run: Run, options: TrainRequest) -> list[str]:
    """Return all arguments for open_clip: those of the run, then tailwise's."""
    own = {
        "train-data": f"tailwise plan {plan.name} of {plan.catalog.folder}",
        "train-num-samples": run.segments.length * run.order.batch_size,
        "epochs": run.segments.count,
        "seed": run.order.seed,
        "logs": Path(run.parsed.logs),
        "name": run.folder.relative_to(Path(run.parsed.logs)).as_posix(),
        "save-most-recent": True,
        "resume": "latest" if options.resume else None,
    }
    if run.start is not None and run.parsed.model.startswith(LOCAL_MODEL):
        own["model"] = f"{LOCAL_MODEL}{run.start.final}"
        # Explicit, because open_clip's defaults of these depend on the model's name.
        own |= {name: getattr(run.parsed, name) for name in ("lr", "beta1", "beta2", "eps")}
    elif run.start is not None:
        own["pretrained"] = run.start.final / WEIGHTS
    return [*run.arguments, *option_words(own)]


def check(plan: Plan, runs: Sequence[Run], options: TrainRequest, context: Context) -> None:
    """Raise a UserError if shards are not as imported, or a folder of the runs cannot be written to."""
    for run in runs:
        place = next(parent for parent in (run.folder, *run.folder.absolute().parents) if parent.exists())
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise UserError(f"{place} can't be written to: give another `logs` after the --")
    check_damaged(plan, find_damaged(plan, options.check, (0, 1), None, context), options.damaged, options.max_replaced)


def outline(plan: Plan, run: Run, options: TrainRequest, *, last: bool) -> dict[str, Any]:
    """Return what a phase will do, as JSON values. Raise a UserError if a checkpoint that it resumes from is damaged."""
    finished, done = _progress(run)
    order, segments = run.order, run.segments
    return {
        "phase": run.number + 1,
        "folder": str(run.folder),
        "state": "finished" if finished else "resumed" if done else "new",
        "segments_done": done,
        "first_batch": run.batches if finished else done * segments.length,
        "first_epoch": order.first_epoch,
        "last_epoch": run.last_epoch,
        "samples": run.batches * order.batch_size,
        "samples_left_out": segments.left_out * order.batch_size,
        "batches": run.batches,
        "steps": run.batches // order.accumulation,
        "segments": segments.count,
        "batches_of_a_segment": segments.length,
        "ranks": run.ranks,
        "global_batch": order.batch_size,
        "batch_size": run.parsed.batch_size,
        **{name: getattr(order, name) for name in ("accumulation", "seed", "lanes", "block", "compose")},
        **({"captions": dict(order.captions)} if order.captions else {}),
        "open_clip": trainer_arguments(plan, run, options),
        "writes": [] if finished else [str(path) for path in _written(plan, run, options, last=last)],
    }


def _progress(run: Run) -> tuple[bool, int]:
    """Return whether a phase is finished, and the number of segments whose checkpoint is there."""
    if run.found is None or run.found["finished"]:
        return run.found is not None, run.segments.count if run.found else 0
    path = run.folder / "checkpoints" / LATEST
    if not path.exists():
        return False, 0
    try:
        return False, int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["epoch"])
    except (OSError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise DamagedError(
            f"checkpoint {path} can't be read: restore it, or remove {run.folder} to start again"
        ) from error


def _written(plan: Plan, run: Run, options: TrainRequest, *, last: bool) -> list[Path]:
    """Return the files that a phase writes; a folder where another program, or the plan, names its files."""
    parsed, checkpoints, ranks = run.parsed, run.folder / "checkpoints", range(run.ranks)
    frequency, count = parsed.save_frequency, run.segments.count
    kept = {*range(frequency, count, frequency)} if frequency > 0 else set()
    paths = [run.folder / FILE, run.folder / "params.txt"]
    paths += [run.folder / name for name in ([f"out-{rank}" for rank in ranks] if parsed.log_local else ["out.log"])]
    paths += [run.folder / f"{REPLACED}{rank}.jsonl" for rank in ranks]
    paths += [checkpoints / LATEST, *(checkpoints / f"epoch_{segment}.pt" for segment in sorted({*kept, count}))]
    if parsed.val_data or parsed.imagenet_val or parsed.imagenet_v2:
        paths.append(checkpoints / "results.jsonl")
    for logger, path in (("tensorboard", run.folder / "tensorboard"), ("wandb", Path("wandb"))):
        if logger in parsed.report_to or "all" in parsed.report_to:  # as the trainer decides
            paths.append(path)
    if not last:
        paths.append(run.final)
    if options.record is not None:
        paths += [options.record / f"{run.folder.name}.rank-{rank}.jsonl" for rank in ranks]
    if options.cache is not None:
        paths.append(options.cache)
    return paths if plan.exact else [*paths, plan.folder / layout.UNITS]


def describe_result(plan: Plan, run: Run, report: Report, *, last: bool) -> None:
    """Report what a finished phase saw, its loss and checkpoint, and after the last phase the command that evaluates it."""
    logs = sorted(run.folder.glob(f"{REPLACED}*.jsonl"))
    # A set, because a batch that was trained again after an interruption is logged twice.
    replaced = {json.loads(line)["position"] for log in logs for line in log.read_text(encoding="utf-8").splitlines()}
    place = f", listed in {logs[0].parent}/{REPLACED}*" if replaced else ""
    report(
        f"{run.folder}: saw {run.batches * run.order.batch_size:,} samples in {run.batches:,} batches, {run.epochs} of plan "
        f"{plan.name!r}; {len(replaced):,} of them replaced{place}"
    )
    seen = explain(plan, run.last_epoch + 1).epochs[-1].covered
    drawn = f"epochs 0 to {run.last_epoch} draw" if run.last_epoch else "epoch 0 draws"
    about = "" if plan.exact else "about "
    report(f"  {drawn} {about}{seen:,.0f} distinct samples, {seen / plan.pool:.1%} of the pool{_last_loss(run)}")
    report(f"  checkpoint: {run.folder / 'checkpoints' / f'epoch_{run.segments.count}.pt'}")
    if last:
        report(f"next: {command_line('evaluate', run.folder, data='SET', pool=plan.catalog.folder).strip('`')}")


def _last_loss(run: Run) -> str:
    """Return the loss that the trainer logged last; nothing where its log says none, or is elsewhere."""
    logs = sorted(run.folder.glob("out*"))[:1]
    found = re.findall(rb" Loss: ([\d.]+)", logs[0].read_bytes()) if logs else []
    return f"; the last loss is {float(found[-1]):.4g}" if found else ""


def describe(plan: Plan, runs: Sequence[Run], options: TrainRequest, report: Report, *, full: bool = False) -> None:
    """Report what the phases train on; with `full`, also where they start, what they write, and the arguments that open_clip gets."""
    for run in runs:
        order, left = run.order, run.segments.left_out
        which = f"phase {run.number + 1} of {len(runs)}: " if len(runs) > 1 else ""
        report(f"{which}{run.folder}: {run.epochs} of plan {plan.name!r}, order seed {order.seed}, {order.lanes} lanes")
        report(
            f"  {run.batches:,} batches of {order.batch_size:,} samples ({run.ranks} ranks × {run.parsed.batch_size:,}), "
            f"{run.batches // order.accumulation:,} steps, {run.batches * order.batch_size:,} samples"
        )
        if order.captions:
            shares = ", ".join(f"{name} {share:.4g}" for name, share in order.captions.items())
            report(f"  captions: {shares}; samples that lack one have their own")
        report(
            f"  {run.segments}, a checkpoint after each; left out: {left} batch{'es' * (left != 1)} "
            f"({left * order.batch_size:,} samples), and samples that fill no batch"
        )
        if run.parsed.warmup * order.accumulation >= run.batches:
            report(
                f"  note: the warm-up ({run.parsed.warmup:,} steps) is as long as the training: "
                "the learning rate never comes down; give `warmup` after the --"
            )
        if full:
            found = outline(plan, run, options, last=run is runs[-1])
            if found["state"] != "new":
                place = f"{found['segments_done']} of {found['segments']} segments are done"
                report(f"  {found['state']}: {place}; the next batch is {found['first_batch']:,} of {run.batches:,}")
            paths = [Path(path) for path in found["writes"]]
            names = [path.relative_to(run.folder) if path.is_relative_to(run.folder) else path for path in paths]
            shown = dict.fromkeys(re.sub(r"rank-\d+", "rank-R", str(name)) for name in names)
            report(f"  writes there: {', '.join(shown) or 'nothing'}")
            report(f"  open_clip: python -m open_clip_train.main {shlex.join(found['open_clip'])}")
    if full:
        report("dry run: all checks passed; nothing was started or written")
