"""Encoders of open_clip: `open_clip:MODEL/PRETRAINED`, and `checkpoint:PATH` of a training."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tailwise.encoders.captions import CaptionPreparation
from tailwise.encoders.encoder import Encoder, Side, Tensors
from tailwise.encoders.images import ImagePreparation
from tailwise.encoders.precision import lower_weights, weights_hash
from tailwise.errors import UserError
from tailwise.extras import require
from tailwise.requests import EncoderRequest

if TYPE_CHECKING:
    from PIL import Image

    from tailwise.encoders.open_clip import Checkpoint


def load_pretrained(name: str, options: EncoderRequest, device: torch.device, precision: str) -> Encoder:
    """`MODEL/PRETRAINED`, `hf-hub:NAME` or `local-dir:FOLDER`, as open_clip has them.

    Raises:
        UserError: there is none, or it has no weights.
    """
    if options.model is not None:
        raise UserError(f"`model` does nothing with open_clip:{name}, which names its model")
    return _load(f"open_clip:{name}", f"open_clip:{name}", options, device, precision)


def load_checkpoint(name: str, options: EncoderRequest, device: torch.device, precision: str) -> Encoder:
    """A file of weights, or the folder of a run: of `tailwise train`, `tailwise compare`, or open_clip's trainer.

    Raises:
        UserError: there is none, or it doesn't tell its model and `options` doesn't either.
    """
    return _load(f"checkpoint:{name}", name, options, device, precision)


def _load(spelt: str, checkpoint: str, options: EncoderRequest, device: torch.device, precision: str) -> Encoder:
    if options.pooling is not None:
        raise UserError(f"`pooling` does nothing with {spelt}: its model pools in its own way")
    require("encoders", "open_clip", purpose=f"`encoder` {spelt}")
    from tailwise.encoders.open_clip import find_checkpoint, load_model  # noqa: PLC0415  (open_clip is an extra)

    found = find_checkpoint(checkpoint, options.model)
    loaded = load_model(found, str(device))
    identity = {"model": _model(found), "weights": weights_hash(loaded.model)}
    lower_weights(loaded.model, precision)
    tokenizer: Any = loaded.tokenizer
    length = int(tokenizer.context_length)
    sides = {
        "image": Side(
            ImagePreparation(_Stack(loaded.preprocess)),
            _ImageForward(loaded.model),
            json.loads(json.dumps(dict(loaded.model.visual.preprocess_cfg))),
        ),
        "text": Side(
            CaptionPreparation(_Tokens(tokenizer), "text", length),
            _TextForward(loaded.model),
            {"tokenizer": type(tokenizer).__name__, "length": length},
        ),
    }
    return Encoder(spelt, sides, identity, device, precision, ("open_clip_torch", "timm", "torchvision"), loaded.model)


def _model(found: Checkpoint) -> str:
    """What architecture it is, wherever it lies: a local one by its configuration."""
    from tailwise.encoders.open_clip import model_id  # noqa: PLC0415  (open_clip is an extra)

    settings = ", ".join(f"{name}={value}" for name, value in sorted(found.settings.items()))
    return " ".join(filter(None, (model_id(found.model), found.pretrained, settings)))


@dataclass(frozen=True)
class _Stack:
    """open_clip's transform of one image, for several."""

    transform: Callable[[Any], Tensor]

    def __call__(self, images: Sequence[Image.Image]) -> Tensors:
        return {"image": torch.stack([self.transform(image) for image in images])}


@dataclass(frozen=True)
class _Tokens:
    tokenizer: Callable[..., Tensor]

    def __call__(self, captions: list[str], length: int) -> Tensors:
        return {"text": self.tokenizer(captions, context_length=length)}


@dataclass(frozen=True)
class _ImageForward:
    model: Any

    def __call__(self, tensors: Tensors) -> Tensor:
        rows: Tensor = self.model.encode_image(tensors["image"])
        return rows


@dataclass(frozen=True)
class _TextForward:
    model: Any

    def __call__(self, tensors: Tensors) -> Tensor:
        rows: Tensor = self.model.encode_text(tensors["text"])
        return rows
