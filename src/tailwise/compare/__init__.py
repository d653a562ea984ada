"""Comparison: methods × seeds at equal samples seen, with the intervals that so many seeds allow."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tailwise.compare.recipe import CompareRecipe, load_compare_recipe
    from tailwise.compare.study import Study, compare

__all__ = ["CompareRecipe", "Study", "compare", "load_compare_recipe"]

_HOMES = {"CompareRecipe": "recipe", "Study": "study", "compare": "study", "load_compare_recipe": "recipe"}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Imports the public names when they are first used: torch takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tailwise.compare' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tailwise.compare.{_HOMES[name]}"), name)
