"""The table of encoders, which make embeddings from images and captions."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tailwise.encoders import hugging_face, lite0, open_clip, pixels, timm
from tailwise.encoders.backends import choose_backend, choose_precision, with_openvino
from tailwise.encoders.encoder import Encoder
from tailwise.errors import UserError
from tailwise.requests import EncoderRequest

__all__ = ["ENCODERS", "Encoder", "load_encoder"]

Load = Callable[[str, EncoderRequest, torch.device, str], Encoder]

# Prefix of the name: spelling, function that loads the rest of the name, and meaning of the precision "auto".
ENCODERS: dict[str, tuple[str, Load, str]] = {
    "open_clip": ("open_clip:MODEL/PRETRAINED", open_clip.load_pretrained, "auto"),
    "transformers": ("transformers:NAME_OR_FOLDER", hugging_face.load, "auto"),
    "checkpoint": ("checkpoint:PATH", open_clip.load_checkpoint, "auto"),
    "timm": ("timm:MODEL[/WEIGHTS]", timm.load, "auto"),
    "lite0": ("lite0[:PIXELS]", lite0.load, "fp32"),  # this small network loses more in bf16 than larger ones
    "pixels": ("pixels", pixels.load, "fp32"),
}


def load_encoder(name: str, options: EncoderRequest, device: torch.device) -> Encoder:
    """Return the encoder of a name, `PREFIX:REST` of ENCODERS, or raise a UserError if the options or the device do not allow it."""
    prefix, colon, rest = name.partition(":")
    spelling, load, auto_precision = ENCODERS.get(prefix, ("", None, ""))
    needed, allowed = ":" in spelling.partition("[")[0], ":" in spelling
    if load is None or bool(rest) != bool(colon) or not needed <= bool(rest) <= allowed:
        known = ", ".join(spelling for spelling, *_ in ENCODERS.values())
        raise UserError(f"unknown encoder {name!r}: use {known}, or import embeddings made elsewhere")
    precision = choose_precision(auto_precision if options.precision == "auto" else options.precision, device)
    if choose_backend(options.backend, device) == "torch":
        return load(rest, options, device, precision)
    return with_openvino(load(rest, options, device, "fp32"), precision, required=options.backend == "openvino")
