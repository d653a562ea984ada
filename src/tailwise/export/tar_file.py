"""Tars as `tarfile` writes them in ustar format; the bytes are the same in every run."""

from __future__ import annotations

from typing import BinaryIO

BLOCK_BYTES = 512
RECORD_BYTES = 20 * BLOCK_BYTES  # a tar's size is a multiple
MAX_MEMBER_BYTES = 8**11 - 1  # 11 octal digits
_MODE_OWNER_GROUP = b"0000644\0" + 2 * b"0000000\0"
_TIME = b"00000000000\0"
_BLANK_CHECKSUM = b" " * 8
# A regular file, no link; owner and group without names; no device; no prefix of the name.
_REST = b"0" + bytes(100) + b"ustar\x0000" + bytes(64 + 16 + 167)
_FIXED_SUM = sum(_MODE_OWNER_GROUP + _TIME + _BLANK_CHECKSUM + _REST)


def ustar_header(name: str, size_bytes: int) -> bytes:
    """Return the header of a regular file with mode 644, and owner, group and time 0; `name` has at most 100 ASCII characters."""
    if size_bytes > MAX_MEMBER_BYTES:
        raise ValueError(f"{name} has {size_bytes:,} bytes: a member of a tar holds at most {MAX_MEMBER_BYTES:,}")
    path, size = name.encode("ascii"), b"%011o\0" % size_bytes
    checksum = b"%06o\0 " % (sum(path) + sum(size) + _FIXED_SUM)
    return path.ljust(100, b"\0") + _MODE_OWNER_GROUP + size + _TIME + checksum + _REST


def write_member(stream: BinaryIO, name: str, content: bytes) -> None:
    """Write one regular file (see `ustar_header`)."""
    stream.write(ustar_header(name, len(content)))
    stream.write(content)
    stream.write(bytes(-len(content) % BLOCK_BYTES))


def write_end(stream: BinaryIO) -> None:
    """Write the two blocks of zeros that end a tar, and fill its last record."""
    stream.write(bytes(2 * BLOCK_BYTES))
    stream.write(bytes(-stream.tell() % RECORD_BYTES))
