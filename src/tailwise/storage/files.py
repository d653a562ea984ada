"""Files opened for reading, local or remote."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import BinaryIO, cast

from fsspec.spec import AbstractBufferedFile

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
    A file that cannot be read, now or later, is an OSError, and a RemoteError if it is remote.
    """
    if not is_remote(path):
        return local_file(path).open("rb", buffering=BUFFER_BYTES)
    try:
        return cast("BinaryIO", RemoteFile(path))
    except NoRangesError:
        return _downloaded(path)


def open_whole(path: str) -> BinaryIO:
    """Return a file to be read more than once, as `open_binary`: a remote one is downloaded first, as far as the disk has room."""
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


class RemoteFile(AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
    """A remote file, read in blocks; holds one of them."""

    def __init__(self, url: str) -> None:
        """Ask for the size and the first bytes; a NoRangesError if its server only sends the whole file, or states no size."""
        first = read_range(url, 0, FIRST_BYTES)
        size = len(first.content) if len(first.content) < FIRST_BYTES else first.total_bytes
        size = size_of(url) if size is None else size
        if size is None:
            raise NoRangesError(url, "its server does not state its size")
        super().__init__(None, url, block_size=BLOCK_BYTES, size=size)
        self.cache.cache, self.cache.end = first.content, len(first.content)

    def _fetch_range(self, start: int, end: int) -> bytes:
        return read_range(self.path, start, end, self.size).content
