"""From the members of a tar to its samples: members of one key, wherever they lie in the tar.

Every member is counted: as one of a sample, as harmless, or with what is rejected.
"""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tailwise.shards.members import OTHER_IMAGES, MemberChoice
from tailwise.shards.tar import FOLDER, Member, TarIndex
from tailwise.text import plain, storable

DEFAULT = MemberChoice()
_SHOWN_EXTENSIONS = 5
_MAX_LINKS = 40  # followed from one link to the next, as operating systems do
# Leftovers of file managers and archivers: a file's base name, or a folder on its way.
_HARMLESS = re.compile(
    r"(?:^|/)(?:__MACOSX/|PaxHeaders?(?:\.\d+)?/|@eaDir/|\.(?:AppleDouble|Spotlight-V100|Trashes|fseventsd)/"
    r"|(?:\._[^/]*|\.DS_Store|\.localized|Icon\r|Thumbs\.db|desktop\.ini|pax_global_header)$)"
)
_MARKS = (  # each leftover has one
    *("._", "__MACOSX/", "PaxHeader", "@eaDir/", ".AppleDouble/", ".Spotlight-V100/", ".Trashes/", ".fseventsd/"),
    *(".DS_Store", ".localized", "Icon\r", "Thumbs.db", "desktop.ini", "pax_global_header"),
)

Record = dict[str, Any]


@dataclass
class MemberCounts:
    """Numbers of members of a tar by outcome."""

    seen: int = 0  # members whose header was read
    imported: int = 0  # members of samples that were imported
    harmless: int = 0  # skipped members: folders, and leftovers of file managers
    rejected: int = 0  # members that are listed as rejected


@dataclass
class Grouped:
    """The members of a tar by key, in order of first appearance. The import of a group adds its members to the counts."""

    groups: dict[str, dict[str, Member]] = field(default_factory=dict)  # extension → member, by key
    rejected: list[Record] = field(default_factory=list)  # REJECTED_SCHEMA
    counts: MemberCounts = field(default_factory=MemberCounts)  # of all members

    def reject(self, path: str, reason: str, key: str | None, detail: str | None, members: int) -> None:
        """Note one rejection of a number of members."""
        self.rejected.append(rejection(path, reason, key, detail))
        self.counts.rejected += members


def rejection(path: str, reason: str, key: str | None, detail: str | None = None, rows: int = 1) -> Record:
    """Return one REJECTED_SCHEMA row."""
    return {
        "stage": "import",
        "reason": reason,
        "file": storable(path),
        "key": None if key is None else storable(key),
        "detail": None if detail is None else storable(detail),
        "rows": rows,
    }


def split_name(name: str) -> tuple[str, str]:
    """Return key and extension, cut at the first dot of the base name as webdataset does; the key keeps the folders."""
    folder, slash, base = name.rpartition("/") if "/" in name else ("", "", name)
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}" if slash else stem, extension.lower()


def is_harmless(name: str) -> bool:
    """Return whether a name is one that macOS, Windows or an archiver leaves behind."""
    return _HARMLESS.search(name) is not None


def image_of(members: Mapping[str, Member], extensions: Sequence[str] = DEFAULT.images) -> str | None:
    """Return the extension of a sample's image: the first of `extensions` that is there and not empty."""
    for name in extensions:
        if name in members and members[name].size:
            return name
    return None


def group_members(index: TarIndex, path: str, choice: MemberChoice = DEFAULT) -> Grouped:
    """Return the samples of a tar, complete or not, and its rejected members.

    Members of a key may be apart. If a key has an extension twice, only members that follow each other belong together: the first of
    these runs is kept, the others are duplicates.
    """
    grouped = Grouped(counts=MemberCounts(seen=index.seen))
    members = list(_resolved(index, path, grouped)) if index.links or index.others else index.members
    leftovers = 0
    names = [member.name for member in members]
    joined = "\n".join(names)
    if any(mark in joined for mark in _MARKS):  # much faster than the pattern
        members = [member for member in members if not is_harmless(member.name)]
        leftovers, names = len(names) - len(members), [member.name for member in members]
    cut_off = [index.damaged_name] if index.damaged_name is not None else []
    keys, extensions = _split(names + cut_off, choice)
    groups = grouped.groups
    twice: dict[str, list[dict[str, Member]]] = {}
    for member, key, extension in zip(members, keys, extensions, strict=False):
        group = groups.get(key)
        if group is None:
            groups[key] = {extension: member}
        elif extension in group:
            twice[key] = []
        else:
            group[extension] = member
    for key, run in _runs(members, keys, extensions) if twice else ():
        if key in twice:
            twice[key].append(run)
    for key, (first, *others) in twice.items():
        groups[key] = first
        for run in others:
            grouped.reject(
                path, "duplicate key", key, "only the members of this key that come first are kept", len(run)
            )
    if index.damage:
        _reject_damage(grouped, index, path, keys[-1] if cut_off else None, choice)
    elif not index.ended:
        what = "all in it is kept; it may have been cut off behind" if index.seen else "it is empty"
        grouped.rejected.append(rejection(path, "tar without an end", None, what))
    if leftovers:
        grouped.counts.harmless += leftovers
        what = f"{leftovers:,} members such as ._NAME or .DS_Store"
        grouped.rejected.append(
            rejection(path, "leftovers of macOS, Windows or an archiver, skipped", None, what, rows=0)
        )
    return grouped


