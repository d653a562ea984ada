"""What a user may say of an encoder beside its name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EncoderOptions:
    """How to load an encoder.

    Attributes:
        model: of `checkpoint:PATH`: its model's name for open_clip, or `local-dir:FOLDER`; by default what the run tells.
        pooling: of `transformers:NAME` without text side: "cls", "mean" or "pooler"; None for what suits the model.
        device: a name for `find_devices`.
        precision: "auto", "fp32", "bf16" or "fp16".
        backend: what computes images: "auto", "torch" or "openvino".
    """

    model: str | None = None
    pooling: str | None = None
    device: str = "auto"
    precision: str = "auto"
    backend: str = "auto"
