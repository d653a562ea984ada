"""Matrix products that are as exact as the screening needs, whatever the library underneath does.

A library compiles int8 products for each shape, and some shapes are wrong on some processors: `torch._int_mm` of torch 2.14.1 on AMD
Zen 4 for an inner dimension of 1, 16-bit saturation on CPUs without VNNI. So each shape is tried once, with extreme values. A shape
that fails uses float64, in which products of int8 are exact. A product may still be wrong after the trial. A kernel that notices one
raises WrongProductError, and `repeat_if_wrong` repeats the kernel with float64 products.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numpy as np
import torch

CPU = torch.device("cpu")
CODE_STEPS = 127  # int8 codes are in −127 … 127
_PROBED = 16  # rows that are compared with all columns, and columns with all rows: no row or column is left out
HALF_ERROR = 2.0**-10  # a float16 product is off by at most half of it, where scores are at most 1.1; the rest is slack
_PROBE_SIDE = 64  # float32 products depend on a setting of the process, not on the shape: one small shape is tried

logger = logging.getLogger(__name__)
_distrusted = threading.Event()  # once set, this process uses float64 products
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class WrongProductError(ArithmeticError):
    """A product is further from the exact one than its bound."""

    def __init__(self) -> None:
        super().__init__(
            "matrix products are wrong on this processor, in float64 too: test the processor and its memory"
        )


def repeat_if_wrong(kernel: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Return a kernel that starts again, with float64 products, after it noticed a wrong one; it must not change its arguments."""

    @functools.wraps(kernel)
    def repeated(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        try:
            return kernel(*arguments, **options)
        except WrongProductError:
            if not _distrusted.is_set():
                _distrusted.set()
                logger.warning("a matrix product is wrong on this processor; float64 products replace all from now on")
            return kernel(*arguments, **options)

    return repeated


def float32_error(dimension: int) -> float:
    """Return the bound on |float32 product − exact inner product| for rows and columns of norm ≤ 1.05."""
    return 1.2 * (dimension + 2) * 2.0**-24


def multiply(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Return left · rightᵀ in `out`; of int8 exactly, of float32 within `float32_error`, of float16 within HALF_ERROR.

    Args:
        left: int8, float16 or float32 [n, d]; int8 within ± CODE_STEPS.
        right: same type, [k, d].
        out: [n, k], int32 for int8, else of the same type.
    """
    rows, columns = (len(left), len(right)) if left.dtype == torch.int8 else (_PROBE_SIDE, _PROBE_SIDE)
    if not _distrusted.is_set():
        if is_sound(left.dtype, rows, columns, left.shape[1], left.device):
            return _fast(left, right, out)
        _log_once(left.dtype)
    return out.copy_(left.double() @ right.double().T)


@functools.cache
def is_sound(dtype: torch.dtype, rows: int, columns: int, dimension: int, device: torch.device = CPU) -> bool:
    """Return whether the library's products of this shape are right, by trial."""
    left, right = (_extremes(count, dimension, dtype, seed).to(device) for seed, count in enumerate((rows, columns)))
    bound = {torch.int8: 0.0, torch.float16: HALF_ERROR}.get(dtype, float32_error(dimension))
    out = left.new_empty((rows, columns), dtype=torch.int32 if dtype == torch.int8 else dtype)
    try:
        found = _fast(left, right, out).double()
    except (AttributeError, RuntimeError):  # this torch has no such product for CPUs
        return False
    some_rows, some_columns = (torch.linspace(0, count - 1, min(count, _PROBED)).long() for count in found.shape)
    off_rows = found[some_rows] - left[some_rows].double() @ right.double().T
    off_columns = found[:, some_columns] - left.double() @ right[some_columns].double().T
    return bool((off_rows.abs() <= bound).all() and (off_columns.abs() <= bound).all())


def _fast(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return (torch._int_mm if left.dtype == torch.int8 else torch.mm)(left, right.T, out=out)


def _extremes(count: int, dimension: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Rows that show saturation (equal signs), and ones that show mixed-up or lost terms (random); floats of unit norm."""
    rows = np.random.default_rng(seed).integers(-CODE_STEPS, CODE_STEPS + 1, (count, dimension), np.int8)
    rows[::3], rows[1::3] = CODE_STEPS, -CODE_STEPS
    codes = torch.from_numpy(rows)
    return codes if dtype == torch.int8 else torch.nn.functional.normalize(codes.float(), dim=1).to(dtype)


@functools.cache
def _log_once(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    logger.warning("%s matrix products of some shapes are wrong on this processor; float64 products replace them", name)
