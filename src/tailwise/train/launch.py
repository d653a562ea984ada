"""Runs open_clip's trainer, phase after phase, in this process; under torchrun, in each."""

from __future__ import annotations

import copy
import gc
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from tailwise import __version__
from tailwise.errors import ConflictError
from tailwise.loader import Loader
from tailwise.loader.shards import require_bytes
from tailwise.plan.plan import Plan
from tailwise.progress import Track, silent
from tailwise.recipes import Recipe
from tailwise.requests import TrainRequest, bytes_of
from tailwise.storage.local import replacing
from tailwise.text import option_words
from tailwise.train.arguments import LOCAL_MODEL
from tailwise.train.data import SegmentLoader, TrainData
from tailwise.train.guard import SCHEDULES, Trainer, find_trainer
from tailwise.train.phases import REPLACED, WEIGHTS, Run, decide, describe, describe_result
from tailwise.train.record import Record
from tailwise.train.runs import check_same, read_run, write_run

logger = logging.getLogger(__name__)


def train(
    plan: Plan,
    argv: Sequence[str],
    options: TrainRequest,
    recipe: Recipe | None = None,
    tell: Callable[[str], None] = logger.info,
    track: Track = silent,
) -> list[Run]:
    """Trains with open_clip on what a plan draws.

    Args:
        plan: of the catalog whose shards are trained on.
        argv: open_clip's arguments.
        options: ours.
        recipe: settings that `argv` and `options` go before.
        tell: takes lines for the user, by default the log; called on rank 0 only.
        track: shows progress of one-time work; likewise.

    Returns:
        The phases that the training has.

    Raises:
        UserError: a mistake in options, recipe or arguments; another open_clip than known; a run that is there already, or is
            resumed with other settings; a sample that can't be read.
    """
    require_bytes(plan)  # before a folder is made
    os.environ.setdefault(
        "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1"
    )  # open_clip leaves it to torch, which unpickled before 2.6
    trainer = find_trainer()
    if trainer.ranks()[0] != 0:
        track = silent
    runs = decide(plan, argv, options, recipe, trainer, track)
    quiet: Callable[[str], None] = tell if runs[0].rank == 0 else lambda _: None
    if runs[0].rank == 0:
        _check_folders(runs, resume=options.resume)
        describe(plan, runs, tell)
        _tell_changes(runs, options, tell)
    left = [run for run in runs if not (run.found or {}).get("finished")]
    for run in left:
        _train_phase(plan, run, options, trainer, quiet, track, last=run is runs[-1])
    if not left:
        describe_result(plan, runs[-1], quiet, last=True)
        quiet("nothing left to train: all of it is finished")
    return runs


def _check_folders(runs: Sequence[Run], *, resume: bool) -> None:
    for run in runs:
        found = read_run(run.folder)
        if found is None:
            continue
        if not resume:
            raise ConflictError(
                f"{run.folder} holds a run already: go on with it by `resume`, or give another `name` after the --"
            )
        check_same(run.folder, found["decides"], run.decides)


def _tell_changes(runs: Sequence[Run], options: TrainRequest, tell: Callable[[str], None]) -> None:
    """What may be another when a run goes on, though samples depend on it: a tar may be lost meanwhile."""
    for run in runs:
        if run.found is None or run.found["finished"]:
            continue
        for name, now in _replacing(options).items():
            before = run.found["about"].get(name, now)
            if before != now:
                tell(
                    f"  note: {run.folder} was begun with `{name}` {before}, and goes on with {now}: from here on, other samples may be "
                    "replaced than would have been"
                )


def _replacing(options: TrainRequest) -> dict[str, str]:
    """What decides which samples others stand in for."""
    return {"check": options.check, "damaged": options.damaged}


def _train_phase(
    plan: Plan,
    run: Run,
    options: TrainRequest,
    trainer: Trainer,
    tell: Callable[[str], None],
    track: Track,
    *,
    last: bool,
) -> None:
    about = {
        "tailwise": __version__,
        "catalog": str(plan.catalog.folder),
        "arguments": run.arguments,
        "last epoch": run.last_epoch,
        **_replacing(options),
    }
    if run.rank == 0:
        write_run(run.folder, run.decides, about, finished=False)
    with _own_data(plan, run, options, trainer, track) as made, _own_steps(run, trainer), _own_log(), _ranks_on_cpu():
        if trainer.main.main(_arguments(plan, run, options)) == -1:
            raise SystemExit(1)  # it has said why
    for loader in made:
        loader.close()
    if run.rank == 0:
        if not last:
            _save_weights(run, run.folder / "checkpoints" / trainer.main.LATEST_CHECKPOINT_NAME)
        write_run(run.folder, run.decides, about, finished=True)
        describe_result(plan, run, tell, last=last)
    _leave_group(run.rank, again=not last)


def _arguments(plan: Plan, run: Run, options: TrainRequest) -> list[str]:
    """All arguments for open_clip: those of the run, then ours."""
    words = [
        *run.arguments,
        *option_words(
            {
                "train-data": f"tailwise plan {plan.name} of {plan.catalog.folder}",
                "train-num-samples": run.segments.length * run.global_batch,
                "epochs": run.segments.count,
                "seed": run.seed,
                "logs": Path(run.parsed.logs),
                "name": run.folder.relative_to(Path(run.parsed.logs)).as_posix(),
                "save-most-recent": True,
                "resume": "latest" if options.resume else None,
            }
        ),
    ]
    if run.start is not None:
        if run.parsed.model.startswith(LOCAL_MODEL):
            words += option_words({"model": f"{LOCAL_MODEL}{run.start.final}"})
            # Said again, since open_clip's defaults of these depend on the model's name.
            words += option_words({name: getattr(run.parsed, name) for name in ("lr", "beta1", "beta2", "eps")})
        else:
            words += option_words({"pretrained": run.start.final / WEIGHTS})
    return words


