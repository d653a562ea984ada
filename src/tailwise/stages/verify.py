"""Verify: whether a catalog's files are still what was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tailwise.catalog.artifacts import MANIFEST, artifact_id
from tailwise.catalog.catalog import Catalog
from tailwise.catalog.files import file_digest, read_json
from tailwise.catalog.removals import removals_folder
from tailwise.progress import Track, silent


def verify(catalog: Catalog, track: Track = silent) -> tuple[int, list[Path]]:
    """Hashes every file whose hash was noted when it was written: samples, embeddings, removals, and all files of finished artifacts.

    Returns:
        How many files were looked at, and those that are missing or changed.
    """
    noted = list(_noted(catalog))
    bad = [
        path
        for path, digest in track(noted, "hashing files", len(noted))
        if not path.exists() or file_digest(path) != digest
    ]
    return len(noted), bad


# What an artifact names among its inputs: folder of the catalog, and where in its configuration the name stands.
_NAMED = {"clusters": ("clusters", "clusters"), "clustering": ("clusters", "clusters")}
_BASES = {"base": "clusters", "extends": "drops"}
_WITHOUT = "without "


def broken_inputs(catalog: Catalog) -> list[str]:
    """What finished clusterings, drop lists and plans were made from, and is gone, or was made anew since: a line each, for people."""
    lines = []
    for kind in ("clusters", "drops", "plans"):
        for manifest in sorted((catalog.folder / kind).glob(f"*/{MANIFEST}")):
            identity = read_json(manifest)["identity"]
            for folder, expected in _inputs(catalog, identity):
                there = folder / MANIFEST
                if not there.exists() or artifact_id(read_json(there)) != expected:
                    state = "was made anew since" if there.exists() else "is missing"
                    names = (f"{path.parent.name}/{path.name}" for path in (folder, manifest.parent))
                    lines.append("{} {state}: {} was made from it".format(*names, state=state))
    return lines


def _inputs(catalog: Catalog, identity: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """Folder and hash of each artifact among the inputs."""
    for name, value in identity["inputs"].items():
        if name in _NAMED:
            kind, option = _NAMED[name]
            yield catalog.folder / kind / identity["config"][option], value
        elif name in _BASES:
            yield catalog.folder / _BASES[name] / identity["config"]["extends"], value
        elif name.startswith(_WITHOUT):
            yield catalog.drops_folder(name.removeprefix(_WITHOUT)), value


def _noted(catalog: Catalog) -> Iterator[tuple[Path, str]]:
    parts = catalog.parts()
    for part in parts:
        path = catalog.samples_path(part.number)
        yield path, _digest(path.with_suffix(".json"))
    for column in sorted((catalog.folder / "embeddings").glob("*/column.json")):
        for part in parts:
            path = column.parent / f"{part.name}.npy"
            if path.exists() or path.with_suffix(".json").exists():
                yield path, _digest(path.with_suffix(".json"))
    for folder in (removals_folder(catalog), removals_folder(catalog) / "found"):
        for marker in sorted(folder.glob("*.json")):
            yield marker.with_suffix(".npy" if folder.name == "found" else ".parquet"), _digest(marker)
    for kind in ("clusters", "scores", "matches", "neighbours", "drops", "plans"):
        for manifest in sorted((catalog.folder / kind).glob(f"*/{MANIFEST}")):
            for name, digest in read_json(manifest)["files"].items():
                yield manifest.parent / name, digest


def _digest(marker: Path) -> str:
    """What a done-marker notes; nothing equals the hash that a missing one would note."""
    return str(read_json(marker)["digest"]) if marker.exists() else f"no {marker.name}"
