"""What the tests of kernels share: rows of unit norm."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import numpy.typing as npt
import pytest

from tailwise.kernels import screening, seeding, similarity
from tailwise.kernels.assign import Assigner

Rows = npt.NDArray[np.floating]


@pytest.fixture(scope="session")
def unit_rows() -> Callable[..., Rows]:
    """(n, d) → random rows of unit norm."""

    def make(count: int, dimension: int, seed: int = 0, dtype: npt.DTypeLike = np.float16) -> Rows:
        rows = np.random.default_rng(seed).standard_normal((count, dimension))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(dtype)

    return make


@pytest.fixture(scope="session")
def blobs() -> Callable[..., Rows]:
    """(n, d, centres) → rows of unit norm around random centres of very unequal shares, in random order."""

    def make(
        count: int, dimension: int, centres: int, seed: int = 0, noise: float = 0.5, dtype: npt.DTypeLike = np.float16
    ) -> Rows:
        rng = np.random.default_rng(seed)
        middle = rng.standard_normal((centres, dimension))
        middle /= np.linalg.norm(middle, axis=1, keepdims=True)
        shares = 1 / np.arange(1, centres + 1)
        label = rng.choice(centres, count, p=shares / shares.sum())
        rows = middle[label] + noise * rng.standard_normal((count, dimension)) / np.sqrt(dimension)
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(dtype)

    return make


@pytest.fixture(scope="session")
def products_by() -> Callable[[str], AbstractContextManager[None]]:
    """`with products_by(kind):` screens by products of "int8" or "float32" on the CPU, or by those of a "device", run on the CPU."""

    @contextmanager
    def use(kind: str) -> Iterator[None]:
        def on_device(x: Rows, start: int, _: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
            return similarity._most_similar_on_device(similarity.Rows(x, "cpu"), start)

        with pytest.MonkeyPatch.context() as patch:
            for module in (screening, seeding):
                patch.setattr(module, "faster_precision", lambda: "int8" if kind == "int8" else "float32")
            if kind == "device":
                patch.setattr(Assigner, "_assign_cpu", Assigner._assign_device)
                patch.setattr(similarity, "_most_similar_on_cpu", on_device)
            yield

    return use
