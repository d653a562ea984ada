"""The tar index: the place of each member of a tar, read from the headers alone; and archives that cannot be read at random.

The standard library's `tarfile` makes an object per member and reads about 20,000 members a second; this walk reads the same
headers (POSIX ustar, pax path and size records, GNU long names and base-256 sizes) several times faster.
"""

from __future__ import annotations

import posixpath
import zlib
from dataclasses import dataclass, field, replace
from typing import BinaryIO, NamedTuple

BLOCK = 512
REGULAR = frozenset((0x30, 0x00, 0x37))  # '0', old-style NUL, contiguous '7'
ANNOUNCING = frozenset((0x78, 0x58, 0x4C, 0x4B))  # 'x', Solaris's 'X', 'L', 'K': about the member after them
MAX_ANNOUNCED_BYTES = 16 << 20  # of a pax header or a long name; real ones have a few hundred
FOLDER = "folder"
SPARSE = "sparse file"
_KINDS = {0x33: "device", 0x34: "device", 0x36: "named pipe", 0x4D: "part of a file of several volumes"}
_FOLDERS = frozenset((0x35, 0x44, 0x56))  # '5', GNU's listing 'D', volume label 'V'
_DATALESS = frozenset((0x31, 0x32, 0x33, 0x34, 0x35, 0x36))  # their size, if any, is not that of content behind them
_ZEROS = bytes(BLOCK)
_SCANNED_BYTES = 1 << 16
WINDOW_BYTES = 1 << 14  # read at once
_ADLER = 65521
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
# Ends of the names of compressed tars, that are unpacked while they are read, and others.
PACKED = (
    *(".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.bz2", ".tbz2", ".tbz"),
    *(".tar.xz", ".txz", ".tar.lz4"),
)
OTHER_PACKED = (".tar.lzma", ".tar.Z")
REMEDY = "only .tar files, and compressed ones whose name says so, are read: unpack"


class Member(NamedTuple):
    """One regular file of a tar."""

    name: str  # its path in the tar
    offset: int  # first byte of its content, from the start of the tar
    size: int  # length of its content in bytes


class Link(NamedTuple):
    """A hard or symbolic link of a tar."""

    name: str  # its path in the tar
    target: str  # normalised path of the member that it stands for
    at: int  # how many regular files come before it


@dataclass(frozen=True)
class TarIndex:
    """The members of a tar, in order. A tar without its end may have been cut between two members, or was written without."""

    members: list[Member]  # regular files whose whole content is in the file
    damage: str | None  # why the walk ended early, or None if the tar is sound
    damaged_name: str | None  # the regular file whose content is cut off, if any
    ended: bool = True  # whether the file closes with the blocks of zeros that end a tar
    links: list[Link] = field(default_factory=list)
    others: list[tuple[str, str]] = field(default_factory=list)  # name and kind: FOLDER, SPARSE, a device, …

    @property
    def seen(self) -> int:
        """Number of members whose header was read."""
        return len(self.members) + len(self.links) + len(self.others) + (self.damaged_name is not None)


class _DamageError(Exception):
    """The walk cannot go on; `name` is that of the regular file that is cut off, if one is."""

    def __init__(self, what: str, name: str | None = None) -> None:
        super().__init__(what)
        self.name = name


@dataclass
class _Announced:
    """Values from pax and GNU headers about the member after them."""

    name: bytes | None = None
    target: bytes | None = None
    size: int | None = None
    sparse: bool = False

    def read(self, kind: int, content: bytes) -> None:
        """Take the values of one such header; a damaged one is a ValueError."""
        if kind == 0x4C:
            self.name = content.rstrip(b"\0")
        elif kind == 0x4B:
            self.target = content.rstrip(b"\0")
        else:
            records = _pax_records(content)
            self.size = int(records[b"size"]) if b"size" in records else self.size
            self.name = records.get(b"GNU.sparse.name", records.get(b"path", self.name))
            self.target = records.get(b"linkpath", self.target)
            self.sparse = self.sparse or any(key.startswith(b"GNU.sparse.") for key in records)


def compression_of(first_bytes: bytes) -> str | None:
    """Return what a file is and how to unpack it, by its first bytes; None for one that is not compressed."""
    return next(
        (f"{name}; {REMEDY} it ({how})" for magic, (name, how) in _MAGIC.items() if first_bytes.startswith(magic)), None
    )


