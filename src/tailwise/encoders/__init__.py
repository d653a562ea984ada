"""Encoders: from images to embeddings. One table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from tailwise.encoders import pixels
from tailwise.errors import UserError


@dataclass(frozen=True)
class Encoder:
    """One way to embed images.

    Attributes:
        summary: one line for people.
        dimension: d.
        encode: RGB images → float32 [n, d], unit norm; each row depends on its image alone.
    """

    summary: str
    dimension: int
    encode: Callable[[Sequence[Image.Image]], npt.NDArray[np.float32]]


ENCODERS: dict[str, Encoder] = {
    "pixels": Encoder("colours and edges, without weights: for demos and tests only", pixels.DIMENSION, pixels.describe)
}


def find_encoder(name: str) -> Encoder:
    """The encoder of this name.

    Raises:
        UserError: there is none.
    """
    if name not in ENCODERS:
        raise UserError(f"unknown encoder {name!r}: use {', '.join(ENCODERS)}, or import embeddings made elsewhere")
    return ENCODERS[name]
