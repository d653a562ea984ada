"""The loader: a plan's samples in batches, from the tars as they lie."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tailwise.loader.dataset import Batch, Replacement
    from tailwise.loader.loader import Loader

__all__ = ["Batch", "Loader", "Replacement"]

_HOMES = {"Batch": "dataset", "Loader": "loader", "Replacement": "dataset"}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Imports the public names when they are first used: exports read tars by the modules beside, and need no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tailwise.loader' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tailwise.loader.{_HOMES[name]}"), name)
