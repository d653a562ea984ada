"""Files opened for reading, local or remote."""

from __future__ import annotations

import shutil
import tempfile
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, cast

from tailwise.storage.errors import NoRangesError
from tailwise.storage.ranged_file import FolderFile, RangedFile, is_folder
from tailwise.storage.remote import download, is_remote, read_range, size_of
from tailwise.storage.spans import LinkEstimate, Span, Spans, coalesce

BUFFER_BYTES = 1 << 14  # of a local file: the header after a small member of a tar comes along
FIRST_BYTES = 1 << 16  # a small file comes whole with the first request
BLOCK_BYTES, BLOCK_GROWTH = 8 << 20, 8
KEPT_BYTES = 256 << 20  # of one remote file
CONNECTIONS = 8  # of one remote file
_LINKS: defaultdict[str, LinkEstimate] = defaultdict(LinkEstimate)  # by host
FREE_BYTES = 1 << 30  # of the temporary folder, that a download leaves


def local_file(path: str) -> Path:
    """Return the local file that a path or a file:// URL names."""
    return Path(path.split("://", 1)[-1]).expanduser()


def open_binary(path: str) -> BinaryIO:
    """Return a local path or any fsspec URL opened for reading, seekable, for the caller to close; of a folder, its files as one.

    A remote file whose server ignores requests for ranges is downloaded to a temporary file first, which is gone when it is closed.
    A file that cannot be read, now or later, is an OSError, and a RemoteError if it is remote.
    """
    if is_folder(path):
        return cast("BinaryIO", FolderFile(path))
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


class RemoteFile(RangedFile):
    """A remote file; holds one block of it, and what it is to keep.

    Where a read begins soon behind the block, the next block is larger, up to BLOCK_BYTES. Where it begins so far behind that the bytes
    between take longer than a request, they are not read, and the next block is small.
    """

    def __init__(self, url: str) -> None:
        """Ask for the size and the first bytes; a NoRangesError if its server only sends the whole file, or states no size."""
        first = read_range(url, 0, FIRST_BYTES)
        size = len(first.content) if len(first.content) < FIRST_BYTES else first.total_bytes
        size = size_of(url) if size is None else size
        if size is None:
            raise NoRangesError(url, "its server does not state its size")
        super().__init__(size)
        self._url = url
        self._link = _LINKS[url.split("/", 3)[2]]
        self._start, self._content, self._block_bytes = 0, first.content, FIRST_BYTES
        self._kept: dict[int, bytes] = {}
        self._kept_bytes = 0
        self._spans: Callable[[], Iterable[Span]] = lambda: ()

    def keep(self, spans: Callable[[], Iterable[Span]]) -> None:
        """Keep some spans for later reads, up to KEPT_BYTES; `spans` yields those that are known since its last call.

        It is called when a block is replaced, which holds them.
        """
        self._spans = spans

    def fetch(self, spans: Iterable[Span]) -> None:
        """Fetch spans that will be read soon, and keep them, up to KEPT_BYTES; several at a time, near ones with one request."""
        wanted = sorted(spans)
        starts = [start for start, _ in wanted]
        pieces = coalesce(wanted, self._link.request_bytes, BLOCK_BYTES, Spans(()))
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            for first in range(0, len(pieces), CONNECTIONS):
                group = pieces[first : first + CONNECTIONS]
                for (start, stop), content in zip(group, pool.map(lambda piece: self._get(*piece), group), strict=True):
                    mine = wanted[bisect_left(starts, start) : bisect_left(starts, stop)]
                    self._keep(mine, start, content)

    def _keep(self, spans: Iterable[Span], start: int, content: bytes) -> None:
        """Keep spans that lie in some content, which begins at `start`."""
        for span in spans:
            if start <= span[0] and span[1] <= start + len(content) and self._kept_bytes < KEPT_BYTES:
                self._kept[span[0]] = content[span[0] - start : span[1] - start]
                self._kept_bytes += span[1] - span[0]

    def read_at(self, start: int, stop: int) -> bytes:
        """Return bytes [start, stop), which the file has; a RemoteError if they cannot be read."""
        if len(kept := self._kept.get(start, b"")) >= stop - start:
            return kept[: stop - start]
        end = self._start + len(self._content)
        if not self._start <= start <= stop <= end:
            self._keep(self._spans(), self._start, self._content)
            near = self._start <= start <= end + self._link.request_bytes
            self._block_bytes = min(BLOCK_GROWTH * self._block_bytes, BLOCK_BYTES) if near else FIRST_BYTES
            there = self._content[start - self._start :] if self._start <= start < end else b""
            more = self._get(start + len(there), min(max(stop, start + self._block_bytes), self.size_bytes))
            self._start, self._content = start, there + more
        return self._content[start - self._start : stop - self._start]

    def _get(self, start: int, stop: int) -> bytes:
        found = read_range(self._url, start, stop, self.size_bytes)
        if found.seconds:
            self._link.observe(len(found.content), found.seconds)
        return found.content
