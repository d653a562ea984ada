"""The random numbers that a model draws during training (patch dropout, drop path)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from tailwise.kernels.keyed import stream_key


def reseed(seed: int, *numbers: int) -> None:
    """Seed the global generators of torch (CPU and CUDA), random and numpy from a key of (seed, numbers)."""
    key = int(stream_key(seed, "train", *numbers))
    torch.manual_seed(key)
    random.seed(key)
    np.random.seed(key % (1 << 32))  # noqa: NPY002  (other libraries use the global generator)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restore the state of the global generators at the end, because code that reads data may use them."""
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
