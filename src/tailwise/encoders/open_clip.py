"""Which model a checkpoint is of, and loading it with open_clip's own factories."""

from __future__ import annotations

import ast
import logging
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailwise.catalog.files import file_digest
from tailwise.devices import find_device
from tailwise.errors import NotFoundError, UserError
from tailwise.extras import require

SCHEME = "open_clip:"
LOCAL_MODEL = "local-dir:"
MODEL_CONFIG = "open_clip_config.json"  # in the folder of a local model
SCHEMAS = ("hf-hub:", LOCAL_MODEL)  # of open_clip: such a model brings its weights along
PRECISIONS = ("fp32", "bf16")
COMPILED, PARALLEL = "_orig_mod.", "module."
# What a run's params.txt says that changes the model or how it sees an image; open_clip's factory takes them by these names.
SETTINGS = (
    *("force_quick_gelu", "force_custom_text", "force_image_size", "force_context_length"),
    *("image_mean", "image_std", "image_interpolation", "image_resize_mode"),
)


@dataclass(frozen=True)
class Checkpoint:
    """What has to be loaded.

    Attributes:
        model: name of the model, for open_clip's factories.
        weights: file of the weights; None where open_clip finds them by itself.
        pretrained: open_clip's tag of the weights, if any.
        settings: of SETTINGS, those that the run was started with.
    """

    model: str
    weights: Path | None = None
    pretrained: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to evaluate.

    Attributes:
        model: of open_clip, in evaluation mode.
        preprocess: of one RGB image for validation → float32 [3, h, w].
        tokenizer: texts → int64 [n, context length].
        device: where the model is.
        precision: one of PRECISIONS.
    """

    model: Any
    preprocess: Callable[[Any], Tensor]
    tokenizer: Callable[[Sequence[str]], Tensor]
    device: torch.device
    precision: str

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Without gradients, and in the model's precision."""
        lower = torch.autocast(self.device.type, dtype=torch.bfloat16) if self.precision == "bf16" else nullcontext()
        with torch.no_grad(), lower:
            yield


def find_checkpoint(checkpoint: str | Path, model: str | None = None) -> Checkpoint:
    """What a user's CHECKPOINT means.

    Args:
        checkpoint: a file of weights, the folder of a run (whose newest checkpoint is taken), `open_clip:MODEL/PRETRAINED`,
            `open_clip:hf-hub:NAME` or `open_clip:local-dir:FOLDER`.
        model: name of the model; by default what the run's params.txt says.

    Raises:
        UserError: there is none, or the model's name is wanting.
    """
    text = str(checkpoint)
    if text.startswith(SCHEME):
        return _pretrained(text.removeprefix(SCHEME), model)
    path = Path(checkpoint).expanduser()
    if not path.exists():
        raise NotFoundError(f"there is no {path}: give a checkpoint, the folder of a run, or {SCHEME}MODEL/PRETRAINED")
    run, weights = (path, _newest(path)) if path.is_dir() else (path.absolute().parent.parent, path)
    told = _read_parameters(run / "params.txt")
    name = model or told.get("model")
    if not name:
        raise UserError(f"{path} doesn't tell its model ({run / 'params.txt'} is wanting): give `model`")
    settings = {key: value for key in SETTINGS if (value := told.get(key)) not in (None, False)}
    return Checkpoint(_check_model(name), weights, None, settings)


def load_model(checkpoint: Checkpoint, device: str = "auto", precision: str = "fp32") -> LoadedModel:
    """Makes the model and loads its weights.

    Raises:
        UserError: open_clip isn't installed, knows no such model or tag, or the weights don't fit; the device isn't there.
    """
    import open_clip  # noqa: PLC0415  (an extra)

    if precision not in PRECISIONS:
        raise UserError(f"`precision` {precision!r}: must be one of {', '.join(PRECISIONS)}")
    place = find_device(device, any_kind=True)
    own = checkpoint.weights is None
    named = f"{checkpoint.weights or checkpoint.pretrained or ''} as {checkpoint.model}".strip()
    try:
        with _quiet():
            model, _, preprocess = open_clip.create_model_and_transforms(
                checkpoint.model, pretrained=checkpoint.pretrained, load_weights=own, pretrained_text=own,
                device=place, require_pretrained=own, **checkpoint.settings,
            )  # fmt: skip
            tokenizer = open_clip.get_tokenizer(checkpoint.model, **_context(checkpoint.settings))
            if checkpoint.weights is not None:
                load_weights(model, checkpoint.weights, place)
    except (
        *(RuntimeError, ValueError, KeyError, TypeError, AttributeError, AssertionError, StopIteration),
        *(OSError, EOFError, pickle.UnpicklingError),
    ) as error:
        remedy = "the name and the connection, or give local-dir:FOLDER" if own else "the file and `model`"
        raise UserError(f"{named} can't be loaded: {_shortened(error)}; check {remedy}") from error
    return LoadedModel(model.eval(), preprocess, tokenizer, place, precision)


