"""What an encoder is: how images and captions become tensors (in worker processes), and these become embeddings (where the model is).

Letters: n = items of a batch that are fit, d = dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Tensors: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Fault:
    """Why an item gets no embedding.

    Attributes:
        reason: one of a few, to count by.
        detail: what is wrong with this very item.
    """

    reason: str
    detail: str


@dataclass
class Inputs:
    """What the items of a batch became.

    Attributes:
        tensors: [n, …] each, of the fit items, in their order; empty if none is fit.
        faults: of the others, by index among all items.
        truncated: how many captions are longer than the model reads.
    """

    tensors: Tensors
    faults: dict[int, Fault] = field(default_factory=dict)
    truncated: int = 0


@dataclass(frozen=True)
class Side:
    """How one column is made.

    Attributes:
        prepare: encoded images (bytes), or captions (str), to tensors. Picklable: worker processes run it.
        forward: tensors on the model's device to embeddings [n, d], of any float type and norm; a row depends on its item alone, up to
            the rounding of other batch sizes.
        preprocessing: what `prepare` does, as a JSON value.
        backend: what runs `forward`.
    """

    prepare: Callable[[Sequence[Any]], Inputs]
    forward: Callable[[Tensors], Tensor]
    preprocessing: Mapping[str, Any]
    backend: str = "torch"


@dataclass(frozen=True)
class Encoder:
    """A loaded encoder.

    Attributes:
        name: as the user spelt it.
        sides: by column ("image", "text"), those that it has.
        identity: what else decides its embeddings, as JSON values: model, hash of the weights, pooling.
        device: that `forward` wants its tensors on.
        precision: that it computes in: "fp32", "bf16" or "fp16".
        packages: whose versions are worth noting.
        network: of all sides; None if `forward` has no network.
    """

    name: str
    sides: Mapping[str, Side]
    identity: Mapping[str, Any]
    device: torch.device
    precision: str
    packages: tuple[str, ...]
    network: nn.Module | None = None

    def embed(self, column: str, tensors: Tensors) -> Tensor:
        """Embeddings [n, d] of prepared items, wherever the tensors are; float32, on the encoder's device."""
        lower = self.precision != "fp32"
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        placed = {name: value.to(self.device, non_blocking=True) for name, value in tensors.items()}
        with torch.inference_mode(), torch.autocast(self.device.type, dtype, enabled=lower):
            return self.sides[column].forward(placed).float()
