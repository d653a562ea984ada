"""Screening: cheap approximate inner products whose error is known, so that exact ones need only decide among few candidates.

Two kinds of product, the faster of which runs (the result is the same):

- int8: rows and columns are centred on the columns' mean, mixed (so that no coordinate stands out), and rounded to 255 steps each.
  Quantising a rotated residual with its own scale is RaBitQ's idea (Gao, Long 2024), for 8 bits. By Cauchy-Schwarz an inner product is
  off by at most ‖error of the row‖ · ‖column‖ + ‖codes of the row‖ · ‖error of the column‖, and these norms are measured.
- float32: off by at most (d + 2) · 2⁻²⁴ for a pair of unit norm, whatever its order of summation.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tailwise.kernels.jit import jit_any_order
from tailwise.kernels.keyed import hash_range, stream_key
from tailwise.kernels.products import CODE_STEPS, arrange, float32_error, is_sound, multiply
from tailwise.kernels.threads import Shared, run_tiles

Precision = Literal["int8", "float32"]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

PAD = 64  # int8 products have a multiple of PAD rows and columns,
COLUMN_PAD = 16  # or of COLUMN_PAD columns, if these are centroids: the same for all rows
ARRANGED_COLUMNS = 256  # fewer aren't worth the time
_FLOAT32_TRIAL_ROWS = 384
INT8_TRIAL = 64, 64, 256  # rows, columns and dimension: wide enough for sums of int8 to saturate in 16 bits
_SLACK = np.float32(2.0**-16)  # above all that float32 rounds away in centring, mixing, scaling and adding
_MEASURED = np.float32(1.001)  # norms of errors are sums in float32


@dataclass(frozen=True)
class Coded:
    """Rows or columns as they are multiplied."""

    # int8 or float32 [≥ n, d]: int8 products are compiled for each shape that there is, so that few shapes should be
    codes: torch.Tensor
    scale: Floats  # float32 [n]
    offset: Doubles  # float64 [n], what a score lacks: added to that of a row, and as a bias to that of a column
    errors: Floats  # float32 [n], norm of what was rounded away
    lengths: Floats  # float32 [n], norm of what stayed

    def __getitem__(self, at: slice | npt.NDArray[np.int64]) -> Coded:
        """Some of them."""
        if isinstance(at, slice):
            start, stop, _ = at.indices(len(self.scale))
            codes = self.codes[start : start + _padded(stop - start, self.codes.dtype)]
        else:
            codes = self.codes.new_zeros((_padded(len(at), self.codes.dtype), self.codes.shape[1]))
            codes[: len(at)] = self.codes[torch.from_numpy(at)]
        return Coded(codes, self.scale[at], self.offset[at], self.errors[at], self.lengths[at])

    @classmethod
    def memory_for(cls, rows: int, dimension: int, precision: Precision) -> Coded:
        """Return memory for the codes of `rows` rows."""
        dtype = torch.int8 if precision == "int8" else torch.float32
        codes = torch.empty((rows + PAD, dimension), dtype=dtype)  # so that slices have whole pads wherever they begin
        scale, errors, lengths = (np.empty(rows, np.float32) for _ in range(3))
        return cls(codes, scale, np.empty(rows), errors, lengths)


class Screen:
    """Codes rows and columns about one centre, and multiplies them."""

    def __init__(self, centre: Floats, precision: Precision | None = None) -> None:
        """Takes the centre.

        Args:
            centre: float32 [d] on the grid: about the mean of what is multiplied.
            precision: of the products; None for the faster one here.
        """
        self.precision = precision or faster_precision()
        self._centre = centre if self.precision == "int8" else np.zeros_like(centre)
        self._wide_centre = self._centre.astype(np.float64)
        dimension = len(centre)
        mixed = 16 if dimension % 16 == 0 else 4 if dimension % 4 == 0 else 1
        signs = np.where(hash_range(stream_key(0, "signs"), 0, dimension) >> 63, 1, -1)
        self._signs: Floats = (signs / np.sqrt(mixed)).astype(np.float32)

    def rows(self, x: Floats, factors: Floats | None = None, out: Coded | None = None) -> Coded:
        """Codes of rows, float32 [n, d], times factors [n]; then of norm ≤ 1.05. In the place of others, if given."""
        count = len(x)
        if self.precision == "float32" and factors is None and out is None:
            ones = np.ones(count, np.float32)
            return Coded(torch.from_numpy(x), ones, np.zeros(count), np.zeros(count, np.float32), ones)
        if factors is None:
            factors = np.ones(count, np.float32)
        out = out or Coded.memory_for(count, x.shape[1], self.precision)[:count]
        codes = out.codes.numpy()[:count]
        if self.precision == "float32":
            np.multiply(x, factors[:, None], out=codes)
            out.scale[:], out.offset[:], out.errors[:], out.lengths[:] = 1, 0, 0, 1
        else:
            _quantise(
                x,
                factors,
                self._wide_centre,
                self._centre,
                self._signs,
                codes,
                out.scale,
                out.offset,
                out.errors,
                out.lengths,
            )
        return out

    def columns(self, x: Floats, factors: Floats | None = None) -> Coded:
        """Return the codes of columns, times factors."""
        coded = self.as_columns(self.rows(x, factors))
        return replace(coded, codes=coded.codes[: -(-len(x) // COLUMN_PAD) * COLUMN_PAD])

    def as_columns(self, rows: Coded) -> Coded:
        """Codes of rows, to multiply other rows with."""
        return replace(rows, offset=rows.offset - self._wide_centre @ self._wide_centre)

    def tiles(self, columns: Coded, width: int, rows: int = 0) -> list[Columns]:
        """Return columns in tiles of `width`, ready for products with `rows` rows at a time; 0 if each is used once or twice."""
        rows = rows if len(columns.scale) >= ARRANGED_COLUMNS else 0
        return [Columns.of(columns[slice(first, first + width)], rows) for first in range(0, len(columns.scale), width)]

    def scores(self, rows: Coded, columns: Columns, scratch: torch.Tensor) -> Scores:
        """Approximate inner products, in the memory of `scratch` (of `scratch_for`)."""
        if self.precision == "float32":  # what is coded may be rounded
            error = np.full(len(rows.scale), float32_error(rows.codes.shape[1] + 2), np.float32)
        else:
            error = (rows.errors * columns.longest + rows.lengths * columns.roughest) * _MEASURED + _SLACK
        products = multiply(rows.codes, columns.codes, scratch, columns.arranged)
        return Scores(products.numpy(), rows.scale, rows.offset, error, columns.scale, columns.bias)


class Columns(NamedTuple):
    """Columns of a tile, as they are multiplied."""

    codes: torch.Tensor  # int8 or float32 [≥ K, d]
    arranged: torch.Tensor | None  # the codes as `products.arrange` returns them
    scale: Floats  # float32 [K]
    bias: Floats  # float32 [K], what a score lacks
    longest: np.float32  # greatest norm of a column
    roughest: np.float32  # greatest norm of what was rounded away of a column

    @classmethod
    def of(cls, coded: Coded, rows: int = 0) -> Columns:
        """Prepare columns; see `Screen.tiles`."""
        rows = rows or (_FLOAT32_TRIAL_ROWS if coded.codes.dtype == torch.float32 else 0)
        arranged = None
        if rows:
            with full_precision():  # also of the trial
                arranged = arrange(coded.codes, rows)
        longest, roughest = (coded.lengths + coded.errors).max(initial=0), coded.errors.max(initial=0)
        return cls(coded.codes, arranged, coded.scale, coded.offset.astype(np.float32), longest, roughest)


class Scores(NamedTuple):
    """Scores of a tile: |products[r, k] · row_scale[r] · scale[k] + bias[k] + shift[r] − exact inner product| ≤ error[r]."""

    products: npt.NDArray[Any]  # int32 or float32 [≥ n, ≥ K]
    row_scale: Floats  # float32 [n]
    shift: Doubles  # float64 [n]
    error: Floats  # float32 [n]
    scale: Floats  # float32 [K]
    bias: Floats  # float32 [K]


def scratch_for(precision: Precision, rows: int, columns: int) -> torch.Tensor:
    """Return memory for the products of `rows` rows and `columns` columns."""
    dtype = torch.int32 if precision == "int8" else torch.float32
    return torch.empty(_padded(rows, torch.int8) * _padded(columns, torch.int8), dtype=dtype)


def _padded(count: int, dtype: torch.dtype) -> int:
    return -(-count // PAD) * PAD if dtype == torch.int8 else count


@jit_any_order  # sums of grid values are exact in any order; what mixing and the errors' norms round away is covered by the slack
def _quantise(
    x: Floats,
    factors: Floats,
    wide_centre: Doubles,
    centre: Floats,
    signs: Floats,
    codes: npt.NDArray[np.int8],
    scale: Floats,
    offset: Doubles,
    errors: Floats,
    lengths: Floats,
) -> None:
    """Centres, mixes and rounds rows.

    `offset` gets inner products with the centre, `errors` and `lengths` norms of what is rounded away and of what stays.
    """
    rows, dimension = x.shape
    value = np.empty(dimension, np.float32)
    bits, greatest = value.view(np.int32), np.empty(1, np.float32)
    for row in range(rows):
        factor = factors[row]
        product = 0.0
        for axis in range(dimension):
            product += np.float64(x[row, axis]) * wide_centre[axis]
        offset[row] = product * factor
        for axis in range(dimension):
            value[axis] = (x[row, axis] * factor - centre[axis]) * signs[axis]
        if dimension % 4 == 0:
            _mix_four(value)
        if dimension % 16 == 0:
            for first in range(0, dimension, dimension // 4):
                _mix_four(value[first : first + dimension // 4])
        most = np.int32(0)
        for axis in range(
            dimension
        ):  # magnitudes of floats are in the order of their bits, and integers' maxima are vector instructions
            most = max(most, bits[axis] & np.int32(0x7FFFFFFF))
        greatest.view(np.int32)[0] = most
        top = greatest[0]
        step = top / np.float32(CODE_STEPS)
        inverse = np.float32(1) / step if top > 0 else np.float32(0)
        error = length = np.float32(0)
        for axis in range(dimension):
            code = np.rint(value[axis] * inverse)
            codes[row, axis] = np.int8(code)
            kept = code * step
            error += (value[axis] - kept) * (value[axis] - kept)
            length += kept * kept
        scale[row], errors[row], lengths[row] = step, np.sqrt(error), np.sqrt(length)


@jit_any_order
def _mix_four(value: Floats) -> None:
    """Two steps of the fast Walsh-Hadamard transform, not scaled, in place: each quarter becomes a sum of all four with other signs.

    In place of the whole transform: two such steps mix 16 coordinates, and take half of its time.
    """
    quarter = len(value) // 4
    first, second = value[:quarter], value[quarter : 2 * quarter]
    third, fourth = value[2 * quarter : 3 * quarter], value[3 * quarter :]
    for at in range(quarter):
        low, lower = first[at] + second[at], first[at] - second[at]
        high, higher = third[at] + fourth[at], third[at] - fourth[at]
        first[at], second[at], third[at], fourth[at] = low + high, lower + higher, low - high, lower - higher


@functools.cache
def faster_precision() -> Precision:
    """int8 where this processor multiplies it exactly and faster than float32, by trial; once a process."""
    if not is_sound(torch.int8, *INT8_TRIAL):
        return "float32"
    codes = torch.from_numpy(np.random.default_rng(0).integers(-CODE_STEPS, CODE_STEPS + 1, (512, 512), np.int8))
    floats = codes.float()
    seconds: list[tuple[float, float]] = []

    def measure(_: int, __: None) -> None:
        seconds.append((_seconds(torch._int_mm, codes), _seconds(torch.mm, floats)))

    with full_precision():
        run_tiles(measure, range(8), 1, lambda: None)
    return "int8" if min(first for first, _ in seconds) < min(second for _, second in seconds) else "float32"


def _seconds(product: Callable[..., torch.Tensor], operand: torch.Tensor) -> float:
    start = time.perf_counter()
    product(operand, operand.T)
    return time.perf_counter() - start


def _demand_precision() -> Callable[[], None]:
    """TF32 or bfloat16 in place of float32, or sums in float16, would break the screening's error bounds."""
    matmul = torch.backends.cuda.matmul
    wanted: list[tuple[Any, str, Any]] = [(matmul, "allow_fp16_reduced_precision_reduction", False)]
    if hasattr(matmul, "allow_fp16_accumulation"):
        wanted.append((matmul, "allow_fp16_accumulation", False))
    if hasattr(torch.backends, "fp32_precision"):  # the older switch can't be read once these were set
        wanted += [(matmul, "fp32_precision", "ieee"), (torch.backends.mkldnn.matmul, "fp32_precision", "ieee")]  # type: ignore[attr-defined]
        older = None
    else:  # torch < 2.9
        older = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    before = [getattr(place, name) for place, name, _ in wanted]
    for place, name, value in wanted:
        setattr(place, name, value)

    def restore() -> None:
        for (place, name, _), value in zip(wanted, before, strict=True):
            setattr(place, name, value)
        if older is not None:
            torch.set_float32_matmul_precision(older)

    return restore


full_precision = Shared(_demand_precision)
"""Keeps matrix products as precise as they should be, whatever the user allows elsewhere."""