def load_weights(model: Any, path: Path, device: torch.device) -> None:  # noqa: ANN401
    """Load a file of weights into a model of open_clip; prefixes that torch.compile and DistributedDataParallel add are removed.

    Raises:
        RuntimeError: names or shapes of the weights do not fit the model.
    """
    from open_clip import factory  # noqa: PLC0415  (an extra)

    read, names = factory.load_state_dict, set[str]()

    def read_without_prefixes(*arguments: Any, **options: Any) -> dict[str, Any]:  # noqa: ANN401
        weights = without_prefixes(read(*arguments, **options))
        names.update(weights)
        return weights

    factory.load_state_dict = (
        read_without_prefixes  # load_checkpoint takes a path alone, and converts names after it was read
    )
    try:
        factory.load_checkpoint(model, str(path), device=device)
    except (RuntimeError, KeyError) as error:
        wanted = list(model.state_dict())
        missing, unknown = [name for name in wanted if name not in names], sorted(names.difference(wanted))
        if not (names and missing and unknown):
            raise
        raise RuntimeError(
            f"it lacks {len(missing):,} of the model's {len(wanted):,} weights, such as {missing[0]}; "
            f"{len(unknown):,} of its names are unknown to the model, such as {unknown[0]}"
        ) from error
    finally:
        factory.load_state_dict = read


def without_prefixes(weights: Mapping[Any, Any]) -> dict[str, Any]:
    """Return weights by the names of the plain model, without those of wrappers: DistributedDataParallel, torch.compile."""
    plain_names = {str(name).replace(COMPILED, ""): value for name, value in weights.items()}
    while plain_names and all(name.startswith(PARALLEL) for name in plain_names):
        plain_names = {name.removeprefix(PARALLEL): value for name, value in plain_names.items()}
    return plain_names


def _pretrained(name: str, model: str | None) -> Checkpoint:
    if model is not None:
        raise UserError(f"`model` does nothing with {SCHEME}{name}, which names its model")
    if name.startswith(SCHEMAS):
        return Checkpoint(_check_model(name))
    architecture, slash, tag = name.partition("/")
    if not (architecture and slash and tag):
        raise UserError(f"{SCHEME}{name}: give {SCHEME}MODEL/PRETRAINED, such as {SCHEME}ViT-B-32/laion2b_s34b_b79k")
    _check_model(architecture)
    import open_clip  # noqa: PLC0415  (an extra)

    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        raise UserError(f"open_clip has no weights {tag!r} of {architecture}: use one of {', '.join(tags) or 'none'}")
    return Checkpoint(architecture, pretrained=tag)


def _check_model(name: str) -> str:
    """The name, if open_clip knows it."""
    require("train", "open_clip", purpose="evaluating")
    import open_clip  # noqa: PLC0415  (an extra)

    if name.startswith(LOCAL_MODEL):
        config = Path(name.removeprefix(LOCAL_MODEL)) / MODEL_CONFIG
        if not config.is_file():
            raise UserError(f"the model {name} has no {config}: give `model` local-dir:FOLDER with its new place")
    elif not name.startswith(SCHEMAS) and name not in open_clip.list_models():
        raise UserError(
            f"open_clip knows no model {name!r}: give a name of open_clip.list_models(), or local-dir:FOLDER"
        )
    return name


def _newest(run: Path) -> Path:
    """The newest checkpoint of a run: epoch_latest.pt, else that of the highest epoch, else the only one of an in-process training."""
    folder = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    found = {path.name: path for path in folder.glob("epoch_*.pt")}
    if "epoch_latest.pt" in found:
        return found["epoch_latest.pt"]
    numbered = {
        int(match[1]): path for name, path in found.items() if (match := re.fullmatch(r"epoch_(\d+)\.pt", name))
    }
    if not numbered and (run / "checkpoint.pt").is_file():
        return run / "checkpoint.pt"
    if not numbered:
        raise UserError(f"{run} holds no checkpoint (checkpoints/epoch_*.pt): name a run that has saved one, or a file")
    return numbered[max(numbered)]


def _read_parameters(path: Path) -> dict[str, Any]:
    """What the trainer of open_clip noted of a run: a line `name: value` each."""
    if not path.is_file():
        return {}
    pairs = (line.partition(": ") for line in path.read_text(encoding="utf-8").splitlines())
    return {name: _value(text) for name, _, text in pairs}


def _value(text: str) -> Any:  # noqa: ANN401  (whatever an argument may be)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    # argparse makes one number a list, where the factory wants the number.
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _context(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"context_length": settings["force_context_length"]} if "force_context_length" in settings else {}


def _shortened(error: BaseException, characters: int = 300) -> str:
    text = " ".join(str(error).split())
    if " " not in text:  # such as a KeyError's key
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= characters else text[:characters] + " …"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without open_clip's warnings, such as that a model whose weights come next has none, and errors, which it raises as well."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's, of odd files that it refuses next
            yield
    finally:
        logging.disable(before)


def model_id(name: str) -> str:
    """What a model is, wherever it lies: its name, or the hash of its configuration.

    Raises:
        UserError: the folder of a local model has none.
    """
    if not name.startswith(LOCAL_MODEL):
        return name
    path = Path(name.removeprefix(LOCAL_MODEL)) / MODEL_CONFIG
    if not path.exists():
        raise NotFoundError(f"train.model {name}: there is no {path}: give a folder that holds it")
    return LOCAL_MODEL + file_digest(path)
