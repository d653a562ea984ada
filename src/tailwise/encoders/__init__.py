"""Encoders: from images and captions to embeddings. One table."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tailwise.encoders import clip, hugging_face, lite0, pixels
from tailwise.encoders.encoder import Encoder
from tailwise.encoders.options import EncoderOptions
from tailwise.encoders.precision import choose_precision
from tailwise.errors import UserError

__all__ = ["ENCODERS", "Encoder", "EncoderOptions", "load_encoder"]

Load = Callable[[str, EncoderOptions, torch.device, str], Encoder]

# What stands before the colon, and what loads the rest, which may be optional or absent.
ENCODERS: dict[str, tuple[str, Load]] = {
    "open_clip": ("open_clip:MODEL/PRETRAINED", clip.load_pretrained),
    "transformers": ("transformers:NAME_OR_FOLDER", hugging_face.load),
    "checkpoint": ("checkpoint:PATH", clip.load_checkpoint),
    "lite0": ("lite0[:PIXELS]", lite0.load),
    "pixels": ("pixels", pixels.load),
}


def load_encoder(name: str, options: EncoderOptions, device: torch.device) -> Encoder:
    """Loads an encoder.

    Args:
        name: `PREFIX:REST` of ENCODERS.
        options: all else, but for the device.
        device: where it computes.

    Raises:
        UserError: there is no such encoder, or it can't be loaded so.
    """
    prefix, colon, rest = name.partition(":")
    spelling = ENCODERS[prefix][0] if prefix in ENCODERS else ""
    wrong_rest = bool(rest) != bool(colon) or (bool(rest) != (":" in spelling) and "[" not in spelling)
    if not spelling or wrong_rest:
        spelt = ", ".join(spelling for spelling, _ in ENCODERS.values())
        raise UserError(f"unknown encoder {name!r}: use {spelt}, or import embeddings made elsewhere")
    return ENCODERS[prefix][1](rest, options, device, choose_precision(options.precision, device))
