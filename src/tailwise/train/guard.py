"""A check that the installed open_clip has all that tailwise relies on, before a training starts."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from tailwise.errors import UserError
from tailwise.extras import install_command
from tailwise.text import dashed

KNOWN = "3.0.0 to 3.3.0, and the development tree 4.2.0.dev0"

ARGUMENTS = (
    "train_data", "train_num_samples", "dataset_type", "val_data", "imagenet_val", "imagenet_v2", "logs", "name", "epochs", "resume",
    "save_most_recent", "save_frequency", "seed", "batch_size", "accum_freq", "workers", "warmup", "model", "pretrained", "dist_url",
)  # fmt: skip

# Functions that make schedules of learning rates: (optimizer, learning rate, warm-up steps, all steps, …).
SCHEDULES = ("cosine_lr", "const_lr", "const_lr_cooldown")


Words = Sequence[str]
# What open_clip_train must have: module, name in it, texts in its source, and parameters.
HOOKS: Sequence[tuple[str, str, Words, Words]] = (
    ("main", "main", ("get_data(", "train_one_epoch(", "save_most_recent", "LATEST_CHECKPOINT_NAME"), ()),
    ("main", "main", ("setup_logging(", "args.warmup, total_steps"), ()),
    ("main", "get_data", ("args.train_data",), ("args", "preprocess_fns", "epoch", "tokenizer")),
    ("main", "train_one_epoch", (".set_epoch(epoch)", ".num_batches", ".num_samples", "enumerate(dataloader)"), ()),
    ("main", "LATEST_CHECKPOINT_NAME", (), ()),
    *(("main", name, (), ("optimizer", "base_lr", "warmup_length", "steps")) for name in SCHEDULES),
    ("params", "parse_args", (), ()),
    ("distributed", "is_using_distributed", (), ()),
    ("distributed", "world_info_from_env", (), ()),
)

# Of the trainer's `get_data`, in all versions.
DATA_PARAMETERS = frozenset({"args", "preprocess_fns", "epoch", "tokenizer"})


@dataclass(frozen=True)
class Seam:
    """How a generation of open_clip's trainer takes its data."""

    about: str  # what it is, in words
    line: str  # in the source of its `train_one_epoch`
    form: Callable[[Tensor, Tensor], Any]  # (images, texts) → a batch in the trainer's form
    more: frozenset[str] = frozenset()  # further parameters of its `get_data`, which are handed on


SEAMS = (
    Seam("a model, and batches of (images, texts)", "images, texts = batch", lambda images, texts: (images, texts)),
    Seam(
        "a task, and batches as mappings",
        "task.prepare_batch(batch",
        lambda images, texts: {"image": images, "text": texts},
        frozenset({"naflex_data_config", "model_traits"}),
    ),
)


@dataclass(frozen=True)
class Trainer:
    """open_clip's trainer, checked."""

    version: str  # version of open_clip_torch
    main: ModuleType  # the module `open_clip_train.main`
    open_clip: ModuleType  # the package of the models
    parse_args: Callable[[list[str]], Any]  # list of arguments → Namespace
    ranks: Callable[[], tuple[int, int]]  # () → (rank, number of ranks), from the environment, as the trainer sees them
    seam: Seam  # how it takes its data


def find_trainer() -> Trainer:
    """Import open_clip's trainer, or raise a UserError if it is not installed, or HOOKS, ARGUMENTS or SEAMS do not match it."""
    try:
        modules = {
            name: importlib.import_module(f"open_clip_train.{name}") for name in ("main", "params", "distributed")
        }
        version, models = importlib.metadata.version("open_clip_torch"), importlib.import_module("open_clip")
    except ImportError as error:
        raise UserError(f"training needs open_clip with its trainer ({error}): {install_command('train')}") from error
    main, parse_args = modules["main"], modules["params"].parse_args
    seams: list[Seam] = []
    moved = []
    for module, name, words, parameters in HOOKS:
        found = getattr(modules[module], name, None)
        source = _source(found) if words else ""
        taken = inspect.signature(found).parameters if parameters and found is not None else {}
        if found is None or any(word not in source for word in words) or any(each not in taken for each in parameters):
            moved.append(f"open_clip_train.{module}.{name}")
    if not moved:
        parsed = parse_args([])
        moved = [f"argument {dashed(name)}" for name in ARGUMENTS if not hasattr(parsed, name)]
        seams = [seam for seam in SEAMS if seam.line in _source(main.train_one_epoch)]
        if len(seams) != 1:
            moved.append("the batch that open_clip_train.main.train_one_epoch takes")
        else:
            moved += [f"parameter {name} of get_data" for name in _unknown(main.get_data, seams[0])]
    if moved:
        raise UserError(
            f"open_clip_torch {version} is not as expected: {', '.join(moved)} moved or changed; versions known to work "
            f"are {KNOWN}: install one of them"
        )
    return Trainer(version, main, models, parse_args, lambda: _ranks(modules["distributed"]), seams[0])


def _unknown(get_data: Callable[..., Any], seam: Seam) -> list[str]:
    """Return the parameters of the trainer's `get_data` that a seam does not know."""
    kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    taken = [item.name for item in inspect.signature(get_data).parameters.values() if item.kind not in kinds]
    return [name for name in taken if name not in DATA_PARAMETERS | seam.more]


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
