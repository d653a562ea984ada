"""The model of a checkpoint, loaded with open_clip's factories; the encoders `open_clip:MODEL/PRETRAINED` and `checkpoint:PATH`."""

from __future__ import annotations

import ast
import json
import logging
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from tailwise.catalog.files import file_digest
from tailwise.devices import find_device
from tailwise.encoders.backends import lower_weights, weights_hash
from tailwise.encoders.encoder import Encoder, Side, Tensors
from tailwise.encoders.prepare import CaptionPreparation, ImagePreparation
from tailwise.errors import NotFoundError, UserError
from tailwise.extras import require
from tailwise.requests import EncoderRequest

SCHEME = "open_clip:"
LOCAL_MODEL = "local-dir:"
MODEL_CONFIG = "open_clip_config.json"  # in the folder of a local model
SCHEMAS = ("hf-hub:", LOCAL_MODEL)  # of open_clip's models that come with weights
PRECISIONS = ("fp32", "bf16")
COMPILED, PARALLEL = "_orig_mod.", "module."
# Values of a run's params.txt that change the model or its preprocessing; open_clip's factory has parameters of these names.
SETTINGS = (
    *("force_quick_gelu", "force_custom_text", "force_image_size", "force_context_length"),
    *("image_mean", "image_std", "image_interpolation", "image_resize_mode"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A model and its weights, not loaded yet."""

    model: str  # name of the model, for open_clip's factories
    weights: Path | None = None  # file of the weights; None where open_clip finds them
    pretrained: str | None = None  # open_clip's tag of the weights, if any
    settings: Mapping[str, Any] = field(default_factory=dict)  # values of SETTINGS that the run was started with


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to evaluate."""

    model: Any  # model of open_clip, in evaluation mode
    preprocess: Callable[[Any], Tensor]  # one RGB image → float32 [3, h, w], for validation
    tokenizer: Callable[[Sequence[str]], Tensor]  # texts → int64 [n, context length]
    device: torch.device  # device of the model
    precision: str  # one of PRECISIONS

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute without gradients, and in the model's precision."""
        lower = torch.autocast(self.device.type, dtype=torch.bfloat16) if self.precision == "bf16" else nullcontext()
        with torch.no_grad(), lower:
            yield


def find_checkpoint(checkpoint: str | Path, model: str | None = None) -> Checkpoint:
    """Return the checkpoint that a user names, or raise a UserError if there is none, or the model's name is missing.

    It is a file of weights, the folder of a run (whose newest checkpoint is taken), `open_clip:MODEL/PRETRAINED`, `open_clip:hf-hub:NAME`
    or `open_clip:local-dir:FOLDER`. The name of the model is by default that in the run's params.txt.
    """
    text = str(checkpoint)
    if text.startswith(SCHEME):
        return _pretrained(text.removeprefix(SCHEME), model)
    path = Path(checkpoint).expanduser()
    if not path.exists():
        raise NotFoundError(f"there is no {path}: give a checkpoint, the folder of a run, or {SCHEME}MODEL/PRETRAINED")
    run, weights = (path, _newest(path)) if path.is_dir() else (path.absolute().parent.parent, path)
    parameters = _read_parameters(run / "params.txt")
    name = model or parameters.get("model")
    if not name:
        raise UserError(f"cannot infer the model of {path}: {run / 'params.txt'} is missing; give `model`")
    settings = {key: value for key in SETTINGS if (value := parameters.get(key)) not in (None, False)}
    return Checkpoint(_check_model(name), weights, None, settings)


def load_model(checkpoint: Checkpoint, device: str = "auto", precision: str = "fp32") -> LoadedModel:
    """Make the model and load its weights, or raise a UserError if open_clip or the weights do not allow that."""
    import open_clip  # noqa: PLC0415  (an extra)

    if precision not in PRECISIONS:
        raise UserError(f"`precision` {precision!r}: must be one of {', '.join(PRECISIONS)}")
    place = find_device(device, any_kind=True)
    own = checkpoint.weights is None
    named = f"{checkpoint.weights or checkpoint.pretrained or ''} as {checkpoint.model}".strip()
    try:
        # open_clip warns that a model has no weights, which come next, and logs errors that it also raises.
        with silenced(logging.ERROR), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of torch, about odd files that it refuses next
            model, _, preprocess = open_clip.create_model_and_transforms(
                checkpoint.model, pretrained=checkpoint.pretrained, load_weights=own, pretrained_text=own,
                device=place, require_pretrained=own, **checkpoint.settings,
            )  # fmt: skip
            length = checkpoint.settings.get("force_context_length")
            tokenizer = open_clip.get_tokenizer(checkpoint.model, **({"context_length": length} if length else {}))
            if checkpoint.weights is not None:
                load_weights(model, checkpoint.weights, place)
    except (
        *(RuntimeError, ValueError, KeyError, TypeError, AttributeError, AssertionError, StopIteration),
        *(OSError, EOFError, pickle.UnpicklingError),
    ) as error:
        remedy = "the name and the connection, or give local-dir:FOLDER" if own else "the file and `model`"
        raise UserError(f"{named} can't be loaded: {shortened(error)}; check {remedy}") from error
    return LoadedModel(model.eval(), preprocess, tokenizer, place, precision)


def load_weights(model: Any, path: Path, device: torch.device) -> None:  # noqa: ANN401
    """Load a file of weights into a model of open_clip, without prefixes of wrappers; raise a RuntimeError if they do not fit."""
    from open_clip import factory  # noqa: PLC0415  (an extra)

    read, names = factory.load_state_dict, set[str]()

    def read_without_prefixes(*arguments: Any, **options: Any) -> dict[str, Any]:  # noqa: ANN401
        weights = without_prefixes(read(*arguments, **options))
        names.update(weights)
        return weights

    # load_checkpoint takes a path only, and converts names after it has read the file.
    factory.load_state_dict = read_without_prefixes
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
    """Return weights by the names of the plain model, without prefixes of DistributedDataParallel and torch.compile."""
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
    """Return the name, or raise a UserError if open_clip does not know it."""
    require("train", "open_clip", purpose="evaluating")
    import open_clip  # noqa: PLC0415  (an extra)

    if name.startswith(LOCAL_MODEL):
        config = Path(name.removeprefix(LOCAL_MODEL)) / MODEL_CONFIG
        if not config.is_file():
            raise UserError(f"the model {name} has no {config}: give `model` local-dir:FOLDER with its new place")
    elif not name.startswith(SCHEMAS) and name not in open_clip.list_models():
        remedy = "give a name of open_clip.list_models(), or local-dir:FOLDER"
        raise UserError(f"open_clip knows no model {name!r}: {remedy}")
    return name


def _newest(run: Path) -> Path:
    """Return the newest checkpoint of a run: epoch_latest.pt, that of the highest epoch, or that of an in-process training."""
    folder = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    found = {
        match[1]: path for path in folder.iterdir() if (match := re.fullmatch(r"epoch_(\d+|latest)\.pt", path.name))
    }
    if found:
        return found.get("latest") or found[max(found, key=int)]
    if (run / "checkpoint.pt").is_file():
        return run / "checkpoint.pt"
    raise UserError(f"{run} holds no checkpoint (checkpoints/epoch_*.pt): give a run that has saved one, or a file")


def _read_parameters(path: Path) -> dict[str, Any]:
    """Return the arguments that open_clip's trainer noted of a run, one `name: value` per line."""
    if not path.is_file():
        return {}
    found: dict[str, Any] = {}
    for name, _, text in (line.partition(": ") for line in path.read_text(encoding="utf-8").splitlines()):
        found[name] = text
        with suppress(ValueError, SyntaxError):
            found[name] = ast.literal_eval(text)
        if isinstance(found[name], list) and len(found[name]) == 1:  # by argparse, where the factory needs a number
            found[name] = found[name][0]
    return found


def shortened(error: BaseException) -> str:
    """Return the message of an error on one line of at most 300 characters, with the type if the message is one word."""
    text = " ".join(str(error).split())
    if " " not in text:  # such as a KeyError's key
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= 300 else text[:300] + " …"


@contextmanager
def silenced(level: int) -> Iterator[None]:
    """Drop all log records up to a level."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(before)


def model_id(name: str) -> str:
    """Return a model's name, or of a local model the hash of its configuration, which must exist."""
    if not name.startswith(LOCAL_MODEL):
        return name
    path = Path(name.removeprefix(LOCAL_MODEL)) / MODEL_CONFIG
    if not path.exists():
        raise NotFoundError(f"train.model {name}: there is no {path}: give a folder that holds it")
    return LOCAL_MODEL + file_digest(path)


# --- encoders -----------------------------------------------------------------------------------------------------------


def load_pretrained(name: str, options: EncoderRequest, device: torch.device, precision: str) -> Encoder:
    """Load `MODEL/PRETRAINED`, `hf-hub:NAME` or `local-dir:FOLDER` of open_clip."""
    if options.model is not None:
        raise UserError(f"`model` does nothing with open_clip:{name}, which names its model")
    return _load(f"open_clip:{name}", f"open_clip:{name}", options, device, precision)


def load_checkpoint(name: str, options: EncoderRequest, device: torch.device, precision: str) -> Encoder:
    """Load a file of weights, or the folder of a run of `tailwise train`, `tailwise compare` or open_clip's trainer."""
    return _load(f"checkpoint:{name}", name, options, device, precision)


def _load(spelt: str, checkpoint: str, options: EncoderRequest, device: torch.device, precision: str) -> Encoder:
    if options.pooling is not None:
        raise UserError(f"`pooling` does nothing with {spelt}: its model pools in its own way")
    require("encoders", "open_clip", purpose=f"`encoder` {spelt}")
    found = find_checkpoint(checkpoint, options.model)
    loaded = load_model(found, str(device))
    model, tokenizer = loaded.model, cast(Any, loaded.tokenizer)
    settings = ", ".join(f"{name}={value}" for name, value in sorted(found.settings.items()))
    architecture = " ".join(filter(None, (model_id(found.model), found.pretrained, settings)))
    identity = {"model": architecture, "weights": weights_hash(model)}
    lower_weights(model, precision)
    length = int(tokenizer.context_length)
    sides = {
        "image": Side(
            ImagePreparation(partial(stack, loaded.preprocess)),
            lambda tensors: model.encode_image(tensors["image"]),
            json.loads(json.dumps(dict(model.visual.preprocess_cfg))),
        ),
        "text": Side(
            CaptionPreparation(partial(_tokens, tokenizer), "text", length),
            lambda tensors: model.encode_text(tensors["text"]),
            {"tokenizer": type(tokenizer).__name__, "length": length},
        ),
    }
    return Encoder(spelt, sides, identity, device, precision, ("open_clip_torch", "timm", "torchvision"), model)


def stack(transform: Callable[[Any], Tensor], images: Sequence[Image.Image]) -> Tensors:
    """Return the tensor "image" of some images, each by itself: [n, 3, h, w]."""
    return {"image": torch.stack([transform(image) for image in images])}


def _tokens(tokenizer: Callable[..., Tensor], captions: list[str], length: int) -> Tensors:
    return {"text": tokenizer(captions, context_length=length)}
