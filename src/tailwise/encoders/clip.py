"""Encoders of open_clip: `open_clip:MODEL/PRETRAINED`, and `checkpoint:PATH` of a training."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from tailwise.encoders.captions import CaptionPreparation
from tailwise.encoders.encoder import Encoder, Side, Tensors
from tailwise.encoders.images import ImagePreparation
from tailwise.encoders.open_clip import find_checkpoint, load_model, model_id
from tailwise.encoders.precision import lower_weights, weights_hash
from tailwise.errors import UserError
from tailwise.extras import require
from tailwise.requests import EncoderRequest

if TYPE_CHECKING:
    from PIL import Image


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
            ImagePreparation(partial(_stack, loaded.preprocess)),
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


def _stack(transform: Callable[[Any], Tensor], images: Sequence[Image.Image]) -> Tensors:
    return {"image": torch.stack([transform(image) for image in images])}


def _tokens(tokenizer: Callable[..., Tensor], captions: list[str], length: int) -> Tensors:
    return {"text": tokenizer(captions, context_length=length)}
