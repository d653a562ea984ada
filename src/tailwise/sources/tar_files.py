"""The tars and tables that a user names: folders, files, globs and brace patterns; tars also in `::`-joined lists, and remote."""

from __future__ import annotations

import glob
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from braceexpand import braceexpand
from fsspec.implementations.local import LocalFileSystem

from tailwise.errors import UserError
from tailwise.shards.grouping import is_harmless, split_name
from tailwise.shards.members import MemberChoice
from tailwise.shards.metadata import sidecar_path
from tailwise.shards.tar import OTHER_PACKED, PACKED, REMEDY, is_tar, without_packing
from tailwise.sources.clip_retrieval import find_partitions
from tailwise.storage.errors import RemoteError, RemoteNotFoundError
from tailwise.storage.http import is_hub
from tailwise.storage.remote import call, entry_of, filesystem, is_remote, sizes_of
from tailwise.text import is_unicode

_MAGIC = "*?[{"
_SHOWN_MISSING = 3
TABLE = ".parquet"
UNKNOWN_BYTES = -1  # size of a tar that cannot be read, or whose server does not report it
_EMBEDDINGS = ("img_emb", "text_emb", "embeddings")


class LeftOut(NamedTuple):
    """A file or folder that an import sees and does not read."""

    path: str  # its path or URL
    reason: str  # why it is not read
    remedy: str  # what to do


@dataclass
class NamedTars:
    """The tars that a source names, by path or URL; by name within each pattern."""

    tars: dict[str, int] = field(default_factory=dict)  # size in bytes, or UNKNOWN_BYTES
    failed: dict[str, str] = field(default_factory=dict)  # reason for each that cannot be read
    left_out: list[LeftOut] = field(default_factory=list)  # files that are seen and not read

    def add(self, address: str, size: int | RemoteError | None) -> bool:
        """Add one tar if it exists; return whether it does."""
        if isinstance(size, RemoteNotFoundError):
            return False
        if not is_unicode(address):
            self.left_out.append(LeftOut(ascii(address), "path is not UTF-8", "rename it"))
            return True
        if isinstance(size, RemoteError):
            self.failed.setdefault(address, size.cause)
        self.tars.setdefault(address, size if isinstance(size, int) else UNKNOWN_BYTES)
        return True


class _RemoteFiles:
    """The file system of a URL; requests are repeated where that may help."""

    def __init__(self, url: str) -> None:
        self._files = filesystem(url)[0]
        self._is_hub = is_hub(self._files)
        self.protocol = self._files.protocol
        self.unstrip_protocol = self._files.unstrip_protocol

    def isfile(self, _: str) -> bool:
        """Return True: the sizes of many files are requested together later."""
        return True

    def exists(self, path: str) -> bool:
        if self._is_hub:
            return self._entry(path) is not None
        try:
            return bool(call(self.unstrip_protocol(path), "exists"))
        except RemoteNotFoundError:
            return False

    def isdir(self, path: str) -> bool:
        if self._is_hub:
            return bool((found := self._entry(path)) and found["type"] == "directory")
        return bool(call(self.unstrip_protocol(path), "isdir"))

    def _entry(self, path: str) -> Any:  # noqa: ANN401
        """Return what the Hub lists of a name; its own `exists` and `isdir` take an error of its server for a no."""
        return entry_of(self.unstrip_protocol(path))

    def __getattr__(self, method: str) -> Any:  # noqa: ANN401  (fsspec has no types)
        return lambda path, **options: call(self.unstrip_protocol(path), method, **options)


def find_tars(source: str) -> NamedTars:
    """Return the tars that a source names.

    Some of several that are missing are a UserError; unbalanced braces, a ValueError; a folder that cannot be listed, a RemoteError.
    """
    found = NamedTars()
    patterns: list[tuple[str, bool, list[str]]] = []  # name, True if it is missing without tars, their addresses
    for piece in _pieces(source):
        files: Any = _RemoteFiles(piece) if is_remote(piece) else LocalFileSystem()
        path = filesystem(piece)[1] if is_remote(piece) else files._strip_protocol(piece)
        for pattern in expand(files, path):
            name = _unescaped(pattern)
            left_out = len(found.left_out)
            addresses = [_address(files, match) for match in _matches(files, pattern, found.left_out)]
            if is_remote(piece):
                found.left_out += _remote_embeddings(files, name)
            patterns.append((name, _is_missing(files, name) and left_out == len(found.left_out), addresses))
    addresses = [address for *_, items in patterns for address in items]
    sizes = dict(zip(remote := [address for address in addresses if is_remote(address)], sizes_of(remote), strict=True))
    sizes = {address: sizes[address] if address in sizes else Path(address).stat().st_size for address in addresses}
    there = {address: found.add(address, size) for address, size in sizes.items()}
    missing = [name for name, needed, items in patterns if needed and not any(there[address] for address in items)]
    if missing and len(missing) < len(patterns):
        shown = ", ".join(missing[:_SHOWN_MISSING]) + (", …" if len(missing) > _SHOWN_MISSING else "")
        count = f"{len(missing):,} of the {len(patterns):,} tars or patterns"
        remedy = "restore them, or name a folder or a glob (*.tar) to import the tars that are there"
        raise UserError(f"{count} in {source!r} are missing: {shown}; {remedy}")
    return found


