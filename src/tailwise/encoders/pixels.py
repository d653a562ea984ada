"""A descriptor of images without weights, for tests only: it sees colours and edges, not objects.

Letters: n = images, s = `SIDE` pixels, c = `CELLS` a side, b = bins, d = `DIMENSION`.

All sums over pixels are whole numbers that float32 holds exactly, so the order of summation does not matter: an image's row does not
depend on its batch, on threads, or on the BLAS library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from tailwise.encoders.encoder import Encoder, Side, Tensors, refuse
from tailwise.encoders.prepare import ImagePreparation
from tailwise.errors import UserError
from tailwise.requests import EncoderRequest

Floats: TypeAlias = npt.NDArray[np.float32]

SIDE = 32  # every image is scaled to this size
CELLS = 4
LEVELS = 6  # per channel
ORIENTATIONS = 6
DIMENSION = LEVELS**3 + CELLS**2 * 3 + CELLS**2 * ORIENTATIONS

COLOUR_WEIGHT, LAYOUT_WEIGHT, EDGE_WEIGHT = 1.0, 0.3, 0.5  # tuned on tailwise.demo.pool
LEAST_CONTRAST = 0.01  # norm below which a block does not get full weight, because it holds rounding errors
CHUNK_IMAGES = 64  # so that intermediate arrays stay in the processor's cache


def load(_: str, options: EncoderRequest, device: torch.device, _precision: str) -> Encoder:
    """Return the encoder `pixels`. It does all its work where images are decoded."""
    refuse("pixels", model=options.model, pooling=options.pooling)
    if options.precision not in {"auto", "fp32"}:
        raise UserError(f"`precision` {options.precision}: pixels computes in fp32")
    side = Side(ImagePreparation(_prepare), lambda tensors: tensors["rows"], {"size": SIDE})
    return Encoder("pixels", {"image": side}, {"model": "pixels"}, device, "fp32", ())


def _prepare(images: Sequence[Image.Image]) -> Tensors:
    return {"rows": torch.from_numpy(describe(images))}


# Shares of a value 0 … 255 in its two nearest levels, in sixteenths: float32 [256, LEVELS], rows sum to 16.
_PLACE = np.arange(256)[:, None] * ((LEVELS - 1) / 255)
SOFT_LEVELS: Floats = np.rint(np.maximum(0, 1 - np.abs(_PLACE - np.arange(LEVELS))) * 16).astype(np.float32)


def describe(images: Sequence[Image.Image]) -> Floats:
    """Return a colour histogram, a coarse colour layout and histograms of edge orientations: float32 [n, d], rows of unit norm.

    Each of these three blocks is centred and normalised on its own, then weighted. The same image has the same row in any batch.
    """
    small = [image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX) for image in images]
    pixels = [np.asarray(image, dtype=np.uint8) for image in small]
    firsts = range(0, len(images), CHUNK_IMAGES)
    rows = [_describe_pixels(np.stack(pixels[first : first + CHUNK_IMAGES])) for first in firsts]
    return np.concatenate(rows) if rows else np.empty((0, DIMENSION), np.float32)


def _describe_pixels(pixels: npt.NDArray[np.uint8]) -> Floats:
    """Return float32 [n, d] from uint8 [n, s, s, 3]."""
    blocks = (
        # The fourth root weighs the presence of a colour more than its area: an object counts as much as its background.
        COLOUR_WEIGHT * _centred(np.sqrt(np.sqrt(_colour_histogram(pixels)))),
        LAYOUT_WEIGHT * _centred(_sum_by_cell(pixels.astype(np.float32)) / np.float32(255 * (SIDE // CELLS) ** 2)),
        EDGE_WEIGHT * _centred(np.sqrt(_edge_histograms(pixels))),
    )
    joined = np.concatenate(blocks, axis=1)
    unit: Floats = joined / np.linalg.norm(joined, axis=1, keepdims=True)
    return unit


def _colour_histogram(pixels: npt.NDArray[np.uint8]) -> Floats:
    """Return the joint histogram of red, green and blue, each pixel shared among near bins: [n, s, s, 3] to [n, LEVELS³]."""
    n = len(pixels)
    red, green, blue = (SOFT_LEVELS[pixels[..., channel].reshape(n, -1)] for channel in range(3))
    red_green = (red[..., :, None] * green[..., None, :]).reshape(n, SIDE * SIDE, LEVELS**2)
    counts: Floats = np.matmul(red_green.transpose(0, 2, 1), blue)
    return counts.reshape(n, -1)


def _edge_histograms(pixels: npt.NDArray[np.uint8]) -> Floats:
    """Return edge strength by cell and orientation, regardless of the step's sign: [n, s, s, 3] to [n, c * c * b]."""
    brightness = pixels.astype(np.float32).sum(axis=3)
    across, down = np.zeros_like(brightness), np.zeros_like(brightness)
    across[:, :, 1:-1] = brightness[:, :, 2:] - brightness[:, :, :-2]
    down[:, 1:-1] = brightness[:, 2:] - brightness[:, :-2]
    strength = np.sqrt(across * across + down * down)
    # The doubled angle is the same for opposite directions; a pixel's weight in a bin depends on the distance of its doubled angle.
    safe = np.maximum(strength, 1)
    doubled_cosine, doubled_sine = (across * across - down * down) / safe, 2 * across * down / safe
    angles = 2 * np.pi * np.arange(ORIENTATIONS) / ORIENTATIONS
    responses = [
        np.rint(np.maximum(0, doubled_cosine * float(cosine) + doubled_sine * float(sine) - 0.3 * strength))
        for cosine, sine in zip(np.cos(angles), np.sin(angles), strict=True)
    ]
    return _sum_by_cell(np.stack(responses, axis=3))


def _sum_by_cell(values: npt.NDArray[Any]) -> Floats:
    """Return sums over each of c by c cells: [n, s, s, b] to [n, c * c * b]."""
    n, edge = len(values), SIDE // CELLS
    rows_summed = values.reshape(n, CELLS, edge, SIDE, -1).sum(axis=2)
    sums: Floats = rows_summed.reshape(n, CELLS, CELLS, edge, -1).sum(axis=3)
    return sums.reshape(n, -1)


def _centred(block: Floats) -> Floats:
    """Return rows minus their mean, of unit norm; rows of almost no contrast stay near zero."""
    centred = block - block.mean(axis=1, keepdims=True)
    unit: Floats = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), np.float32(LEAST_CONTRAST))
    return unit
