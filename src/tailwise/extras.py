"""Extras: groups of packages that some commands need and `pip install tailwise` leaves out."""

from __future__ import annotations

import importlib.util
import re
import shlex
from importlib.metadata import PackageNotFoundError, requires

from tailwise.errors import UnsupportedError


def install_command(extra: str) -> str:
    """Return the command that installs the packages of an extra, by name: it works without a release and without a checkout."""
    try:
        lines = requires("tailwise") or []
    except PackageNotFoundError:  # the source is on the path, not installed
        lines = []
    marked = re.compile(rf"""^([^;]+?)\s*;\s*extra\s*==\s*["']{extra}["']$""")
    packages = [found.group(1) for line in lines if (found := marked.match(line))]
    return shlex.join(["pip", "install", *(packages or [f".[{extra}]"])])


def require(extra: str, *modules: str, purpose: str) -> None:
    """Refuse to go on without the modules of an extra.

    Raises:
        UnsupportedError: one of `modules` is not installed. `purpose` names what needs them.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedError(f"{purpose} needs {', '.join(missing)}: {install_command(extra)}")