def expand(files: Any, path: str) -> Iterator[str]:  # noqa: ANN401  (fsspec has no types)
    """Yield the globs of a path; existing folders are taken literally, even with special characters."""
    parts = path.split("/")
    at = next((at for at in range(len(parts)) if _is_pattern(files, parts, at)), len(parts))
    literal = glob.escape("/".join(parts[:at]))
    if at == len(parts):
        yield literal
        return
    for rest in braceexpand("/".join(parts[at:])):
        yield f"{literal}/{rest}" if at else rest


def _is_pattern(files: Any, parts: list[str], at: int) -> bool:  # noqa: ANN401
    return any(letter in parts[at] for letter in _MAGIC) and not files.exists("/".join(parts[: at + 1]))


def _pieces(source: str) -> list[str]:
    """Return the parts of a list joined by `::`, as in open_clip; a URL of fsspec may hold `::` too."""
    pieces = source.split("::")
    joined = len(pieces) > 1 and all(map(is_tar, pieces))
    return pieces if joined and not Path(source).exists() else [source]


def _remote_embeddings(files: Any, folder: str) -> list[LeftOut]:  # noqa: ANN401
    if "http" in str(files.protocol):
        return []
    remedy = "copy the folder to this machine and name it, to import them"
    places = [f"{folder}/{name}" for name in _EMBEDDINGS]
    there = [path for path in places if not is_tar(folder) and files.isdir(path)]
    return [LeftOut(_address(files, path), "folder of embeddings at a URL", remedy) for path in there]


def _is_missing(files: Any, name: str) -> bool:  # noqa: ANN401
    """Return whether a name is that of a tar or folder that does not exist."""
    return is_tar(name) or not (PurePosixPath(name).suffix or files.exists(name))


def _unescaped(pattern: str) -> str:
    for letter in "*?[":
        pattern = pattern.replace(f"[{letter}]", letter)
    return pattern


def _address(files: Any, match: str) -> str:  # noqa: ANN401
    if isinstance(files, LocalFileSystem):
        return os.path.abspath(match)  # noqa: PTH100  (keeps symlinks)
    return str(files.unstrip_protocol(match))


def _matches(files: Any, pattern: str, left_out: list[LeftOut]) -> list[str]:  # noqa: ANN401
    """Return the tars of one glob, sorted; a folder means the tars in it, or else those below it."""
    literal = _unescaped(pattern)
    remote_tar = isinstance(files, _RemoteFiles) and is_tar(literal)
    if not remote_tar and files.isdir(literal):
        return _in_folder(files, literal, left_out)
    has_magic = glob.escape(literal) != pattern and not files.exists(literal)
    found = sorted(files.glob(pattern)) if has_magic else [literal]
    return list(_readable(files, found, left_out))


def _in_folder(files: Any, folder: str, left_out: list[LeftOut]) -> list[str]:  # noqa: ANN401
    tars = list(_readable(files, sorted(files.glob(f"{glob.escape(folder)}/*.t*")), left_out))
    if not (tars and "http" in str(files.protocol)):  # a search below would follow all links
        below = sorted(
            path for inner in _folders(files, folder) for path in files.glob(f"{glob.escape(inner)}/**/*.t*")
        )
        if not tars:
            return list(_readable(files, below, left_out))
        others = [path for path in below if is_tar(path) and files.isfile(path)]
        remedy = "name the folder too to import them"
        left_out += [LeftOut(_address(files, path), "tar in a folder below other tars", remedy) for path in others]
    return tars


def _folders(files: Any, folder: str) -> list[str]:  # noqa: ANN401
    items = files.ls(folder, detail=True)
    folders = [item["name"].rstrip("/") for item in items if item["type"] == "directory"]
    inside, hidden = f"{folder.rstrip('/')}/", (".", "__MACOSX")
    return [name for name in folders if name.startswith(inside) and not name.removeprefix(inside).startswith(hidden)]


