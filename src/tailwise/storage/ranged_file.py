"""Streams over content of known length whose bytes are read by ranges."""

from __future__ import annotations

import io


class RangedFile(io.RawIOBase):
    """A seekable stream, for reading; a subclass says how bytes are read.

    Attributes:
        size_bytes: length of the content.
    """

    def __init__(self, size_bytes: int) -> None:
        """Begin at the first byte."""
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
