"""Verify: whether a catalog's files are still what was written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tailwise.catalog.artifacts import MANIFEST
from tailwise.catalog.catalog import Catalog
from tailwise.catalog.files import file_digest, read_json
from tailwise.progress import Track, silent


def verify(catalog: Catalog, track: Track = silent) -> tuple[int, list[Path]]:
    """Hashes every file whose hash was noted when it was written: samples, embeddings, and all files of finished artifacts.

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
    for part in catalog.parts():
        path = catalog.samples_path(part.number)
        yield path, read_json(path.with_suffix(".json"))["digest"]
    for marker in sorted((catalog.folder / "embeddings").glob("*/part-*.json")):
        yield marker.with_suffix(".npy"), read_json(marker)["digest"]
    for kind in ("clusters", "plans"):
        for manifest in sorted((catalog.folder / kind).glob(f"*/{MANIFEST}")):
            for name, digest in read_json(manifest)["files"].items():
                yield manifest.parent / name, digest
