"""Artifacts: folders that are made once, named by what they were made from, and finished by a manifest written last."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tailwise.catalog.files import digest, file_digest, read_json, write_json
from tailwise.errors import UserError

MANIFEST = "manifest.json"
PENDING = "pending.json"


class Artifact:
    """One folder of a catalog, made by one stage from a configuration and inputs.

    While it is being made it holds `pending.json`, so that a rerun with the same configuration goes on with the files that are
    there and a rerun with another one starts afresh. `finish` writes `manifest.json` last: with it, the artifact is never
    changed again.
    """

    def __init__(self, folder: Path, kind: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
        """Opens or begins the artifact.

        Args:
            folder: where it lies.
            kind: what it is, e.g. "clusters".
            config: all that decides its content, as JSON values.
            inputs: name and hash of each thing it is made from.

        Raises:
            UserError: a finished artifact of other settings or inputs has this name already.
        """
        self.folder = folder
        self.identity: dict[str, Any] = {"kind": kind, "config": dict(config), "inputs": dict(inputs)}
        if (folder / MANIFEST).exists():
            self._refuse_other(read_json(folder / MANIFEST)["identity"])
        elif not self._resumable():
            shutil.rmtree(folder, ignore_errors=True)
            write_json(folder / PENDING, self.identity)

    def _resumable(self) -> bool:
        pending = self.folder / PENDING
        return pending.exists() and read_json(pending) == self.identity

    def _refuse_other(self, existing: dict[str, Any]) -> None:
        if existing == self.identity:
            return
        changes = []
        for section in ("config", "inputs"):
            old, new = existing[section], self.identity[section]
            names = sorted({*old, *new})
            changes += [
                f"{name} {old.get(name)!r} → {new.get(name)!r}" for name in names if old.get(name) != new.get(name)
            ]
        raise UserError(
            f"{self.folder} exists with other settings ({', '.join(changes)}): choose another name, or delete that folder to make it anew"
        )

    @property
    def done(self) -> bool:
        """Whether the manifest is there."""
        return (self.folder / MANIFEST).exists()

    def path(self, name: str) -> Path:
        """The path of one file of the artifact."""
        return self.folder / name

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes the manifest: identity, the hash of every file, and `summary` (figures for people)."""
        names = sorted(
            path.name for path in self.folder.iterdir() if path.is_file() and path.name not in {MANIFEST, PENDING}
        )
        files = {name: file_digest(self.folder / name) for name in names}
        write_json(self.folder / MANIFEST, {"identity": self.identity, "files": files, "summary": dict(summary)})
        (self.folder / PENDING).unlink()


def read_manifest(folder: Path, what: str, remedy: str) -> dict[str, Any]:
    """The manifest of a finished artifact.

    Raises:
        UserError: there is none; names the artifacts that are there, and the remedy.
    """
    if (folder / MANIFEST).exists():
        manifest: dict[str, Any] = read_json(folder / MANIFEST)
        return manifest
    there = finished(folder.parent)
    raise UserError(f"no {what} named {folder.name!r} (there: {', '.join(there) or 'none'}): {remedy}")


def finished(folder: Path) -> list[str]:
    """The names of the finished artifacts in a folder, sorted."""
    return sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))


def artifact_id(manifest: Mapping[str, Any]) -> str:
    """The hash that stands for a finished artifact among the inputs of another."""
    return digest([manifest["identity"], manifest["files"]])
