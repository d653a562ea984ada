"""The parts of an encoder: images and captions become tensors (in worker processes), and tensors become embeddings (on the device).

Letters: n = valid items of a batch, d = dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tailwise.errors import UserError

Tensors: TypeAlias = dict[str, Tensor]


def refuse(encoder: str, **options: object) -> None:
    """Raise a UserError for an option that was given and does nothing with an encoder."""
    for option, value in options.items():
        if value is not None:
            raise UserError(f"`{option}` does nothing with {encoder}: leave it out")


@dataclass(frozen=True)
class Fault:
    """The reason why an item gets no embedding."""

    reason: str  # one of a few reasons, for counts
    detail: str  # the problem of this item


@dataclass
class Inputs:
    """A prepared batch."""

    tensors: Tensors  # [n, …] each, of the valid items in their order; empty if there is none
    faults: dict[int, Fault] = field(default_factory=dict)  # faults of the other items, by index among all items
    truncated: int = 0  # number of captions that are longer than the model reads


@dataclass(frozen=True)
class Side:
    """The way to make one column of embeddings."""

    # encoded images (bytes), or captions (str), to tensors. Picklable, because worker processes run it
    prepare: Callable[[Sequence[Any]], Inputs]
    # tensors on the model's device to embeddings [n, d], of any float type and norm; a row depends on its item alone, up to the rounding
    # of other batch sizes
    forward: Callable[[Tensors], Tensor]
    preprocessing: Mapping[str, Any]  # description of `prepare`, as a JSON value
    backend: str = "torch"  # backend that runs `forward`


@dataclass(frozen=True)
class Encoder:
    """A loaded encoder."""

    name: str  # name as given by the user
    sides: Mapping[str, Side]  # sides by column ("image", "text")
    identity: Mapping[str, Any]  # what else decides the embeddings, as JSON values: model, hash of the weights, pooling
    device: torch.device  # device of the tensors for `forward`
    precision: str  # "fp32", "bf16" or "fp16"
    packages: tuple[str, ...]  # packages whose versions are recorded
    network: nn.Module | None = None  # network of all sides; None if `forward` has no network

    def embed(self, column: str, tensors: Tensors) -> Tensor:
        """Return embeddings [n, d] of prepared items on any device; float32, on the encoder's device."""
        lower = self.precision != "fp32"
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        placed = {name: value.to(self.device, non_blocking=True) for name, value in tensors.items()}
        with torch.inference_mode(), torch.autocast(self.device.type, dtype, enabled=lower):
            return self.sides[column].forward(placed).float()