def _readable(files: Any, paths: Iterable[str], left_out: list[LeftOut]) -> Iterator[str]:  # noqa: ANN401
    """Yield the tars among some files; note leftovers of file managers and tars that cannot be read."""
    paths = list(paths)
    there = set(paths)
    for path in paths:
        if is_tar(path) and files.isfile(path):
            if is_harmless(path):
                left_out.append(LeftOut(_address(files, path), "leftover of macOS", "nothing to do"))
            elif (unpacked := without_packing(path)) != path and unpacked in there:
                left_out.append(
                    LeftOut(_address(files, path), "compressed tar beside the unpacked one", "nothing to do")
                )
            else:
                yield path
        elif path.endswith(OTHER_PACKED) and files.isfile(path):
            left_out.append(LeftOut(_address(files, path), "compressed tar", f"{REMEDY} it"))


def find_tables(source: str, suffix: str = TABLE) -> list[Path]:
    """Return the files of a suffix in a local folder, file, glob or brace pattern, by name; without sidecars of tars.

    Of a folder, these are the files in it, or else those anywhere below. Hidden folders and clip-retrieval's layout are left out.
    """
    if "://" in source:
        return []
    path = Path(source).expanduser().absolute()
    if path.is_dir():
        beside = [item for item in path.glob(f"*{suffix}") if not _is_sidecar(item)]
        found = _tables_in(path, beside) or _tables_in(path, path.rglob(f"*{suffix}"))
    elif path.exists():
        found = [path]
    else:
        matches = {pattern: glob.glob(pattern) for pattern in expand(LocalFileSystem(), str(path))}  # noqa: PTH207  (Path globs are relative)
        missing = [pattern for pattern, names in matches.items() if not names and pattern.endswith(suffix)]
        if missing and len(missing) < len(matches):
            count = f"{len(missing):,} of {len(matches):,} files or patterns"
            raise UserError(f"{count} in {source!r} are missing, first {missing[0]}: restore them")
        found = [Path(name) for names in matches.values() for name in names]
    tables = sorted({item for item in found if item.suffix == suffix and item.is_file()}, key=str)
    return [item for item in tables if not _is_sidecar(item)]


def find_folders(folder: Path, choice: MemberChoice) -> list[str]:
    """Return the folders, this one or some below it, with images and captions as files of one name; none if there are tars beside."""
    found = []
    for name, below, files in os.walk(folder):
        if any(map(is_tar, files)):
            return []
        below[:] = sorted(item for item in below if not item.startswith((".", "__MACOSX")))
        stems: defaultdict[str, int] = defaultdict(int)
        for file in files:
            stem, extension = split_name(file)
            stems[stem] |= choice.halves.get(extension, 0)
        if any(halves == 3 for halves in stems.values()):
            found.append(f"{name.rstrip('/')}/")
    return found


def find_remote_tables(url: str) -> NamedTars:
    """Return the Parquet files that a URL names: a folder, file, glob or brace pattern; without sidecars of tars."""
    files: Any = _RemoteFiles(url)
    addresses: list[str] = []
    for pattern in expand(files, filesystem(url)[1]):
        name = _unescaped(pattern)
        suffix = PurePosixPath(name).suffix
        if suffix == TABLE and glob.escape(name) == pattern:
            addresses.append(_address(files, name))
        elif suffix in {"", TABLE} and (suffix or files.isdir(name)):
            beside = sorted(files.glob(pattern if suffix else f"{glob.escape(name)}/*"))
            sidecars = {sidecar_path(path) for path in beside if is_tar(path)}
            tables = [path for path in beside if path.endswith(TABLE) and path not in sidecars]
            addresses += [_address(files, path) for path in tables]
    found = NamedTars()
    missing = [name for name, size in zip(addresses, sizes_of(addresses), strict=True) if not found.add(name, size)]
    if missing and found.tars:
        count = f"{len(missing):,} of {len(addresses):,} Parquet files of {url!r}"
        raise UserError(f"{count} are missing, first {missing[0]}: restore them, or name a folder or a glob")
    return found


def _is_sidecar(table: Path) -> bool:
    return any(table.with_suffix(ending).exists() for ending in (".tar", *PACKED))


def _tables_in(folder: Path, items: Iterable[Path]) -> list[Path]:
    tables: list[Path] = []
    laid_out: dict[Path, bool] = {}
    for item in items:
        inside = item.relative_to(folder).parts[:-1]
        if any(part.startswith(".") for part in inside):
            continue
        home = item.parent.parent if item.parent.name == "metadata" else item.parent
        if home not in laid_out:
            laid_out[home] = bool(find_partitions(home))
        if not laid_out[home]:
            tables.append(item)
    return tables
