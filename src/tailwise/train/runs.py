"""A run's folder, and `tailwise.json` in it: what decided the run, so that it is resumed with that and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tailwise.catalog.files import read_json, write_json
from tailwise.errors import ConflictError, UnsupportedError, UserError

FILE = "tailwise.json"
FORMAT = 1


def read_run(folder: Path) -> dict[str, Any] | None:
    """What `tailwise.json` says: {"format", "decides": {…}, "finished", …}; None if there is no run.

    Raises:
        UserError: there is a run that isn't ours, or one of another version.
    """
    if not (folder / FILE).exists():
        if (folder / "out.log").exists() or (folder / "checkpoints").exists():
            raise UserError(f"{folder} is a run that `tailwise train` did not start: give another `name`")
        return None
    found: dict[str, Any] = read_json(folder / FILE)
    if found.get("format") != FORMAT:
        raise UnsupportedError(
            f"{folder / FILE} has format {found.get('format')}, not {FORMAT}: resume it with the version that wrote it"
        )
    return found


def check_same(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Checks that a run is resumed with what it was begun with.

    Raises:
        UserError: something differs; names old and new values.
    """
    # A run that ended at once, by a mistake that only open_clip found, say.
    nothing = (
        ""
        if any((folder / "checkpoints").glob("*.pt"))
        else "; it has no checkpoint yet: if it isn't under way, remove it"
    )
    changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if changed:
        told = "; ".join(f"{name} {old.get(name)} → {new.get(name)}" for name in changed)
        raise ConflictError(
            f"{folder} can't be resumed with other settings ({told}): give the old ones, or another `name`{nothing}"
        )


def write_run(folder: Path, decides: Mapping[str, Any], about: Mapping[str, Any], *, finished: bool) -> None:
    """Writes `tailwise.json`, atomically."""
    write_json(folder / FILE, {"format": FORMAT, "decides": dict(decides), "about": dict(about), "finished": finished})
