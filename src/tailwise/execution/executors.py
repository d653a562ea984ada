"""Executors by name: one table."""

from __future__ import annotations

import os
from collections.abc import Callable

from tailwise.errors import UserError
from tailwise.execution.base import Executor
from tailwise.execution.local import LocalExecutor
from tailwise.execution.parts import PartExecutor, parse_part
from tailwise.extras import require
from tailwise.progress import Track, silent
from tailwise.text import did_you_mean


def _on_ray(address: str, skip_lost: bool) -> Executor:
    require("ray", "ray", purpose="`executor` ray")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # else Ray reports lost nodes on standard output
    from tailwise.execution.ray import RayExecutor  # noqa: PLC0415  (of an extra)

    return RayExecutor(address, skip_lost=skip_lost)


EXECUTORS: dict[str, Callable[[str, bool], Executor]] = {"local": lambda *_: LocalExecutor(), "ray": _on_ray}


def open_executor(
    name: str = "local",
    ray_address: str = "auto",
    *,
    skip_lost: bool = False,
    part: str | None = None,
    progress: Track = silent,
) -> Executor:
    """Return an executor; the caller closes it.

    Args:
        name: of EXECUTORS.
        ray_address: of the cluster of "ray", see `RayExecutor`.
        skip_lost: of "ray", see `RayExecutor`.
        part: I/N, of "local", see `PartExecutor`; None for all items.
        progress: shows that of a part.

    Raises:
        UserError: the name is unknown, ray is not installed, or there is no cluster.
    """
    check_executor(name)
    if part is not None:
        if name != "local":
            raise UserError(f"`part` {part}: parts are for runs without an engine, and `executor` is {name}")
        return PartExecutor(*parse_part(part), progress)
    return EXECUTORS[name](ray_address, skip_lost)


def check_executor(name: str) -> None:
    """Raise a UserError if the name is unknown."""
    if name not in EXECUTORS:
        raise UserError(f"`executor` {name!r}: {did_you_mean(name, EXECUTORS)}")
