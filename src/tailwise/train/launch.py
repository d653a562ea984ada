"""Runs open_clip's trainer in this process, phase after phase; under torchrun, in each of its processes."""

from __future__ import annotations

import copy
import gc
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from tailwise import __version__
from tailwise.context import Context
from tailwise.errors import ConflictError
from tailwise.loader.loader import Loader
from tailwise.loader.pool import require_bytes
from tailwise.plan.plan import Plan
from tailwise.recipes import Recipe
from tailwise.requests import TrainRequest, bytes_of
from tailwise.storage.local import replacing
from tailwise.train.arguments import LOCAL_MODEL
from tailwise.train.data import Record, SegmentLoader
from tailwise.train.guard import SCHEDULES, Trainer, find_trainer
from tailwise.train.outline import check, describe, describe_result, trainer_arguments
from tailwise.train.phases import REPLACED, WEIGHTS, Report, Run, decide
from tailwise.train.runs import check_same, read_run, write_run

logger = logging.getLogger(__name__)
REPLACING = ("check", "damaged")  # options that decide which samples are replaced
# Of OrderOptions and of Loader.
ORDER = ("accumulation", "seed", "lanes", "block", "compose", "first_epoch", "captions")


def train(
    plan: Plan,
    argv: Sequence[str],  # open_clip's arguments
    options: TrainRequest,
    recipe: Recipe | None = None,  # settings that `argv` and `options` override
    report: Report = logger.info,  # takes lines for the user on rank 0
    context: Context | None = None,  # runs the tasks and shows progress of one-time work on rank 0
    *,
    dry_run: bool = False,  # check and report all that can be, and neither start nor write anything
) -> list[Run]:
    """Train with open_clip on the samples that a plan draws; return the phases of the training.

    Raises:
        UserError: a mistake in options, recipe or arguments; an unknown version of open_clip; the run exists already, or is resumed with
            other settings; a sample cannot be read.
    """
    context = context or Context()
    require_bytes(plan)  # before a folder is made
    os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")  # torch unpickled checkpoints before 2.6
    trainer = find_trainer()
    leader = trainer.ranks()[0] == 0
    if not leader:
        report, context = lambda _: None, Context()
    runs = decide(plan, argv, options, recipe, trainer, context, keep=not dry_run)
    if leader:
        for run in runs:
            if (found := read_run(run.folder)) is not None and not options.resume:
                remedy = "go on with it by `resume`, or give another `name` after the --"
                raise ConflictError(f"{run.folder} holds a run already: {remedy}")
            if found is not None:
                check_same(run.folder, found["decides"], run.decides)
        if dry_run:
            check(plan, runs, options, context)
        report(f"open_clip_torch {trainer.version}: its trainer takes {trainer.seam.about}")
        describe(plan, runs, options, report, full=dry_run)
        _report_changes(runs, options, report)
    if dry_run:
        return runs
    left = [run for run in runs if not (run.found or {}).get("finished")]
    for run in left:
        _train_phase(plan, run, options, trainer, report, context, last=run is runs[-1])
    if not left:
        describe_result(plan, runs[-1], report, last=True)
        report("nothing left to train: all of it is finished")
    return runs


def _report_changes(runs: Sequence[Run], options: TrainRequest, report: Report) -> None:
    """Report changed options that affect samples and may still change between resumptions, because a tar may be lost."""
    for run in runs:
        if run.found is None or run.found["finished"]:
            continue
        for name in REPLACING:
            now = getattr(options, name)
            if (before := run.found["about"].get(name, now)) != now:
                change = f"{run.folder} was started with `{name}` {before}, and goes on with {now}"
                report(f"  note: {change}: from here on, other samples may be replaced")


def _train_phase(
    plan: Plan, run: Run, options: TrainRequest, trainer: Trainer, report: Report, context: Context, *, last: bool
) -> None:
    about = {
        "tailwise": __version__,
        "catalog": str(plan.catalog.folder),
        "arguments": run.arguments,
        "last epoch": run.last_epoch,
        **{name: getattr(options, name) for name in REPLACING},
    }
    if run.rank == 0:
        write_run(run.folder, run.decides, about, finished=False)
    with _own_data(plan, run, options, trainer, context), _own_steps(run, trainer), _own_log(), _ranks_on_cpu():
        if trainer.main.main(trainer_arguments(plan, run, options)) == -1:
            raise SystemExit(1)  # the trainer has logged the reason
    if run.rank == 0:
        if not last:
            _save_weights(run, run.folder / "checkpoints" / trainer.main.LATEST_CHECKPOINT_NAME)
        write_run(run.folder, run.decides, about, finished=True)
        describe_result(plan, run, report, last=last)
    _leave_group(again=not last)


@contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:  # noqa: ANN401  (any module)
    """Replace attributes of another package while the context lasts."""
    originals = {name: getattr(owner, name) for name in values}
    vars(owner).update(values)
    try:
        yield
    finally:
        vars(owner).update(originals)


