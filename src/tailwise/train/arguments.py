"""open_clip's arguments: those that only tailwise gives, those that decide a training, and what recipes may not use."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tailwise.catalog.files import digest
from tailwise.errors import UserError
from tailwise.text import dashed, nearest, option_words

LOCAL_MODEL = "local-dir:"
HUB_MODEL = "hf-hub:"
ALLOW_CODE = "read it, and give --allow-code if you trust it"
_COMMAND = re.compile(r"pipe:|://.*['\"`$;|&<>\\\s]", re.IGNORECASE)

_PLAN = "the plan says what is trained on"  # that is, the samples
_BEFORE = "give it before the --"
OWNED: Mapping[str, str] = {
    "--train-data": _PLAN,
    "--train-data-upsampling-factors": _PLAN,
    "--train-num-samples": _PLAN,
    "--dataset-resampled": _PLAN,
    "--epochs": f"{_BEFORE}, in epochs of the plan, or --samples-seen",
    "--resume": _BEFORE,
    "--seed": _BEFORE,
    "--horovod": "start with torchrun, or Slurm's srun",
    "--remote-sync": "it can't be resumed from; copy the run's folder by other means",
}

# Arguments that may change when a run is resumed: hardware, logs, validation, and those that tailwise checks itself.
FREE = frozenset({
    "train_data", "train_data_upsampling_factors", "train_num_samples", "dataset_type", "dataset_resampled",
    "val_data", "val_num_samples", "imagenet_val", "imagenet_v2", "csv_separator", "csv_img_key", "csv_caption_key",
    "cache_dir", "logs", "log_local", "name", "workers", "batch_size", "accum_freq", "epochs", "resume", "seed",
    "save_frequency", "save_most_recent", "zeroshot_frequency", "val_frequency", "delete_previous_checkpoint",
    "device", "dist_url", "dist_backend", "no_set_device_rank", "ddp_static_graph", "horovod", "grad_checkpointing",
    "report_to", "wandb_notes", "wandb_project_name", "debug", "copy_codebase", "log_every_n_steps",
    "remote_sync", "remote_sync_frequency", "remote_sync_protocol", "model", "pretrained",
})  # fmt: skip


def take_factors(argv: Sequence[str]) -> tuple[list[str], str | None, str | None]:
    """Take open_clip's arguments of a mixture out of others: return the others, the factors and the training data.

    Nothing is taken where there are no factors.
    """
    taken = ("--train-data-upsampling-factors", "--train-data")
    rest: list[str] = []
    found: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        option, is_set, value = word.partition("=")
        if option in taken:
            found[option] = value if is_set else next(words, "")
        elif option != "--dataset-resampled":  # which the factors need in open_clip
            rest.append(word)
    if taken[0] not in found:
        return [*argv], None, None
    return rest, found[taken[0]], found.get(taken[1])


def refuse_owned(argv: Sequence[str]) -> None:
    """Raise a UserError for an argument, abbreviated or not, that only tailwise gives."""
    for word in argv:
        option = word.split("=", 1)[0]
        if not option.startswith("--") or option == "--":
            continue
        for owned, remedy in OWNED.items():
            if owned.startswith(option):
                raise UserError(f"{owned} can't be given to open_clip here: {remedy}")


def refuse_code(where: str, arguments: Mapping[str, Any], *, allowed: bool) -> None:
    """Refuse arguments of a recipe that make open_clip run commands or copy code, unless the user allows that.

    open_clip hands `pipe:` and quotes in URLs to a shell. `where` is the place of the arguments, for the error.
    """
    for word in () if allowed else option_words(arguments):
        option = word.split("=", 1)[0]
        if _COMMAND.search(word) or (option.startswith("--c") and "--copy-codebase".startswith(option)):
            raise UserError(f"{where} has {word!r}, which runs commands or copies code: {ALLOW_CODE}")


def require_model(argv: Sequence[str]) -> None:
    """Raise a UserError if no argument names a model, because open_clip would train a ResNet-50. A request for help needs no model."""
    options = {word.split("=", 1)[0] for word in argv}
    if not options & {"--model", "--mode", "--mod", "-h", "--help"}:
        raise UserError("name the model: give --model NAME after the -- (such as ViT-B-32), or a --recipe")


def check_model(parsed: argparse.Namespace, open_clip: ModuleType) -> None:
    """Raise a UserError if open_clip knows no model of this name, or no weights of the name `pretrained`, or a test set is missing."""
    name = parsed.model.replace("/", "-")
    if not parsed.model.startswith((LOCAL_MODEL, HUB_MODEL)):
        if name not in open_clip.list_models():
            near = nearest(name, open_clip.list_models())
            remedy = f"did you mean {near!r}?" if near else f"give a name such as ViT-B-32, or {LOCAL_MODEL}FOLDER"
            raise UserError(f"`model` {parsed.model!r}: open_clip has no model of this name: {remedy}")
        weights = parsed.pretrained
        if weights and not Path(weights).is_file() and not open_clip.get_pretrained_cfg(name, weights):
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
            raise UserError(f"`pretrained` {weights!r} is no file, and no tag of {name}: its tags are {tags}")
    for option in ("imagenet_val", "imagenet_v2"):
        if (folder := getattr(parsed, option)) is not None and not Path(folder).is_dir():
            raise UserError(f"`{option}` {folder!r} is no folder: give one, or leave it out")


def parse(argv: Sequence[str], parse_args: Callable[[list[str]], Any]) -> argparse.Namespace:
    """Return the values that open_clip parses from its arguments. Raise a UserError if open_clip or tailwise refuses them."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            parsed: argparse.Namespace = parse_args(list(argv))
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        lines = errors.getvalue().strip().splitlines() or ["its arguments are wrong"]
        problem = lines[-1].rpartition("error: ")[2]
        raise UserError(f"open_clip: {problem} (see `tailwise train CATALOG PLAN -- --help`)") from stop
    if parsed.dataset_type == "synthetic":
        raise UserError(f"--dataset-type synthetic can't be given to open_clip here: {_PLAN}")
    if getattr(parsed, "use_naflex", False):  # also set by the names of some models
        raise UserError(
            f"--use-naflex, or the model {parsed.model}, needs batches of patches, which tailwise doesn't make: leave it out"
        )
    if not parsed.logs or parsed.logs.lower() == "none":
        raise UserError(f"--logs {parsed.logs}: a run needs a folder for its checkpoints; give one")
    for name in ("batch_size", "accum_freq"):
        if getattr(parsed, name) < 1:
            raise UserError(f"`{name}` {getattr(parsed, name)}: must be at least 1")
    return parsed


def deciding(parsed: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that decide a training, {"--name": JSON value}; a local model by its configuration, not by its path."""
    values = {dashed(name): value for name, value in vars(parsed).items() if name not in FREE}
    values["--model"] = _model(parsed.model)
    values["--pretrained"] = parsed.pretrained or None
    decided: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return decided


def _model(name: str) -> str:
    if not name.startswith(LOCAL_MODEL):
        return name
    path = Path(name.removeprefix(LOCAL_MODEL)) / "open_clip_config.json"
    try:
        return f"{LOCAL_MODEL}{digest(path.read_text(encoding='utf-8'))}"
    except OSError as error:
        problem = f"{path} can't be read ({error.strerror})"
        raise UserError(f"--model {name}: {problem}: give a folder that holds it") from error