def _log(run: Run) -> Path:
    return run.folder / f"{REPLACED}{run.rank}.jsonl"


@contextmanager
def _own_data(plan: Plan, run: Run, options: TrainRequest, trainer: Trainer, track: Track) -> Iterator[list[Loader]]:
    """While it lasts, the trainer gets its training data from us, and its other data as ever."""
    original = trainer.main.get_data
    made: list[Loader] = []
    record = Record(options.record, run.folder.name, run.rank) if options.record else None

    def get_data(args: Any, preprocess_fns: Any, epoch: int = 0, tokenizer: Any = None, **more: Any) -> dict[str, Any]:  # noqa: ANN401
        others = copy.copy(args)
        others.train_data = None
        data: dict[str, Any] = original(others, preprocess_fns, epoch=epoch, tokenizer=tokenizer, **more)
        run.folder.mkdir(parents=True, exist_ok=True)  # for the log; rank 0 may lie on another node
        loader = Loader(
            plan,
            batch_size=run.batch_size,
            rank=run.rank,
            world_size=run.ranks,
            accumulation=run.accumulation,
            transform=preprocess_fns[0],
            tokenizer=tokenizer,
            workers=args.workers,
            seed=run.seed,
            lanes=run.lanes,
            block=run.block,
            compose=run.compose,
            first_epoch=run.first_epoch,
            check=options.check,
            on_damaged=options.damaged,
            max_replaced=options.max_replaced,
            cache_folder=options.cache,
            cache_bytes=bytes_of("cache_size", options.cache_size),
            log=_log(run),
            pin_memory=torch.device(args.device).type == "cuda",
            track=track,
        )
        made.append(loader)
        segments = SegmentLoader(
            loader,
            segments=run.segments,
            global_batch=run.global_batch,
            seed=(run.seed, run.number, run.rank),
            form=trainer.form,
            record=record,
        )
        return {"train": TrainData(segments), **data}

    trainer.main.get_data = get_data  # type: ignore[attr-defined]
    try:
        yield made
    finally:
        trainer.main.get_data = original  # type: ignore[attr-defined]
        if record is not None:
            record.close()


@contextmanager
def _own_steps(run: Run, trainer: Trainer) -> Iterator[None]:
    """Lets the trainer's schedules end with the last step: it takes all segments for equal, but the last may be shorter."""
    originals = {name: getattr(trainer.main, name) for name in SCHEDULES}

    def ending(schedule: Callable[..., Any]) -> Callable[..., Any]:
        steps = run.batches // run.accumulation
        return lambda optimizer, lr, warmup, _, *more: schedule(optimizer, lr, warmup, steps, *more)

    for name, schedule in originals.items():
        setattr(trainer.main, name, ending(schedule))
    try:
        yield
    finally:
        for name, schedule in originals.items():
            setattr(trainer.main, name, schedule)


@contextmanager
def _own_log() -> Iterator[None]:
    """Takes away the log handlers that the trainer adds, so that a second phase doesn't write into the first one's log.

    The levels that it gives to all loggers go back as well: what comes next in this process would chatter.
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


@contextmanager
def _ranks_on_cpu() -> Iterator[None]:
    """Lets several ranks train on the CPU: the trainer names the device to torch's wrapper, which takes no name but a GPU's."""
    wrapper = torch.nn.parallel.DistributedDataParallel

    def wrap(module: torch.nn.Module, device_ids: Any = None, **more: Any) -> torch.nn.Module:  # noqa: ANN401
        on_cpu = all(torch.device(device).type == "cpu" for device in device_ids or ())
        return wrapper(module, device_ids=None if on_cpu else device_ids, **more)

    torch.nn.parallel.DistributedDataParallel = wrap  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.nn.parallel.DistributedDataParallel = wrapper  # type: ignore[misc]


def _save_weights(run: Run, checkpoint: Path) -> None:
    """Writes the weights alone, in a folder from which open_clip can make the model, for the next phase."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    run.final.mkdir(exist_ok=True)
    if run.parsed.model.startswith(LOCAL_MODEL):
        folder = Path(run.parsed.model.removeprefix(LOCAL_MODEL))
        for path in folder.iterdir():
            if path.is_file() and path.suffix not in {".bin", ".pth", ".safetensors"}:
                shutil.copyfile(path, run.final / path.name)
    with replacing(run.final / WEIGHTS) as temporary:
        torch.save({name.removeprefix("module."): value for name, value in state.items()}, temporary)


def _leave_group(rank: int, *, again: bool) -> None:
    """Ends the process group, which the trainer begins and leaves open; all ranks meet before, at another port afterwards.

    The trainer will begin the next group from the same environment. The store behind it may be torchrun's, where the first group's
    addresses still stand: so the next one gets a store of its own, on rank 0.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if again:
            port = [_free_port() if rank == 0 else 0]
            torch.distributed.broadcast_object_list(port, src=0)
            os.environ["MASTER_PORT"] = str(port[0])
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        torch.distributed.destroy_process_group()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
