"""Paths in object stores, with those methods of `pathlib.Path` that a catalog uses.

A path is its URL alone: it may be pickled, and means the same on every node. Libraries that read a path get that of a whole copy in a cache
of the node (`os.fspath`). What `pathlib.Path` can do and this class cannot is an AttributeError, never a file of this machine.
"""

from __future__ import annotations

import io
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fnmatch import fnmatchcase
from hashlib import blake2b
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, Any, NamedTuple, cast

from tailwise.errors import UnsupportedError, UserError
from tailwise.storage.object_store import ForkedStore, ObjectStore, forked
from tailwise.storage.store import THREADS, Head

SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl")
CACHE, CACHE_BYTES = "TAILWISE_CACHE", "TAILWISE_CACHE_BYTES"  # environment variables
DEFAULT_CACHE_BYTES = 50_000_000_000
WILD = re.compile(r"[*?\[]")
_settled: dict[StorePath, Head] = {}  # files that never change


class Status(NamedTuple):
    """Attributes of a file, as of `os.stat_result`; the etag stands for its inode."""

    st_dev: int
    st_ino: int
    st_size: int
    st_mtime_ns: int


def cache_folder() -> Path:
    """Return the folder of the node for copies of files; all processes of a user share it."""
    given = os.environ.get(CACHE)
    return Path(given).expanduser().absolute() if given else private_folder("tailwise-files", CACHE)


def private_folder(name: str, option: str) -> Path:
    """Return a folder of this user among the temporary files; a UserError, which names the option, if other users can write to it."""
    folder = Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise UserError(f"{folder} can be written to by others: remove it, or name a cache folder ({option})")
    return folder


def _cache_bytes() -> int:
    text = os.environ.get(CACHE_BYTES, str(DEFAULT_CACHE_BYTES))
    with suppress(ValueError):
        if (size := int(float(text))) > 0:
            return size
    raise UserError(f"the environment variable {CACHE_BYTES} is {text!r}: give a number of bytes above 0, such as 50e9")


def path_of(folder: str | Path) -> Path:
    """Return the path of a folder: absolute, if it is local; of the same methods, if it is a URL of an object store.

    Raises:
        UnsupportedError: it is another URL.
    """
    if not isinstance(folder, str) and is_stored(folder):
        return folder
    if "://" not in str(folder):
        return Path(folder).expanduser().absolute()
    scheme, _, rest = str(folder).partition("://")
    if scheme not in SCHEMES or not rest.strip("/") or "?" in rest:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise UnsupportedError(f"{folder} is no place for a catalog: give a local folder, or a URL of {known}")
    if ":" in rest.split("/")[0]:
        raise UnsupportedError(f"{folder}: give credentials by environment variables, not in the URL")
    return cast("Path", StorePath(str(folder)))


