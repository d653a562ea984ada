"""A run's folder and its `tailwise.json`: what decides the run, so that it is resumed with the same settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tailwise.catalog.files import read_json, write_json
from tailwise.errors import ConflictError, UnsupportedError, UserError

FILE = "tailwise.json"
FORMAT = 1


def read_run(folder: Path) -> dict[str, Any] | None:
    """Return the content of a run's `tailwise.json`; None if there is no run. Refuse runs of other programs and other versions."""
    if not (folder / FILE).exists():
        if (folder / "out.log").exists() or (folder / "checkpoints").exists():
            raise UserError(f"{folder} is a run that `tailwise train` did not start: give another `name`")
        return None
    found: dict[str, Any] = read_json(folder / FILE)
    if found.get("format") != FORMAT:
        remedy = "resume it with the version that wrote it"
        raise UnsupportedError(f"{folder / FILE} has format {found.get('format')}, not {FORMAT}: {remedy}")
    return found


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the names whose values differ, with dots where values are nested, each with its old and its new value."""
    found = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += [f"{name}.{change}" for change in changes(before, after)]
        elif before != after:
            found.append(f"{name} {before} → {after}")
    return found


def check_same(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise a ConflictError that names old and new values, unless a run is resumed with the settings it was started with."""
    if values := "; ".join(changes(old, new)):
        remedy = "give the old ones, or another `name`"
        if not any((folder / "checkpoints").glob("*.pt")):  # open_clip may have refused the old settings
            remedy += "; it has no checkpoint yet: if it isn't under way, remove it"
        raise ConflictError(f"{folder} can't be resumed with other settings ({values}): {remedy}")


def write_run(folder: Path, decides: Mapping[str, Any], about: Mapping[str, Any], *, finished: bool) -> None:
    """Write `tailwise.json` atomically."""
    write_json(folder / FILE, {"format": FORMAT, "decides": dict(decides), "about": dict(about), "finished": finished})
