"""Tars as `tarfile` writes them in ustar format, with nothing in them that differs from run to run."""

from __future__ import annotations

from typing import BinaryIO

BLOCK_BYTES = 512
RECORD_BYTES = 20 * BLOCK_BYTES  # tars end on a whole record
MAX_MEMBER_BYTES = 8**11 - 1  # what 11 octal digits hold
_MODE_OWNER_GROUP = b"0000644\0" + 2 * b"0000000\0"
_TIME = b"00000000000\0"
_BLANK_CHECKSUM = b" " * 8
# A regular file, no link; owner and group without names; no device; no prefix of the name.
_REST = b"0" + bytes(100) + b"ustar\x0000" + bytes(64 + 16 + 167)
_FIXED_SUM = sum(_MODE_OWNER_GROUP + _TIME + _BLANK_CHECKSUM + _REST)


def ustar_header(name: str, size_bytes: int) -> bytes:
    """The header of a regular file: mode 644, owner, group and time 0.

    Args:
        name: at most 100 ASCII characters.
        size_bytes: of its content, at most MAX_MEMBER_BYTES.

    Raises:
        ValueError: it is larger.
    """
    if size_bytes > MAX_MEMBER_BYTES:
        raise ValueError(f"{name} has {size_bytes:,} bytes: a member of a tar holds at most {MAX_MEMBER_BYTES:,}")
    path, size = name.encode("ascii"), b"%011o\0" % size_bytes
    checksum = b"%06o\0 " % (sum(path) + sum(size) + _FIXED_SUM)
    return path.ljust(100, b"\0") + _MODE_OWNER_GROUP + size + _TIME + checksum + _REST


def write_member(stream: BinaryIO, name: str, content: bytes) -> None:
    """Writes one regular file (see `ustar_header`)."""
    stream.write(ustar_header(name, len(content)))
    stream.write(content)
    stream.write(bytes(-len(content) % BLOCK_BYTES))


def write_end(stream: BinaryIO) -> None:
    """Writes the two blocks of zeros that end a tar, and fills its last record."""
    stream.write(bytes(2 * BLOCK_BYTES))
    stream.write(bytes(-stream.tell() % RECORD_BYTES))
