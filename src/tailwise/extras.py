"""Installed packages: their versions, and extras, which some commands need and `pip install tailwise` leaves out."""

from __future__ import annotations

import importlib.util
import platform
import re
import shlex
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version

from tailwise import __version__
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
    """Raise an UnsupportedError if one of the modules of an extra is not installed; `purpose` names what needs them."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedError(f"{purpose} needs {', '.join(missing)}: {install_command(extra)}")


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of tailwise, of Python, and of those packages that are installed."""
    found = {"tailwise": __version__, "python": platform.python_version()}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = _version(name)
    return found


_version = cache(version)
