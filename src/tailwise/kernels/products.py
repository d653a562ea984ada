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
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numpy as np
import torch

from tailwise.kernels.threads import run_tiles

CPU = torch.device("cpu")
CODE_STEPS = 127  # int8 codes are in −127 … 127
_PROBED = 16  # rows that are compared with all columns, and columns with all rows: no row or column is left out
HALF_ERROR = 2.0**-10  # a float16 product is off by at most half of it, where scores are at most 1.1; the rest is slack
_PROBE_SIDE = 64  # float32 products depend on a setting of the process, not on the shape: one small shape is tried
_TRIAL_COLUMNS, _TRIALS, _CLEARLY = 1024, 4, 0.9  # of the trial of oneDNN's products

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


def multiply(
    left: torch.Tensor, right: torch.Tensor, scratch: torch.Tensor, arranged: torch.Tensor | None = None
) -> torch.Tensor:
    """Return left · rightᵀ; of int8 exactly, of float32 within `float32_error`, of float16 within HALF_ERROR.

    Args:
        left: int8, float16 or float32 [n, d]; int8 within ± CODE_STEPS.
        right: same type, [k, d].
        scratch: memory for n · k numbers, int32 for int8, else of the same type; the result may use it.
        arranged: `right`, by `arrange`: then products of int8 are float32, rounded where |sum| > 2²⁴.
    """
    rows, columns = (len(left), len(right)) if left.dtype == torch.int8 else (_PROBE_SIDE, _PROBE_SIDE)
    if not _distrusted.is_set():
        if arranged is not None and is_sound(left.dtype, rows, columns, left.shape[1], onednn=True):
            return _onednn(left, arranged, len(right))
        if is_sound(left.dtype, rows, columns, left.shape[1], left.device):
            return _fast(left, right, scratch)
        _log_once(left.dtype)
    return _shaped(scratch, left, right).copy_(left.double() @ right.double().T)


def arrange(right: torch.Tensor, rows: int) -> torch.Tensor | None:
    """Return columns [k, d], int8 or float32, as oneDNN takes them; None where `_int_mm` or `mm` is as fast, by trial.

    On Intel processors with AMX, int8 products of oneDNN are twice as fast as `_int_mm`; on AMD, float32 ones twice as fast as MKL's.
    To arrange int8 takes as long as a few products of 384 rows; float32 stays as it is.
    """
    if _distrusted.is_set() or not onednn_is_faster(right.dtype, rows, right.shape[1]):
        return None
    return _arranged(right, rows)


@functools.cache
def onednn_is_faster(dtype: torch.dtype, rows: int, dimension: int) -> bool:
    """Return whether oneDNN's products on the CPU are right and clearly faster here, by trial; once a process and shape."""
    if not is_sound(dtype, rows, _TRIAL_COLUMNS, dimension, onednn=True):
        return False
    left, right = (_extremes(count, dimension, dtype, 0) for count in (rows, _TRIAL_COLUMNS))
    arranged, scratch = _arranged(right, rows), _scratch(left, right)
    seconds: tuple[list[float], list[float]] = [], []

    def measure(trial: int, _: None) -> None:
        start = time.perf_counter()
        _onednn(left, arranged, len(right)) if trial % 2 else _fast(left, right, scratch)
        seconds[trial % 2].append(time.perf_counter() - start)

    run_tiles(measure, range(2 * _TRIALS), 1, lambda: None)
    return min(seconds[1]) < _CLEARLY * min(seconds[0])


def _arranged(right: torch.Tensor, rows: int) -> torch.Tensor:
    if right.dtype == torch.float32:
        return right
    packed: torch.Tensor = torch.ops.onednn.qlinear_prepack(right, [rows, right.shape[1]])
    return packed


def _onednn(left: torch.Tensor, arranged: torch.Tensor, columns: int) -> torch.Tensor:
    """Return float32 products; oneDNN takes int8 rows as unsigned codes with a zero point, which it subtracts again."""
    product: torch.Tensor
    if left.dtype == torch.float32:
        product = torch.ops.mkldnn._linear_pointwise(left, arranged, None, "none", [], "")
    else:
        codes, (scale, zero) = left.view(torch.uint8) ^ 128, _ones_and_zeros(columns)
        product = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 128, arranged, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
    return product


@functools.cache
def _ones_and_zeros(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(count), torch.zeros(count, dtype=torch.int64)


@functools.cache
def is_sound(
    dtype: torch.dtype, rows: int, columns: int, dimension: int, device: torch.device = CPU, *, onednn: bool = False
) -> bool:
    """Return whether the library's products of this shape are right, by trial; those of oneDNN if asked."""
    left, right = (_extremes(count, dimension, dtype, seed).to(device) for seed, count in enumerate((rows, columns)))
    float32_rounds = max(CODE_STEPS**2 * dimension * 2.0**-24, 1) - 1  # of the greatest sums of codes
    bounds = {torch.int8: float32_rounds if onednn else 0.0, torch.float16: HALF_ERROR}
    bound = bounds.get(dtype, float32_error(dimension))
    try:
        product = (
            _onednn(left, _arranged(right, rows), columns) if onednn else _fast(left, right, _scratch(left, right))
        )
        found = product.double()
    except (AttributeError, RuntimeError):  # this torch has no such product for CPUs
        return False
    some_rows, some_columns = (torch.linspace(0, count - 1, min(count, _PROBED)).long() for count in found.shape)
    off_rows = found[some_rows] - left[some_rows].double() @ right.double().T
    off_columns = found[:, some_columns] - left.double() @ right[some_columns].double().T
    return bool((off_rows.abs() <= bound).all() and (off_columns.abs() <= bound).all())


def _fast(left: torch.Tensor, right: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    product = torch._int_mm if left.dtype == torch.int8 else torch.mm
    return product(left, right.T, out=_shaped(scratch, left, right))


def _scratch(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left.new_empty(len(left) * len(right), dtype=torch.int32 if left.dtype == torch.int8 else left.dtype)


def _shaped(scratch: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return scratch[: len(left) * len(right)].view(len(left), len(right))


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