def _resolved(index: TarIndex, path: str, grouped: Grouped) -> Iterator[Member]:
    """Yield the regular files, and links as members with the content of their targets; reject or count all others."""
    for name, kind in index.others:
        if kind == FOLDER:
            grouped.counts.harmless += 1
        else:
            grouped.reject(path, "not a regular file", split_name(name)[0], f"{plain(name)}: {kind}", 1)
    if not index.links:
        yield from index.members
        return
    targets = {posixpath.normpath(link.name): link.target for link in index.links}
    files = {posixpath.normpath(member.name): member for member in reversed(index.members)}
    done = 0
    for link in index.links:
        yield from index.members[done : link.at]
        done = link.at
        target, steps = link.target, 0
        while target not in files and target in targets and steps < _MAX_LINKS:
            target, steps = targets[target], steps + 1
        if target in files:
            yield Member(link.name, files[target].offset, files[target].size)
        else:
            detail = f"{plain(link.name)} is a link to {plain(link.target)}, which is no file of this tar"
            grouped.reject(path, "link without target", split_name(link.name)[0], detail, 1)
    yield from index.members[done:]


def _runs(members: list[Member], keys: list[str], extensions: list[str]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yield members that follow each other and have one key, by extension; a repeated extension begins the next run."""
    current: str | None = None
    run: dict[str, Member] = {}
    for member, key, extension in zip(members, keys, extensions, strict=False):
        if key != current or extension in run:
            if current is not None:
                yield current, run
            current, run = key, {}
        run[extension] = member
    if current is not None:
        yield current, run


def _split(names: list[str], choice: MemberChoice) -> tuple[list[str], list[str]]:
    """Return key and extension of each name: at the first dot, but for dotted base names.

    `photo.0001.jpg` and `photo.0001.txt` are a sample of their own: a name is cut behind the longest stem that has an image and a
    caption. Without one it is cut at the first dot if that key has an image or a caption itself (`a.seg.png` belongs to `a.jpg`), and
    at the last dot if not.
    """
    keys, extensions = [], []
    for name in names:
        key, extension = split_name(name)
        keys.append(key)
        extensions.append(extension)
    if "." not in "".join(extensions):
        return keys, extensions
    halves = choice.halves
    dots = 1 + max(suffix.count(".") for suffix in halves)
    by_stem: defaultdict[str, int] = defaultdict(int)  # 1: has an image, 2: has a caption
    for name in names:
        stem = name
        for _ in range(min(dots, name.count("."))):
            stem = stem.rpartition(".")[0]
            by_stem[stem] |= halves.get(name[len(stem) + 1 :].lower(), 0)
    for at, name in enumerate(names):
        if "." in extensions[at]:
            keys[at], extensions[at] = _cut(name, keys[at], extensions[at], by_stem)
    return keys, extensions


def _cut(name: str, key: str, extension: str, by_stem: dict[str, int]) -> tuple[str, str]:
    first = len(key)
    last = dot = name.rfind(".")
    while dot > first:
        if by_stem.get(name[:dot]) == 3:
            return name[:dot], name[dot + 1 :].lower()
        dot = name.rfind(".", 0, dot)
    return (key, extension) if by_stem.get(key) else (name[:last], name[last + 1 :].lower())


def _reject_damage(grouped: Grouped, index: TarIndex, path: str, key: str | None, choice: MemberChoice) -> None:
    """Drop the sample that the damage cuts, of this key; without one, it is the last sample if that is incomplete."""
    dropped = int(key is not None)
    last = key if key is not None else next(reversed(grouped.groups), None)
    members = grouped.groups.get(last) if last is not None else None
    if members is not None and last is not None and why_incomplete(members, choice):
        key = last
        del grouped.groups[last]
        dropped += len(members)
    reason = "truncated or damaged tar" if index.seen else "not a tar"
    grouped.reject(path, reason, key, index.damage, dropped)


def why_incomplete(members: Mapping[str, Member], choice: MemberChoice = DEFAULT) -> tuple[str, str | None] | None:
    """Return reason and detail of a sample without an image or a caption that can be used; None for a complete one."""
    image = image_of(members, choice.images)
    caption = any(name in members for name in choice.texts)
    if image and caption:
        return None
    if not image and not caption:
        return "neither image nor caption", f"only {_listed(members)}"
    if not caption:
        others = [name for name in members if name != image]
        wanted = " or ".join(f".{name}" for name in choice.texts)
        more = f"there is {_listed(others)}, and no {wanted}; `caption` chooses others"
        return "image without caption", more if others else None
    empty = [name for name in choice.images if name in members]
    if empty:
        return "caption without image", f".{empty[0]} is empty"
    others = [name for name in members if name not in choice.texts]
    wanted = ", ".join(f".{name}" for name in choice.images)
    more = f"there is {_listed(others)}; images are {wanted}; `image` chooses others"
    images = {*choice.images, *OTHER_IMAGES}
    if any(name.rpartition(".")[2] in images for name in others):
        return "image has another suffix", more
    return "caption without image", more if others else None


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(plain(f".{name}") if name else "a name without extension" for name in names[:_SHOWN_EXTENSIONS])
    more = len(names) - _SHOWN_EXTENSIONS
    return f"{shown} and {more:,} more" if more > 0 else shown
