"""Installed packages: their versions, and extras, which `pip install tailwise` leaves out; figures of matplotlib as bytes."""

from __future__ import annotations

import importlib.util
import io
import platform
import re
import shlex
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from tailwise import __version__
from tailwise.errors import UnsupportedError

STYLE: dict[Any, Any] = {"text.parse_math": False, "text.usetex": False, "svg.hashsalt": "tailwise"}  # names are no TeX
SLIDE_DPI = 200


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


def encode(figure: Any, *, png: bool = False, **options: Any) -> dict[str, bytes]:  # noqa: ANN401  (matplotlib is an extra)
    """Return a figure as {suffix: content}: ".svg" and, if `png`, ".png". `options` are those of `savefig`."""
    formats: dict[str, dict[str, Any]] = {".svg": {"metadata": {"Date": None}}, ".png": {"dpi": SLIDE_DPI}}
    found = {}
    for suffix in [".svg", ".png"] if png else [".svg"]:
        stream = io.BytesIO()
        figure.savefig(stream, format=suffix[1:], **formats[suffix], **options)
        found[suffix] = stream.getvalue()
    return found
