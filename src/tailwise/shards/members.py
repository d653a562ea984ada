"""Members of a tar read from front to end, in bounded memory whatever the tar holds; gzip and bzip2 are unpacked on the way."""

from __future__ import annotations

import bz2
import gzip
import io
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO, NamedTuple, cast

MOST_HEADER_BYTES = 1 << 20  # of a member: its name and pax records
MOST_PACKED_BYTES = 1 << 27  # of a member of a compressed tar
_PACKED: dict[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open}
_UNSUPPORTED = {b"\xfd7zXZ\0": "xz", b"(\xb5/\xfd": "zstd"}  # their dictionaries alone may take gigabytes


class TarContentError(ValueError):
    """A tar that cannot be read within bounds."""


class StreamedMember(NamedTuple):
    """One regular file of a tar.

    Attributes:
        name: its path in the tar.
        size_bytes: of its content.
        read: returns the content; to be called before the next member.
    """

    name: str
    size_bytes: int
    read: Callable[[], bytes]


def stream_members(stream: BinaryIO) -> Iterator[StreamedMember]:
    """Yield the regular files of a tar, in order.

    Raises:
        TarContentError: the headers of a member are too long, the tar is compressed and a member is too long, or the compression is not
            supported.
    """
    unpacked, packed = _unpacked(stream)
    bounded = _Bounded(unpacked, MOST_HEADER_BYTES)
    with tarfile.open(fileobj=cast("Any", bounded), mode="r|") as tar:
        while (info := tar.next()) is not None:
            cast("Any", tar).members = []  # which would grow with each member
            bounded.left = info.size + MOST_HEADER_BYTES
            if (
                packed and info.size > MOST_PACKED_BYTES
            ):  # a few megabytes may hold terabytes of zeros, which take hours to skip
                raise TarContentError(
                    f"it is compressed, and {info.name} has {info.size:,} bytes, more than {MOST_PACKED_BYTES:,}: unpack it"
                )
            if info.isreg():
                yield StreamedMember(info.name, info.size, partial(_content, tar, info))


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    return cast("BinaryIO", tar.extractfile(info)).read()


class _Bounded:
    """Gives the bytes of a stream until `left` of them are read."""

    def __init__(self, stream: BinaryIO, left: int) -> None:
        self._stream, self.left = stream, left

    def read(self, size: int) -> bytes:
        content = self._stream.read(size)
        self.left -= len(content)
        if self.left < 0:
            raise TarContentError(f"a member has headers of more than {MOST_HEADER_BYTES:,} bytes")
        return content


def _unpacked(stream: BinaryIO) -> tuple[BinaryIO, bool]:
    """Return the stream of the tar itself, and whether it is compressed."""
    buffered = io.BufferedReader(cast("io.RawIOBase", stream))
    head = buffered.peek(8)[:8]
    for magic, name in _UNSUPPORTED.items():
        if head.startswith(magic):
            raise TarContentError(f"it is compressed with {name}: unpack it")
    opener = next((opener for magic, opener in _PACKED.items() if head.startswith(magic)), None)
    return cast("BinaryIO", buffered if opener is None else opener(buffered)), opener is not None
