"""What the tests of plans share: quotas in fixed point, and pools of rows."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from tailwise.kernels.ranks import appearance_ranks
from tailwise.plan.quotas import UNITS, fill_by_scale, round_to_sum


@dataclass(frozen=True)
class Pool:
    """Rows of a pool in a random order."""

    sizes: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int32]
    ranks: npt.NDArray[np.uint32]


@pytest.fixture(scope="session")
def make_pool() -> Callable[..., Pool]:
    """sizes → rows whose clusters are interleaved at random, so that ranks are not row numbers."""

    def make(sizes: npt.ArrayLike, seed: int = 0) -> Pool:
        sizes = np.asarray(sizes, np.int64)
        labels = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        labels = np.random.default_rng(seed).permutation(labels)
        return Pool(sizes, labels, appearance_ranks(labels, np.zeros(len(sizes), np.int64)))

    return make


@pytest.fixture(scope="session")
def scaled_quotas() -> Callable[..., npt.NDArray[np.int64]]:
    """(sizes, budget, alpha, most repeats) → quotas ∝ size^alpha in units of 2⁻³⁰ samples, as a dynamic plan has them."""

    def make(sizes: npt.ArrayLike, budget: int, alpha: float, repeats: int = 1) -> npt.NDArray[np.int64]:
        sizes = np.asarray(sizes, np.int64)
        quotas = fill_by_scale(
            sizes.astype(np.float64) ** alpha, np.zeros(len(sizes)), (repeats * sizes).astype(np.float64), budget
        )
        return round_to_sum(quotas * UNITS, budget * UNITS, np.zeros_like(sizes), repeats * sizes * UNITS, sizes)

    return make


@pytest.fixture(scope="session")
def rated_quotas() -> Callable[..., tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """(sizes, rates) → the sizes with a filler cluster of 2 members at the end, and quotas that sum to whole samples."""

    def make(sizes: npt.ArrayLike, rates: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        sizes, rates = np.asarray(sizes, np.int64), np.asarray(rates, np.float64)
        quotas = np.rint(sizes * rates * UNITS).astype(np.int64)
        filler = -int(quotas.sum()) % UNITS
        return np.append(sizes, 2), np.append(quotas, filler)

    return make
