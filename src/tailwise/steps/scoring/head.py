"""Heads in files: linear layers that somebody trained on embeddings, for an aesthetic score or NSFW. Their shapes say what they are."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.errors import NotFoundError, UserError
from tailwise.extras import require
from tailwise.kernels.heads import ACTIVATIONS, MAX_INPUTS, Head

MAX_BYTES = 1 << 28
# LAION's improved aesthetic predictor: outputs of its layers, between which there is no activation.
PUBLISHED: dict[tuple[int, ...], str] = {(1024, 128, 64, 16, 1): "none"}
Layers = list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]


def read_head(path: Path, activation: str) -> Head:
    """Return the head in a file: a linear layer, or several one after the other, in the order of their names.

    Args:
        path: .safetensors, or a state_dict of torch: tensors PREFIX.weight [o, i] and PREFIX.bias [o], or weight and bias alone.
        activation: between layers; "" for that of a published head.

    Raises:
        UserError: the file cannot be read, holds something else than linear layers that fit one another and end in one output, or needs an
            activation.
    """
    layers = read_layers(path)
    widths = tuple(len(weight) for weight, _ in layers)
    if activation and len(layers) == 1:
        raise UserError(f"`activation` {activation} does nothing with {path}: it has one layer")
    found = activation or ("none" if len(layers) == 1 else PUBLISHED.get(widths))
    if found is None:
        raise UserError(
            f"{path} has {len(layers)} layers, and does not say what is between them: give `activation`, {' or '.join(ACTIVATIONS)}"
        )
    return Head(layers, found)


def read_layers(path: Path) -> Layers:
    """Return weight [o, i] and bias [o] of each layer of a head; see `read_head`."""
    tensors = _tensors(path)
    prefixes = sorted({name.rpartition(".")[0] for name in tensors}, key=_natural)
    layers: Layers = []
    for prefix in prefixes:
        names = [f"{prefix}.{name}" if prefix else name for name in ("weight", "bias")]
        weight = tensors.pop(names[0], np.empty(0))
        bias = tensors.pop(names[1], np.zeros(weight.shape[:1]))
        before = f", after {len(layers[-1][1])} outputs" if layers else ""
        fits = weight.ndim == 2 and weight.size > 0 and (not layers or weight.shape[1] == len(layers[-1][1]))
        if not fits or bias.shape != weight.shape[:1]:
            raise _other(path, f"{names[0]} {list(weight.shape)} and {names[1]} {list(bias.shape)}{before}")
        if not (np.abs(np.append(weight, bias)) < 1e30).all():
            raise _other(path, f"numbers in {prefix or 'it'} that are infinite, no number, or beyond 1e30")
        layers.append((weight, bias))
    if tensors or not layers or len(layers[-1][1]) != 1:
        raise _other(path, ", ".join(list(tensors)[:3]) or f"{len(layers[-1][1]) if layers else 0} outputs")
    if max(weight.shape[1] for weight, _ in layers) > MAX_INPUTS:
        raise _other(path, f"more than {MAX_INPUTS:,} inputs of a layer")
    return layers


def _other(path: Path, found: str) -> UserError:
    return UserError(
        f"{path} is no head: it has {found}; a head is linear layers, weight [outputs, inputs] and bias [outputs], the last with one output"
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """Return what sorts layers.10 after layers.2."""
    return [(len(piece) if piece.isdecimal() else 0, piece) for piece in re.split(r"(\d+)", name)]


def _tensors(path: Path) -> dict[str, npt.NDArray[np.float64]]:
    if not path.is_file():
        raise NotFoundError(f"`head` {path} is no file: give the weights of linear layers, .safetensors, .pth or .pt")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"`head` {path} has {path.stat().st_size:,} bytes: a head has at most {MAX_BYTES:,}")
    try:
        content = (_safetensors if path.suffix.lower() == ".safetensors" else _state_dict)(path)
        return {str(name): tensor.detach().double().numpy() for name, tensor in content.items()}
    except (
        *(OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError),
        pickle.UnpicklingError,
    ) as error:
        line = str(error).strip().partition("\n")[0][:200]
        raise UserError(f"`head` {path} can't be read as weights: {line}; save the state_dict of the layers") from error


def _safetensors(path: Path) -> Mapping[str, Any]:
    require("encoders", "safetensors", purpose=f"`head` {path.name}")
    from safetensors import SafetensorError  # noqa: PLC0415  (an extra)
    from safetensors.torch import load_file  # noqa: PLC0415

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _state_dict(path: Path) -> Any:  # noqa: ANN401  (whatever the file holds)
    import torch  # noqa: PLC0415  (seconds, which other scores do without)

    content = torch.load(path, map_location="cpu", weights_only=True)
    while isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
    return content
