"""Files opened for reading, local or remote."""

from __future__ import annotations

import io
import shutil
import tempfile
from pathlib import Path
from typing import BinaryIO, cast

from tailwise.storage.errors import NoRangesError
from tailwise.storage.remote import download, is_remote, read_range, size_of

BUFFER_BYTES = 1 << 14  # of a local file: the header after a small member of a tar comes along
FIRST_BYTES = 1 << 16  # a small file comes whole with the first request
BLOCK_BYTES = 8 << 20
FREE_BYTES = 1 << 30  # of the temporary folder, that a download leaves


def local_file(path: str) -> Path:
    """Return the local file that a path or a file:// URL names."""
    return Path(path.split("://", 1)[-1]).expanduser()


def open_binary(path: str) -> BinaryIO:
    """Return a local path or any fsspec URL opened for reading, seekable, for the caller to close.

    A remote file whose server ignores requests for ranges is downloaded to a temporary file first, which is gone when it is closed.

    Raises:
        RemoteError: a remote file cannot be read, now or later.
        OSError: a local one cannot be.
    """
    if not is_remote(path):
        return local_file(path).open("rb", buffering=BUFFER_BYTES)
    try:
        return cast("BinaryIO", RemoteFile(path))
    except NoRangesError:
        return _downloaded(path)


def open_whole(path: str) -> BinaryIO:
    """Return a file to be read more than once, for the caller to close: a remote one is downloaded to a temporary file.

    Raises:
        RemoteError: a remote file cannot be read, or is larger than what the disk has room for.
        OSError: a local one cannot be read.
    """
    return _downloaded(path) if is_remote(path) else open_binary(path)


def _downloaded(url: str) -> BinaryIO:
    stream = tempfile.TemporaryFile()  # noqa: SIM115  (the caller closes it)
    try:
        download(url, stream, max(0, shutil.disk_usage(tempfile.gettempdir()).free - FREE_BYTES))
        stream.seek(0)
    except BaseException:
        stream.close()
        raise
    return cast("BinaryIO", stream)


class RemoteFile(io.RawIOBase):
    """A remote file, read in blocks; holds one of them."""

    def __init__(self, url: str) -> None:
        """Ask for the size and the first bytes.

        Raises:
            NoRangesError: its server can only send the whole file, or does not state its size.
            RemoteError: it cannot be read.
        """
        super().__init__()
        self._url, self._at = url, 0
        first = read_range(url, 0, FIRST_BYTES)
        size = len(first.content) if len(first.content) < FIRST_BYTES else first.total_bytes
        size = size_of(url) if size is None else size
        if size is None:
            raise NoRangesError(url, "its server does not state its size")
        self._size_bytes, self._start, self._block = size, 0, first.content

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position; nothing is requested."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size_bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"position {base + offset}: must be at least 0")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer, as far as the file goes.

        Raises:
            RemoteError: the bytes cannot be read.
        """
        start, stop = self._at, min(self._at + len(buffer), self._size_bytes)
        if start >= stop:
            return 0
        if not self._start <= start < stop <= self._start + len(self._block):
            end = min(max(stop, start + BLOCK_BYTES), self._size_bytes)
            self._block = read_range(self._url, start, end, self._size_bytes).content
            self._start = start
        found = self._block[start - self._start : stop - self._start]
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)
