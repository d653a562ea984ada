"""Compressed tars: unpacked into a temporary file, in one pass, from which they are then read like others."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, cast

import pyarrow as pa

from tailwise.errors import UnsupportedError
from tailwise.shards.tar import MAGIC_BYTES, is_compressed_tar
from tailwise.storage.files import FREE_BYTES
from tailwise.text import command_line

_PIECE_BYTES = 1 << 20
# Bounds of what comes out of a file, against files made to fill the disk: images hardly shrink.
MOST_TIMES, ALWAYS_BYTES = 20, 1 << 30


class _Borrowed(io.RawIOBase):
    """A file that Arrow does not close."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)


def _by_arrow(codec: str) -> Callable[[BinaryIO], Any]:
    return lambda file: pa.CompressedInputStream(pa.PythonFile(_Borrowed(file), mode="r"), codec)


_READERS: dict[bytes, Callable[[BinaryIO], Any]] = {  # by the first bytes of a file
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": _by_arrow("zstd"),
    b"\x04\x22\x4d\x18": _by_arrow("lz4"),
}


def plain(path: str, file: BinaryIO) -> BinaryIO:
    """Return the tar of an open file: the file itself, or a temporary one with what it unpacks to, if its name is a compressed tar's.

    Raises:
        OSError: it is damaged, unpacks to more than MOST_TIMES its size and ALWAYS_BYTES, or the temporary folder has no room.
    """
    if not is_compressed_tar(path):
        return file
    target = cast("BinaryIO", tempfile.TemporaryFile())  # noqa: SIM115  (the caller closes it)
    try:
        unpack_into(file, target, shutil.disk_usage(tempfile.gettempdir()).free - FREE_BYTES)
    except BaseException:
        target.close()
        raise
    return target


def unpack_into(file: BinaryIO, target: BinaryIO, room: int) -> None:
    """Write the tar of an open file to an empty one, which has room for `room` bytes; see `plain`."""
    most = max(MOST_TIMES * file.seek(0, 2), ALWAYS_BYTES)
    file.seek(0)
    start = file.read(MAGIC_BYTES)
    file.seek(0)
    reader = next((reader for magic, reader in _READERS.items() if start.startswith(magic)), _Borrowed)
    try:
        with reader(file) as stream:
            while piece := stream.read(_PIECE_BYTES):
                if target.tell() + len(piece) > min(most, room):
                    why = f"the {room:,} bytes that there is room for" if room < most else f"{most:,} bytes"
                    raise OSError(f"it unpacks to more than {why}: unpack it yourself, and import the .tar")
                target.write(piece)
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise OSError(f"it is damaged ({error})") from error
    target.seek(0)


def packed_shards(shards: pa.Table) -> pa.Table:
    """Return the shards (SHARD_SCHEMA) that are compressed tars."""
    return shards.filter(pa.array(map(is_compressed_tar, shards["path"].to_pylist()), pa.bool_()))


def refuse_packed(folder: object, paths: Sequence[str]) -> None:
    """Refuse to read samples at random from compressed tars of a catalog's folder, if there are some."""
    if paths:
        raise UnsupportedError(
            f"{len(paths):,} tars are compressed, the first is {paths[0]}, and samples are read at random: unpack them with "
            f"{command_line('unpack', folder, '…')} (… is a new folder)"
        )
