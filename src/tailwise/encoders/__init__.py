"""Encoders: from images and captions to embeddings. One table."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tailwise.encoders import clip, hugging_face, lite0, pixels
from tailwise.encoders.backends import choose_backend, with_openvino
from tailwise.encoders.encoder import Encoder
from tailwise.encoders.precision import choose_precision
from tailwise.errors import UserError
from tailwise.requests import EncoderRequest

__all__ = ["ENCODERS", "Encoder", "load_encoder"]

Load = Callable[[str, EncoderRequest, torch.device, str], Encoder]

# By what stands before the colon: how it is spelt, what loads the rest, and what the precision "auto" means.
ENCODERS: dict[str, tuple[str, Load, str]] = {
    "open_clip": ("open_clip:MODEL/PRETRAINED", clip.load_pretrained, "auto"),
    "transformers": ("transformers:NAME_OR_FOLDER", hugging_face.load, "auto"),
    "checkpoint": ("checkpoint:PATH", clip.load_checkpoint, "auto"),
    "lite0": ("lite0[:PIXELS]", lite0.load, "fp32"),  # so small a network loses more in bf16 than others do
    "pixels": ("pixels", pixels.load, "fp32"),
}


def load_encoder(name: str, options: EncoderRequest, device: torch.device) -> Encoder:
    """Loads an encoder.

    Args:
        name: `PREFIX:REST` of ENCODERS.
        options: all else, but for the device.
        device: where it computes.

    Raises:
        UserError: there is no such encoder, or it can't be loaded so.
    """
    prefix, colon, rest = name.partition(":")
    spelling, load, auto_precision = ENCODERS.get(prefix, ("", None, ""))
    if load is None or bool(rest) != bool(colon) or ("[" not in spelling and bool(rest) != (":" in spelling)):
        spelt = ", ".join(spelling for spelling, *_ in ENCODERS.values())
        raise UserError(f"unknown encoder {name!r}: use {spelt}, or import embeddings made elsewhere")
    precision = choose_precision(auto_precision if options.precision == "auto" else options.precision, device)
    if choose_backend(options.backend, device) == "torch":
        return load(rest, options, device, precision)
    return with_openvino(load(rest, options, device, "fp32"), precision, required=options.backend == "openvino")
