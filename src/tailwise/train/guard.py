"""A check that the installed open_clip has all that tailwise relies on, before a training starts."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from tailwise.errors import UserError
from tailwise.extras import install_command
from tailwise.text import dashed

KNOWN = "3.0.0 to 3.3.0"

ARGUMENTS = (
    "train_data", "train_num_samples", "dataset_type", "val_data", "imagenet_val", "imagenet_v2", "logs", "name", "epochs", "resume",
    "save_most_recent", "save_frequency", "seed", "batch_size", "accum_freq", "workers", "warmup", "model", "pretrained", "dist_url",
)  # fmt: skip

# Functions that make schedules of learning rates: (optimizer, learning rate, warm-up steps, all steps, …).
SCHEDULES = ("cosine_lr", "const_lr", "const_lr_cooldown")


@dataclass(frozen=True)
class Hook:
    """Something of open_clip_train that must be as expected."""

    module: str  # module of the package
    name: str  # name in the module
    words: tuple[str, ...] = ()  # texts that its source must hold
    parameters: tuple[str, ...] = ()  # parameters that it must have


HOOKS = (
    Hook("main", "main", ("get_data(", "train_one_epoch(", "save_most_recent", "LATEST_CHECKPOINT_NAME")),
    Hook("main", "main", ("setup_logging(", "args.warmup, total_steps")),
    Hook("main", "get_data", ("args.train_data",), ("args", "preprocess_fns", "epoch", "tokenizer")),
    Hook("main", "train_one_epoch", (".set_epoch(epoch)", ".num_batches", ".num_samples", "enumerate(dataloader)")),
    Hook("main", "LATEST_CHECKPOINT_NAME"),
    *(Hook("main", name, parameters=("optimizer", "base_lr", "warmup_length", "steps")) for name in SCHEDULES),
    Hook("params", "parse_args"),
    Hook("distributed", "is_using_distributed"),
    Hook("distributed", "world_info_from_env"),
)

# The form in which the trainer takes a batch, by a line of its source.
BATCH_FORMS: Mapping[str, Callable[[Tensor, Tensor], Any]] = {
    "images, texts = batch": lambda images, texts: (images, texts),
    "task.prepare_batch(batch": lambda images, texts: {"image": images, "text": texts},
}


@dataclass(frozen=True)
class Trainer:
    """open_clip's trainer, checked."""

    version: str  # version of open_clip_torch
    main: ModuleType  # the module `open_clip_train.main`
    parse_args: Callable[[list[str]], Any]  # list of arguments → Namespace
    ranks: Callable[[], tuple[int, int]]  # () → (rank, number of ranks), from the environment, as the trainer sees them
    form: Callable[[Tensor, Tensor], Any]  # (images, texts) → a batch in the trainer's form


def find_trainer() -> Trainer:
    """Import open_clip's trainer, or raise a UserError if it is not installed, or HOOKS, ARGUMENTS or BATCH_FORMS do not match it."""
    try:
        modules = {
            name: importlib.import_module(f"open_clip_train.{name}") for name in ("main", "params", "distributed")
        }
        version = importlib.metadata.version("open_clip_torch")
    except ImportError as error:
        raise UserError(f"training needs open_clip with its trainer ({error}): {install_command('train')}") from error
    main, parse_args = modules["main"], modules["params"].parse_args
    forms: list[Callable[[Tensor, Tensor], Any]] = []
    moved = [f"open_clip_train.{hook.module}.{hook.name}" for hook in HOOKS if not _as_expected(hook, modules)]
    if not moved:
        parsed = parse_args([])
        moved = [f"argument {dashed(name)}" for name in ARGUMENTS if not hasattr(parsed, name)]
        forms = [form for line, form in BATCH_FORMS.items() if line in _source(main.train_one_epoch)]
        if not forms:
            moved.append("the batch that open_clip_train.main.train_one_epoch takes")
    if moved:
        raise UserError(
            f"open_clip_torch {version} is not as expected: {', '.join(moved)} moved or changed; versions known to work "
            f"are {KNOWN}: install one of them"
        )
    return Trainer(version, main, parse_args, lambda: _ranks(modules["distributed"]), forms[0])


def _as_expected(hook: Hook, modules: Mapping[str, ModuleType]) -> bool:
    found = getattr(modules[hook.module], hook.name, None)
    if found is None:
        return False
    source = _source(found) if hook.words else ""
    parameters = inspect.signature(found).parameters if hook.parameters else {}
    return all(word in source for word in hook.words) and all(name in parameters for name in hook.parameters)


def _source(thing: Any) -> str:  # noqa: ANN401  (any attribute of a module)
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return ""


def _ranks(distributed: ModuleType) -> tuple[int, int]:
    if not distributed.is_using_distributed():
        return 0, 1
    _, rank, ranks = distributed.world_info_from_env()
    return int(rank), int(ranks)
