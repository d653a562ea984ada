"""Streams over content of known length whose bytes are read by ranges: such as the files of a folder, one behind the other."""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path


class RangedFile(io.RawIOBase):
    """A seekable stream, for reading; a subclass says how bytes are read.

    Attributes:
        size_bytes: length of the content.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes, self._at = size_bytes, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte, as of any file."""
        self._at = max(0, offset + (0, self._at, self.size_bytes)[whence])
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """Return the next bytes: all that are asked for, up to the end."""
        stop = self.size_bytes if size is None or size < 0 else min(self._at + size, self.size_bytes)
        content = self.read_at(self._at, stop) if self._at < stop else b""
        self._at += len(content)
        return content

    def read_at(self, start: int, stop: int) -> bytes:
        """Return bytes [start, stop), which the content has; an OSError if they cannot be read."""
        raise NotImplementedError


def is_folder(path: str) -> bool:
    """Return whether a path is that of a folder that is read as one file: it ends with a slash."""
    return path.endswith("/") and "://" not in path


class FolderFile(RangedFile):
    """The files of one folder, none of those below it, for reading.

    Attributes:
        names: of the files; those of one stem follow each other, a JSON last.
        starts: first byte of each file, and the end.
    """

    def __init__(self, path: str) -> None:
        """List the folder; an OSError if it cannot be listed. Its files are opened when they are read."""
        with os.scandir(path) as entries:
            sizes = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        self.path = Path(path)
        self.names = sorted(sizes, key=lambda name: (name.split(".", 1)[0], name.endswith(".json"), name))
        self.starts = [0, *accumulate(sizes[name] for name in self.names)]
        super().__init__(self.starts[-1])

    def read_at(self, start: int, stop: int) -> bytes:
        """Return bytes [start, stop); an OSError if a file is gone or shorter than it was, or they end before."""
        if stop > self.size_bytes:
            raise OSError(f"{self.path} ends at byte {self.size_bytes:,}; bytes {start:,} … {stop:,} were wanted")
        pieces = []
        at = bisect_right(self.starts, start) - 1
        while start < stop:
            end = min(stop, self.starts[at + 1])
            if start < end:
                with (self.path / self.names[at]).open("rb", buffering=0) as stream:
                    stream.seek(start - self.starts[at])
                    piece = stream.read(end - start)
                if len(piece) < end - start:
                    raise OSError(f"{self.path / self.names[at]} is shorter than it was")
                pieces.append(piece)
                start = end
            at += 1
        return b"".join(pieces)
