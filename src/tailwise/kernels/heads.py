"""Linear layers on embeddings: heads that predict one number, such as the aesthetic value of an image.

The result has the same bits in whatever order, with whatever library, on whatever number of threads. Inputs are multiples of 2⁻²⁴ of at
most 1: float16 rows of unit norm, or outputs of a layer over the power of two that bounds them, rounded. The weights of an output, over a
power of two that makes their norm at most 1/2, are a multiple of 2⁻²² and a rest, a multiple of 2⁻³⁸. Up to 2¹⁴ inputs, float64 holds all
sums of products with either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tailwise.kernels.grid import to_grid

MAX_INPUTS = 1 << 14
BLOCK_NUMBERS = 1 << 23  # inputs of a layer, of all rows at a time: bounds memory
Wide = npt.NDArray[np.float64]


class _Layer:
    def __init__(self, weight: Wide, bias: Wide) -> None:
        """Takes weight [o, i] and bias [o]."""
        norms = [math.sqrt(math.fsum(row * row)) for row in weight]
        self.scale = np.array([math.ldexp(2.0, math.frexp(norm)[1]) for norm in norms])
        scaled = weight / self.scale[:, None]
        self.coarse = np.rint(scaled * 2.0**22) / 2.0**22
        self.fine = np.rint((scaled - self.coarse) * 2.0**38) / 2.0**38
        self.bias = bias

    def __call__(self, x: Wide) -> Wide:
        """Return x Wᵀ [n, o], for multiples x [n, i] of 2⁻²⁴ of at most 1."""
        out: Wide = (x @ self.coarse.T + x @ self.fine.T) * self.scale
        return out


class Head:
    """Linear layers with one output, the same activation between each two."""

    def __init__(self, layers: Sequence[tuple[Wide, Wide]], activation: str) -> None:
        """Takes weight [o, i] and bias [o] of each layer, float64, the last with o = 1; and the activation, of ACTIVATIONS."""
        weight, bias = layers[-1]
        if activation == "none":  # all are one linear map
            for inner, inner_bias in reversed(layers[:-1]):
                bias = bias + math.fsum(weight[0] * inner_bias)
                weight = np.array([[math.fsum(weight[0] * column) for column in inner.T]])
            layers = [(weight, bias)]
        self._layers = [_Layer(*layer) for layer in layers]
        self._block = max(1, BLOCK_NUMBERS // max(weight.shape[1] for weight, _ in layers))

    def __call__(self, rows: npt.NDArray[np.float16]) -> Wide:
        """Return the output of each row: float64 [n]; NaN for rows of zeros.

        Args:
            rows: float16 [n, i], unit norm or zero.
        """
        blocks = range(0, len(rows), self._block)
        return np.concatenate([self._of_block(rows[start : start + self._block]) for start in blocks])

    def _of_block(self, rows: npt.NDArray[np.float16]) -> Wide:
        x, scale = to_grid(rows).astype(np.float64), np.ones((len(rows), 1))
        there = x.any(axis=1)
        for number, layer in enumerate(self._layers):
            if number:
                x = np.maximum(x, 0.0)
                scale = np.ldexp(1.0, np.frexp(x.max(axis=1, keepdims=True))[1])
                x = np.rint(x / scale * 2.0**24) / 2.0**24
            x = layer(x) * scale + layer.bias
        return np.where(there, x[:, 0], np.nan)


ACTIVATIONS = ("none", "relu")
