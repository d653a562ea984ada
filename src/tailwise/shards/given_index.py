"""Indexes of tars that users have from other tools: DALI's text files, and Energon's database. They are read, and never written.

An index is used if it agrees with the tar: its members leave no room for others, and some of their headers are as it says.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from tailwise.shards.tar import BLOCK, WINDOW_BYTES, Member, TarIndex, index_tar, without_packing
from tailwise.storage.errors import RemoteError
from tailwise.storage.files import RemoteFile, local_file, open_binary
from tailwise.storage.remote import is_remote

CHECKED = 16  # headers of a tar
DALI_VERSION = "v1.2"
MAX_TEXT_BYTES = 1 << 30
ENERGON_LEVELS = 3  # folders above a tar that are looked through
_QUERY = """
    SELECT sample_key, part_name, content_byte_offset, content_byte_size
    FROM sample_parts JOIN samples USING (tar_file_id, sample_index) WHERE tar_file_id = ?
"""


class _UnfitError(Exception):
    """An index cannot be used."""


def given_index(path: str, stream: BinaryIO, size_bytes: int) -> tuple[TarIndex | None, str | None]:
    """Return the index of an open tar that another tool has made; without one that can be used, None, and why, if there is one.

    It is `X.idx` beside `X.tar` (DALI), or, of a local tar, `.nv-meta/index.sqlite` in one of the folders above (Energon).
    """
    found = [_tried(read, path, stream, size_bytes) for read in (_of_dali, _of_energon)]
    good = next((index for index, _ in found if index is not None), None)
    return good, None if good else "; ".join(why for _, why in found if why) or None


def _tried(
    read: Callable[[str], list[Member]], path: str, stream: BinaryIO, size_bytes: int
) -> tuple[TarIndex | None, str | None]:
    try:
        members = sorted(read(path), key=lambda member: member.offset)
        return (_checked(stream, members, size_bytes) if members else None), None
    except _UnfitError as error:
        return None, f"{'DALI' if read is _of_dali else 'Energon'}'s index: {error}"


def _of_dali(path: str) -> list[Member]:
    """Return the members of DALI's `wds2idx`: after "v1.2 N", a line a sample, of extension, offset, size and name of each component."""
    try:
        with open_binary(f"{without_packing(path).removesuffix('.tar')}.idx") as stream:
            content = stream.read(MAX_TEXT_BYTES)
    except (FileNotFoundError, RemoteError):  # S3 answers 403 for what is not there, if it may not say so
        return []
    except OSError as error:
        raise _UnfitError(str(error)) from error
    try:
        first, *lines = content.decode().removesuffix("\n").split("\n")
        version, samples = first.split()
        words = [line.split(" ") for line in lines]
        members = [
            Member(each[at + 3], int(each[at + 1]), int(each[at + 2]))
            for each in words
            for at in range(0, len(each), 4)
        ]
    except (ValueError, IndexError) as error:
        raise _UnfitError(f"it cannot be read ({error})") from error
    if version != DALI_VERSION or len(lines) != int(samples):
        raise _UnfitError(
            f"it is of version {version} and has {len(lines):,} of {samples} lines, not {DALI_VERSION} and all"
        )
    if any("\\" in member.name for member in members):  # as tar prints other letters than ASCII
        raise _UnfitError("it has escaped names")
    return members


def _of_energon(path: str) -> list[Member]:
    """Return the members of a local tar in the database that Energon's `prepare` makes, of which `.info.json` lists the tars."""
    tar = local_file(path)
    folders = [] if is_remote(path) else tar.parents[:ENERGON_LEVELS]
    home = next((folder / ".nv-meta" for folder in folders if (folder / ".nv-meta" / "index.sqlite").is_file()), None)
    if home is None:
        return []
    try:
        tars = list(json.loads((home / ".info.json").read_bytes())["shard_counts"])
        name = tar.relative_to(home.parent).as_posix()
        if name not in tars:
            return []
        return [
            Member(f"{key}.{part}", int(offset), int(size)) for key, part, offset, size in _rows(home, tars.index(name))
        ]
    except (OSError, ValueError, KeyError, TypeError, sqlite3.Error) as error:
        raise _UnfitError(f"it cannot be read ({type(error).__name__}: {error})") from error


def _rows(home: Path, number: int) -> list[tuple[str, str, int, int]]:
    url = f"file:{quote(str(home / 'index.sqlite'))}?mode=ro&immutable=1"
    database = sqlite3.connect(url, uri=True)
    try:
        return database.execute(_QUERY, (number,)).fetchall()
    finally:
        database.close()


def _checked(stream: BinaryIO, members: Sequence[Member], size_bytes: int) -> TarIndex:
    """Return the index with some members, ascending, if a walk over the tar would give it; CHECKED headers are walked over."""
    position = 0
    for member in members:
        if member.offset != position + BLOCK or member.size < 0:
            raise _UnfitError(f"{member.name} is at byte {member.offset:,}, another header at byte {position:,}")
        position += BLOCK + (member.size + BLOCK - 1) // BLOCK * BLOCK
    if position > size_bytes:
        raise _UnfitError(f"it ends at byte {position:,}, the tar at byte {size_bytes:,}")
    count = min(CHECKED, len(members))
    chosen = [members[at * (len(members) - 1) // max(1, count - 1)] for at in range(count)]
    if isinstance(stream, RemoteFile):
        starts = [position, *(member.offset - BLOCK for member in chosen)]
        stream.fetch((start, min(start + WINDOW_BYTES, size_bytes)) for start in starts)
    for member in chosen:
        stop = member.offset + (member.size + BLOCK - 1) // BLOCK * BLOCK
        found = index_tar(stream, stop, member.offset - BLOCK)
        if found.members != [member] or found.seen != 1:
            there = found.members[0].name if found.members else found.damage or "another kind of member"
            raise _UnfitError(f"{member.name} is not at byte {member.offset:,}: {there}")
    rest = index_tar(stream, size_bytes, position)
    if rest.seen or rest.damage:
        raise _UnfitError(f"the tar goes on behind its end at byte {position:,}")
    return TarIndex(list(members), None, None, rest.ended)
