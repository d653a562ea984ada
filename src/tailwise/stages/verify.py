"""Verify: whether a catalog's files are still what was written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tailwise.catalog.artifacts import MANIFEST
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