class StorePath(PurePosixPath):
    """A file or folder of an object store. Folders need not be made, and are gone with their last file."""

    head: Head | None = None  # what a listing, or a request, has just said of the file
    listed = False  # True if that is known: there is none without a `head`

    def __str__(self) -> str:
        return f"{self.parts[0]}//{'/'.join(self.parts[1:])}"

    def __fspath__(self) -> str:
        """Return the path of a copy in the cache of this node."""
        state = self._state()
        kept = None if state is None else self._bucket.kept(self.key, state)
        return os.fspath(kept or self.store.local_path(self.key, state))

    @property
    def _bucket(self) -> ObjectStore:
        return ObjectStore("//".join(self.parts[:2]), cache_folder(), _cache_bytes())

    def as_store(self) -> ObjectStore:
        """Return the store of the files in this folder."""
        store = ObjectStore(str(self), cache_folder(), _cache_bytes())
        return cast("ObjectStore", ForkedStore(store)) if forked() else store

    @property
    def store(self) -> ObjectStore:
        """The store of the bucket."""
        return cast("ObjectStore", ForkedStore(self._bucket)) if forked() else self._bucket

    @property
    def key(self) -> str:
        """Key in the bucket."""
        return "/".join(self.parts[2:])

    def _state(self) -> Head | None:
        return self.head or _settled.get(self)

    def _looked_up(self) -> Head:
        if (head := self._state() or self.store.head(self.key)) is None:
            raise FileNotFoundError(2, os.strerror(2), str(self))
        return head

    def settle(self) -> None:
        """Note that the file never changes from now on: this process asks for its state once."""
        with suppress(FileNotFoundError):
            _settled[self] = self._looked_up()

    # --- methods of pathlib.Path --------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Return True if there is such a file. Folders do not count."""
        return self._state() is not None or (not self.listed and self.store.head(self.key) is not None)

    is_file = exists

    def is_dir(self) -> bool:
        """Return True if there is anything in the folder."""
        return any(True for _ in self.iterdir())

    def stat(self) -> Status:
        """Return size and identity of the file."""
        head = self._looked_up()
        inode = int.from_bytes(blake2b(head.etag.encode(), digest_size=7).digest(), "little")
        return Status(0, inode, head.size, 0)

    def read_bytes(self) -> bytes:
        """Return the bytes of the file."""
        return self.store.get(self.key)

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return the text of the file."""
        return self.read_bytes().decode(encoding)

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of ranges [start, stop) of the file, without the rest of it."""
        return self.store.get_ranges(self.key, ranges, self._state())

    def write_bytes(self, content: bytes) -> int:
        """Write the file."""
        self.store.put(self.key, content)
        return len(content)

    def open(self, mode: str = "r", buffering: int = -1, encoding: str | None = None) -> IO[Any]:
        """Return a copy opened for reading, or a file that is uploaded when it is closed."""
        if mode in ("r", "rb"):
            return open(self, mode, buffering, encoding)  # noqa: PTH123  (a copy)
        if mode == "wb":
            return cast("IO[bytes]", _Upload(self))
        raise UnsupportedError(f"{self} can't be opened as {mode!r}: only 'r', 'rb' and 'wb' work in an object store")

    def upload(self, copy: Path) -> None:
        """Write the bytes of a file of this machine, which is used up."""
        head = self.store.put_file(self.key, copy)
        if self in _settled:
            _settled[self] = head

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the file."""
        if not missing_ok:
            self._looked_up()
        self.store.delete(self.key)
        _settled.pop(self, None)

    def remove(self) -> None:
        """Remove all that is in the folder."""
        self.store.delete_folder(self.key)
        for path in [path for path in _settled if self in path.parents]:
            del _settled[path]

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing."""

    def iterdir(self) -> Iterator[StorePath]:
        """Yield the folders and the files of a folder."""
        folders, files = self.store.entries(self.key)
        for key in folders:
            yield self / PurePosixPath(key).name
        for key, head in files.items():
            yield (self / PurePosixPath(key).name).known(head)

    def known(self, head: Head | None) -> StorePath:
        """Return the same path, with the state of its file; None if there is none."""
        path = StorePath(*self.parts)
        path.head, path.listed = head, True
        return path

    def glob(self, pattern: str) -> Iterator[StorePath]:
        """Yield the paths that match a pattern, which has no `**`."""
        first, _, rest = pattern.partition("/")
        if not WILD.search(first):
            found = [self / first] if rest or (self / first).exists() else []
        else:
            found = [path for path in self.iterdir() if fnmatchcase(path.name, first)]
        if not rest:
            yield from found
            return
        with ThreadPoolExecutor(THREADS) as pool:
            for paths in pool.map(lambda path: list(path.glob(rest)), found):
                yield from paths


class _Upload(io.BufferedWriter):
    """A file of this machine, which is uploaded when it is closed, unless the `with` block that it leaves has failed."""

    def __init__(self, target: StorePath) -> None:
        self._target, self._copy = target, target.store.new_copy()
        super().__init__(io.FileIO(self._copy, "w"))

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._target.upload(self._copy)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            super().close()
            self._copy.unlink()

    def __del__(self) -> None:
        """Upload nothing that was not closed."""


def stored(path: PurePath) -> StorePath | None:
    """Return a path if it is in an object store."""
    return path if isinstance(path, StorePath) else None


def is_stored(path: PurePath) -> bool:
    """Return True if a path is in an object store."""
    return isinstance(path, StorePath)


def looked_up(paths: Sequence[Path]) -> list[Path]:
    """Return the same paths. Those in an object store know what a listing of their folders says of their files."""
    if not all(map(is_stored, paths)):
        return list(paths)
    found = cast("Sequence[StorePath]", paths)
    heads = {path: path.head for folder in {path.parent for path in found} for path in folder.iterdir()}
    return [cast("Path", path.known(heads.get(path))) for path in found]


def with_state(path: Path) -> Path:
    """Return the same path. One in an object store knows the state of its file now, if it exists: one request for all that follow."""
    place = stored(path)
    if place is None or place.listed:
        return path
    return cast("Path", place.known(_settled.get(place) or place.store.head(place.key)))


def is_settled(path: Path) -> bool:
    """Return True for a file that is known never to change."""
    return stored(path) in _settled


def settle(path: Path) -> None:
    """Note that a file never changes: see `StorePath.settle`."""
    if place := stored(path):
        place.settle()
