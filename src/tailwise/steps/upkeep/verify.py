"""Verify: whether a catalog's files are still what was written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tailwise.catalog import layout
from tailwise.catalog.artifacts import artifact_id, finished_folder
from tailwise.catalog.catalog import SERIES, Catalog
from tailwise.catalog.embeddings import column_records
from tailwise.catalog.files import file_digest, read_record
from tailwise.catalog.kinds import KINDS, named_inputs
from tailwise.catalog.removals import found_markers, names_path
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.base import KERNEL, Apply
from tailwise.storage.store_path import stored


def verify(catalog: Catalog, context: Context | None = None) -> tuple[int, list[Path]]:
    """Checks every file that decides results: by the hash that was noted when it was written, or that it holds itself.

    Returns:
        How many files were looked at, and those that are missing or changed.

    Raises:
        UserError: a file that lists the expected files is missing or changed.
    """
    context = context or Context()
    for name in SERIES:
        catalog.series(name).read()
    noted = list(_noted(catalog))
    sound = context.progress(context.executor.map(Apply(_is_sound), noted, KERNEL), "hashing files", len(noted))
    return len(noted), [path for (path, _), good in zip(noted, sound, strict=True) if not good]


def _is_sound(noted: tuple[Path, str | None]) -> bool:
    path, digest = noted
    if not path.exists():
        return False
    if digest is not None:
        if (place := stored(path)) is not None:
            place.store.drop_copy(place.key)  # what is stored counts
        return file_digest(path) == digest
    try:
        read_record(path)
    except UserError:
        return False
    return True


def broken_inputs(catalog: Catalog) -> list[str]:
    """Return the inputs of finished artifacts that are missing or were replaced since: one line each, for people."""
    lines = []
    for kind in (kind for kind in KINDS if kind.made_by):  # others have a hash as their name: an old one may stay
        for manifest in kind.manifests(catalog.folder):
            for used, its_name, expected in named_inputs(_manifest(manifest)["identity"]):
                there = used.path(catalog.folder, its_name) / layout.MANIFEST
                if not there.exists() or artifact_id(_manifest(there)) != expected:
                    state = "was rebuilt since" if there.exists() else "is missing"
                    lines.append(
                        f"{used.folder}/{its_name} {state}: {kind.folder}/{manifest.parent.name} was made from it"
                    )
    return lines


def _noted(catalog: Catalog) -> Iterator[tuple[Path, str | None]]:
    """All files and their hashes; None for records, which hold their own."""
    yield catalog.folder / layout.HEADER, None
    if (members := catalog.folder / layout.MEMBERS).exists():
        yield members, None
    parts = catalog.parts()
    for part in parts:
        yield from _marked(catalog.samples_path(part.number))
    for column in column_records(catalog):
        yield column, None
        if (joins := column.with_name(layout.JOINS)).exists():
            yield joins, None
        for part in parts:
            path = catalog.embedding_path(column.parent.name, part)
            if path.exists() or layout.marker(path).exists():
                yield from _marked(path)
    for removal in catalog.series(layout.REMOVALS).read():
        yield names_path(catalog, removal["number"]), removal["digest"]
    for marker in found_markers(catalog):
        yield from _marked(marker.with_suffix(layout.ARRAY))
    for kind in KINDS:
        for manifest in kind.manifests(catalog.folder):
            yield manifest, None
            noted = _manifest(manifest)
            folder = finished_folder(manifest.parent, noted["identity"])
            yield from ((folder / name, digest) for name, digest in noted["files"].items())


def _manifest(path: Path) -> dict[str, Any]:
    """Return a manifest; an empty one if it is damaged, which `verify` reports."""
    try:
        return read_record(path)
    except UserError:
        return {"identity": {"inputs": {}}, "files": {}}


def _marked(path: Path) -> Iterator[tuple[Path, str | None]]:
    """A file and its marker; nothing equals the hash that a missing or damaged one would note."""
    marker = layout.marker(path)
    yield marker, None
    try:
        yield path, str(read_record(marker)["digest"]) if marker.exists() else f"no {marker.name}"
    except UserError:
        yield path, f"no sound {marker.name}"
