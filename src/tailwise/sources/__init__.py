"""What users have: folders of tars and of embeddings. `find` tells which is which."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
from braceexpand import braceexpand
from fsspec.implementations.local import LocalFileSystem

from tailwise.errors import UserError
from tailwise.sources.clip_retrieval import Partition, find_partitions


@dataclass
class Found:
    """What the sources of one import hold.

    Attributes:
        tars: path or URL and size in bytes of each tar, each once, in the order of the sources, by name within one.
        embeddings: partitions by column ("image", "text").
    """

    tars: dict[str, int] = field(default_factory=dict)
    embeddings: dict[str, list[Partition]] = field(default_factory=dict)


def _find_tars(source: str, found: Found) -> bool:
    """Adds the tars that a folder, file, glob or brace pattern names; says whether there were any."""
    before = len(found.tars)
    names = [source] if Path(source).exists() else braceexpand(source)
    for name in names:
        filesystem, path = fsspec.core.url_to_fs(name)
        if filesystem.isdir(path):
            inside = glob.escape(path)
            matches = filesystem.glob(f"{inside}/*.tar") or filesystem.glob(f"{inside}/**/*.tar")
        else:
            pattern = any(letter in path for letter in "*?[") and not filesystem.exists(path)
            matches = filesystem.glob(path) if pattern else [path]
        for match in sorted(match for match in matches if match.endswith(".tar") and filesystem.isfile(match)):
            local = isinstance(filesystem, LocalFileSystem)
            address = os.path.abspath(match) if local else filesystem.unstrip_protocol(match)  # noqa: PTH100 (keeps symlinks)
            found.tars.setdefault(address, int(filesystem.size(match)))
    return len(found.tars) > before


def _find_clip_retrieval(source: str, found: Found) -> bool:
    if "://" in source:
        return False
    columns = find_partitions(Path(source).expanduser().absolute())
    for column, partitions in columns.items():
        found.embeddings.setdefault(column, []).extend(partitions)
    return bool(columns)


SOURCES: dict[str, tuple[Callable[[str, Found], bool], str]] = {
    "webdataset": (_find_tars, "a folder, file, glob or {brace..pattern} of .tar files; local or any fsspec URL"),
    "clip-retrieval": (_find_clip_retrieval, "a local folder with img_emb/ or text_emb/, and metadata/"),
}


def find(sources: Sequence[str], format_name: str = "auto") -> Found:
    """Looks through the sources of an import.

    Args:
        sources: folders, files, patterns or URLs.
        format_name: a name of SOURCES, or "auto" to try all.

    Raises:
        UserError: unknown format, or a source that holds nothing of it.
    """
    if format_name != "auto" and format_name not in SOURCES:
        raise UserError(f"unknown format {format_name!r}: use auto, {', '.join(SOURCES)}")
    tried = list(SOURCES) if format_name == "auto" else [format_name]
    found = Found()
    for source in sources:
        known = set(found.tars)
        try:
            finds = [SOURCES[name][0](source, found) for name in tried]
        except (ValueError, ImportError) as error:  # unbalanced braces, unknown protocol, a file system not installed
            raise UserError(f"can't look into {source!r}: {error}") from error
        if not any(finds) and not _only_known(source, tried, known):
            expected = "; ".join(f"{name}: {SOURCES[name][1]}" for name in tried)
            raise UserError(f"nothing to import in {source!r} ({expected})")
    return found


def _only_known(source: str, tried: Sequence[str], known: set[str]) -> bool:
    """Whether a source holds tars after all, but only such as earlier sources named."""
    again = Found()
    return "webdataset" in tried and _find_tars(source, again) and set(again.tars) <= known