@contextmanager
def _own_data(plan: Plan, run: Run, options: TrainRequest, trainer: Trainer, context: Context) -> Iterator[None]:
    """Give the trainer training data from a plan; its other data stay."""
    original = trainer.main.get_data
    made: list[Loader] = []
    record = Record(options.record, run.folder.name, run.rank) if options.record else None

    def get_data(args: Any, preprocess_fns: Any, epoch: int = 0, tokenizer: Any = None, **more: Any) -> dict[str, Any]:  # noqa: ANN401
        others = copy.copy(args)
        others.train_data = None
        data: dict[str, Any] = original(others, preprocess_fns, epoch=epoch, tokenizer=tokenizer, **more)
        run.folder.mkdir(parents=True, exist_ok=True)  # for the log; rank 0 may run on another node
        loader = Loader(
            plan,
            batch_size=run.parsed.batch_size,
            rank=run.rank,
            world_size=run.ranks,
            transform=preprocess_fns[0],
            tokenizer=tokenizer,
            workers=args.workers,
            **{name: getattr(run.order, name) for name in ORDER},
            check=options.check,
            on_damaged=options.damaged,
            max_replaced=options.max_replaced,
            cache_folder=options.cache,
            cache_bytes=bytes_of("cache_size", options.cache_size),
            log=run.folder / f"{REPLACED}{run.rank}.jsonl",
            pin_memory=torch.device(args.device).type == "cuda",
            context=context,
        )
        made.append(loader)
        seed, size = (run.order.seed, run.number, run.rank), run.order.batch_size
        how: dict[str, Any] = {"segments": run.segments, "form": trainer.seam.form, "record": record}
        return {"train": SegmentLoader(loader, global_batch=size, seed=seed, **how), **data}

    with closing(record) if record is not None else nullcontext(), _replaced(trainer.main, get_data=get_data):
        yield
    for loader in made:
        if loader.without_caption:
            logger.info(
                "%s draws of rank %d had samples without the caption that was drawn: their own was used",
                f"{loader.without_caption:,}",
                run.rank,
            )
        loader.close()


def _own_steps(run: Run, trainer: Trainer) -> AbstractContextManager[None]:
    """End the trainer's schedules with the last step: the trainer assumes equal segments, but the last may be shorter."""

    def ending(schedule: Callable[..., Any]) -> Callable[..., Any]:
        steps = run.batches // run.order.accumulation
        return lambda optimizer, lr, warmup, _, *more: schedule(optimizer, lr, warmup, steps, *more)

    return _replaced(trainer.main, **{name: ending(getattr(trainer.main, name)) for name in SCHEDULES})


@contextmanager
def _own_log() -> Iterator[None]:
    """Remove the log handlers that the trainer adds, so that a second phase does not write into the first one's log.

    Restore the levels of all loggers too, because the trainer makes them verbose.
    """
    before, levels = list(logging.root.handlers), {logger: logger.level for logger in _loggers()}
    try:
        yield
    finally:
        for logger in _loggers():
            logger.setLevel(levels.get(logger, logging.NOTSET))
        for handler in [handler for handler in logging.root.handlers if handler not in before]:
            logging.root.removeHandler(handler)
            handler.close()


def _loggers() -> list[logging.Logger]:
    named = list(logging.root.manager.loggerDict.values())
    return [logging.root, *(item for item in named if isinstance(item, logging.Logger))]


def _ranks_on_cpu() -> AbstractContextManager[None]:
    """Let several ranks train on the CPU: the trainer passes the device to torch's wrapper, which accepts GPUs only."""
    wrapper = torch.nn.parallel.DistributedDataParallel

    def wrap(module: torch.nn.Module, device_ids: Any = None, **more: Any) -> torch.nn.Module:  # noqa: ANN401
        on_cpu = all(torch.device(device).type == "cpu" for device in device_ids or ())
        return wrapper(module, device_ids=None if on_cpu else device_ids, **more)

    return _replaced(torch.nn.parallel, DistributedDataParallel=wrap)


def _save_weights(run: Run, checkpoint: Path) -> None:
    """Write the weights of a phase to a folder from which open_clip can make the model of the next phase."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    run.final.mkdir(exist_ok=True)
    if run.parsed.model.startswith(LOCAL_MODEL):
        folder = Path(run.parsed.model.removeprefix(LOCAL_MODEL))
        for path in folder.iterdir():
            if path.is_file() and path.suffix not in {".bin", ".pth", ".safetensors"}:
                shutil.copyfile(path, run.final / path.name)
    with replacing(run.final / WEIGHTS) as temporary:
        torch.save({name.removeprefix("module."): value for name, value in state.items()}, temporary)


def _leave_group(*, again: bool) -> None:
    """End the process group, which the trainer leaves open; with `again`, agree on another port for the next group first.

    The trainer makes the next group from the same environment. Its store may be torchrun's, which still has the first group's addresses.
    So the next group gets its own store, on rank 0.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if again:
            with socket.socket() as probe:
                probe.bind(("", 0))
                port = [int(probe.getsockname()[1])]  # a free one
            torch.distributed.broadcast_object_list(port, src=0)
            os.environ["MASTER_PORT"] = str(port[0])
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        torch.distributed.destroy_process_group()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