def is_compressed_tar(path: str) -> bool:
    """Return whether a file is a compressed tar that is unpacked while it is read, by its name."""
    return path.endswith(PACKED)


def is_tar(path: str) -> bool:
    """Return whether a file is a tar that is read, compressed or not, by its name."""
    return path.endswith((".tar", *PACKED))


def without_packing(path: str) -> str:
    """Return the path of a compressed tar with the end `.tar`; other paths as they are."""
    ending = next((ending for ending in PACKED if path.endswith(ending)), None)
    return path if ending is None else f"{path.removesuffix(ending)}.tar"


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU base-256
        return int.from_bytes(field, "big") - (0x80 << (8 * (len(field) - 1)))
    text = field.split(b"\0", 1)[0].strip()
    return int(text, 8) if text else 0


def _low_sum(field: bytes) -> int:
    """Return the low half of Adler's sum of a header with this checksum: 1 + the sum of all bytes, modulo _ADLER; −1 for no checksum."""
    try:
        return (int(field.split(b"\0", 1)[0].strip(), 8) + sum(field) - 8 * 0x20 + 1) % _ADLER
    except ValueError:
        return -1


def _checksum_holds(header: bytes) -> bool:
    field = header[148:156]
    low = _low_sum(field)
    if low < 0 or low == zlib.adler32(header) & 0xFFFF:
        return low >= 0
    signed = int(field.split(b"\0", 1)[0].strip(), 8) + sum(memoryview(field).cast("b")) - 8 * 0x20
    return signed == sum(memoryview(header).cast("b"))  # as some old programs added


def _pax_records(content: bytes) -> dict[bytes, bytes]:
    records, position = dict[bytes, bytes](), 0
    while (space := content.find(b" ", position)) > 0:
        length = int(content[position:space])
        if length <= 0:
            raise ValueError(f"pax record of length {length}")
        name, _, value = content[space + 1 : position + length - 1].partition(b"=")
        records[name] = value
        position += length
    return records


def index_tar(stream: BinaryIO, size_bytes: int, start: int = 0, members: list[Member] | None = None) -> TarIndex:
    """Return the whole members of an uncompressed tar of this length, to the end of the file: several tars may have been joined to one.

    A tar that ends within a member, or has a damaged header, gives the members before it. The walk begins at the header at `start`. An
    empty list of `members` is filled meanwhile.
    """
    found = TarIndex([] if members is None else members, None, None)
    try:
        ended = _walk(stream, size_bytes, found, start)
    except _DamageError as damage:
        return replace(found, damage=str(damage), damaged_name=damage.name)
    return replace(found, ended=ended)


def _walk(stream: BinaryIO, size_bytes: int, found: TarIndex, position: int) -> bool:
    """Add the members from a position on to `found`; return whether blocks of zeros come last."""
    start = position
    window = b""  # bytes of the tar from `start` on: headers of small members are read together
    sums: dict[bytes, int] = {}  # `_low_sum` of each field
    ended = False
    about: _Announced | None = None  # the next member
    add, adler32 = found.members.append, zlib.adler32
    while position < size_bytes:
        header = window[position - start : position - start + BLOCK]
        if len(header) < BLOCK:
            stream.seek(position)
            window, start = stream.read(WINDOW_BYTES), position
            header = window[:BLOCK]
        if header == _ZEROS:
            ended = True
            position = _behind_zeros(stream, position + BLOCK)
            continue
        if (field := header[148:156]) not in sums:
            sums[field] = _low_sum(field)
        if len(header) < BLOCK or (sums[field] != adler32(header) & 0xFFFF and not _checksum_holds(header)):
            raise _no_header(header, position, ended)
        try:
            size = int(header[124:135], 8) if header[135] in b"\0 " else _number(header[124:136])
        except ValueError:
            size = _size(header, position, ended)
        ended = False
        offset = position + BLOCK
        if header[156] == 0x30 and about is None and 0 <= size <= size_bytes - offset:  # nearly all members
            raw = _header_name(header) if header[345] else header[:100].partition(b"\0")[0]
            add(Member(raw.decode("utf-8", "surrogateescape"), offset, size))
            position = offset + (size + BLOCK - 1) // BLOCK * BLOCK
        else:
            position, about = _step(stream, size_bytes, found, header, offset, size, about or _Announced())
    return ended


