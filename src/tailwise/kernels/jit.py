"""numba's compiler, typed: compiled once per machine (cached on disk), and run without the interpreter lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])

# Reordering float operations is allowed only where the kernel says why its sums are exact in any order.
_ANY_ORDER = {"reassoc", "contract", "nsz", "nnan", "ninf"}


def jit(function: Function) -> Function:
    """Compiles a loop; float operations keep their order."""
    return _compile(function, fastmath=False)


def jit_any_order(function: Function) -> Function:
    """Compiles a loop whose float operations may be reordered; the function must be exact, or indifferent, under that."""
    return _compile(function, fastmath=_ANY_ORDER)


def _compile(function: Function, fastmath: bool | set[str]) -> Function:
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    try:
        return cast("Function", numba.njit(cache=True, **options)(function))
    except RuntimeError:  # the package's folder and the user's home are read-only: each process compiles again
        return cast("Function", numba.njit(**options)(function))
