"""Archives that cannot be read at random: named, with what unpacks them."""

from __future__ import annotations

_MAGIC = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4"),
    b"PK\x03\x04": ("zip", "unzip, then pack the files with tar"),
    b"7z\xbc\xaf\x27\x1c": ("7z", "7z x, then pack the files with tar"),
    b"Rar!\x1a\x07": ("RAR", "unrar x, then pack the files with tar"),
}
MAGIC_BYTES = max(map(len, _MAGIC))
ENDINGS = (
    *(".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.bz2", ".tbz2", ".tbz"),
    *(".tar.xz", ".txz", ".tar.lz4", ".tar.lzma", ".tar.Z"),
)
REMEDY = "samples are read at random from plain .tar files: unpack"


def compression_of(first_bytes: bytes) -> str | None:
    """Return what a file is and how to unpack it, by its first bytes; None for one that is not compressed."""
    return next(
        (f"{name}; {REMEDY} it ({how})" for magic, (name, how) in _MAGIC.items() if first_bytes.startswith(magic)), None
    )


def is_compressed_tar(path: str) -> bool:
    """Return whether a file is a compressed tar, by its name."""
    return path.endswith(ENDINGS)