def _step(
    stream: BinaryIO, size_bytes: int, found: TarIndex, header: bytes, offset: int, size: int, about: _Announced
) -> tuple[int, _Announced | None]:
    """Add one member of any kind; return where the next header is, and what is announced of its member."""
    kind = header[156]
    if kind in REGULAR and about.size is not None:
        size = about.size
    if kind in _DATALESS and not (kind == 0x31 and size > 0 and _has_content(stream, offset, size_bytes)):
        size = 0
    position = offset + (size + BLOCK - 1) // BLOCK * BLOCK
    raw = about.name if about.name is not None else _header_name(header)
    nothing_after = kind in ANNOUNCING and position >= size_bytes
    if offset + size > size_bytes or size < 0 or nothing_after:
        cut = _text(raw) if kind in REGULAR and not about.sparse else None
        raise _DamageError(f"ends within {_text(raw)!r}, at byte {size_bytes}", cut)
    if kind in ANNOUNCING:
        if size > MAX_ANNOUNCED_BYTES:
            raise _DamageError(f"a header of {size:,} bytes at byte {offset}")
        stream.seek(offset)
        try:
            about.read(kind, stream.read(size))
        except ValueError as error:
            raise _DamageError(f"damaged pax header at byte {offset}") from error
        return position, about
    if kind in REGULAR and not about.sparse and (kind or not raw.endswith(b"/")):
        found.members.append(Member(_text(raw), offset, size))
    elif kind == 0x53:  # 'S', GNU sparse; further headers may lie between this one and the content
        position += _sparse_headers(stream, header, offset)
        found.others.append((_text(raw), SPARSE))
    else:
        _note_other(found, kind, raw, header, about, Member(_text(raw), offset, size))
    return position, None


def _no_header(header: bytes, position: int, ended: bool) -> _DamageError:
    what = "no tar header" if len(header) == BLOCK else "ends within a header"
    return _DamageError(f"{what} at byte {position}{', behind the end of the tar' if ended else ''}")


def _size(header: bytes, position: int, ended: bool) -> int:
    try:
        return _number(header[124:136])
    except ValueError as error:
        raise _no_header(header, position, ended) from error


def _behind_zeros(stream: BinaryIO, position: int) -> int:
    """Return the start of the first block with a byte that is not zero, from `position` on; without one, the end of the file."""
    stream.seek(position)
    while chunk := stream.read(_SCANNED_BYTES):
        if rest := chunk.lstrip(b"\0"):
            return position + (len(chunk) - len(rest)) // BLOCK * BLOCK
        position += len(chunk)
    return position


def _has_content(stream: BinaryIO, offset: int, size_bytes: int) -> bool:
    """Return whether the content of a hard link with a size follows (pax allows that), and not a header or the end."""
    stream.seek(offset)
    after = stream.read(BLOCK)
    return bool(after.strip(b"\0")) and offset < size_bytes and not (len(after) == BLOCK and _checksum_holds(after))


def _sparse_headers(stream: BinaryIO, header: bytes, offset: int) -> int:
    """Return the bytes of the further headers of a sparse file."""
    stream.seek(offset)
    length, more = 0, header[482]
    while more:
        block = stream.read(BLOCK)
        length += BLOCK
        more = block[504] if len(block) == BLOCK else 0
    return length


def _note_other(found: TarIndex, kind: int, raw: bytes, header: bytes, about: _Announced, member: Member) -> None:
    name = member.name
    if kind == 0x31 and member.size:
        found.members.append(member)
    elif kind in {0x31, 0x32}:
        target = _text(about.target if about.target is not None else header[157:257].split(b"\0", 1)[0])
        base = posixpath.dirname(name) if kind == 0x32 else ""
        found.links.append(Link(name, posixpath.normpath(posixpath.join(base, target)), len(found.members)))
    elif kind in _FOLDERS or (kind == 0 and raw.endswith(b"/")):  # so old tars mark folders
        found.others.append((name, FOLDER))
    elif kind != 0x67:  # 'g', pax records for all members, is none
        found.others.append((name, SPARSE if about.sparse else _KINDS.get(kind, f"member of type {chr(kind)!r}")))


def _header_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[345] and header[257:262] == b"ustar" and header[257:265] != b"ustar  \0":
        end = 476 if header[508:512] == b"tar\0" else 500  # star keeps times behind a shorter prefix
        return header[345:end].split(b"\0", 1)[0] + b"/" + name
    return name


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
