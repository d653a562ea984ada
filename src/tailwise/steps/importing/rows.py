"""Import: from what files name samples by (key, uid, tar and key, metadata file and uid, sha256, url) to rows of the catalog.

Names may include the tar: `{tar path}/{key}.jpg`, or `{folder named as the tar}/{key}.jpg`. A tar is recognized by the longest common end
of its path: pools move, and the last folders of the tars mostly move with them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.noted import NOTED, noted_hashes
from tailwise.execution.keys import ABSENT, AMBIGUOUS, KeyIndex, as_hashes, hash_keys
from tailwise.shards.columns import DAMAGE
from tailwise.shards.grouping import split_name
from tailwise.shards.noted import hashes_of_part
from tailwise.shards.tar import is_tar, without_packing
from tailwise.sources.embedding_files import NamedRows

ELSEWHERE = -3  # a sample that these files are not for: it has its embedding, or is in another tar
AMBIGUOUS_TAR = -4
Rows = npt.NDArray[np.int64]

# What each index holds of a sample, from its shard, key and uid.
_TEXTS: dict[str, Callable[[int, str, bytes], str]] = {
    "key": lambda shard, key, uid: key,  # noqa: ARG005
    "uid": lambda shard, key, uid: uid.hex(),  # noqa: ARG005
    "place": lambda shard, key, uid: f"{shard}\t{key}",  # noqa: ARG005
}
_TAR = ".tar/"


@dataclass(frozen=True)
class _Shard:
    """The samples of a shard: numbers of their rows, keys, the keys that several have, and whether its part is to be filled."""

    number: int
    rows: Rows
    keys: pa.Array
    twins: pa.Array
    wanted: bool


class RowFinder:
    """Finds the rows of a catalog that files speak of.

    Indices on disk are made when they are first needed: 32 bytes a row each. Rows stand in up to four of a kind, by whether their part
    is to be filled, and whether their shard is among the given ones.
    """

    def __init__(self, catalog: Catalog, parts: Sequence[Part], work: Path, given: frozenset[int] | None) -> None:
        """Prepares.

        Args:
            catalog: with the samples.
            parts: whose rows are wanted; those of all others are ELSEWHERE.
            work: a folder for the indices.
            given: shards that came with the files, which then belong to these alone; None if none came.
        """
        self._catalog, self._work, self._given = catalog, work, given
        self._wanted = {part.number for part in parts}
        shards = catalog.shards()
        paths: list[str] = shards.column("path").to_pylist()
        self._parts, self._part_of = catalog.parts(), shards.column("part")
        self._shard_of = {path: shard for shard, path in enumerate(paths)}
        self._paths, self._tars = paths, dict[str, int]()
        self._indices: dict[str, dict[tuple[bool, bool], KeyIndex]] = {}
        self._shard: _Shard | None = None  # of the file of metadata that was asked for last
        self._samples: tuple[Part, pa.Table] | None = None  # of its part, which may hold more such shards

    def note_tars(self, files: Iterable[NamedRows]) -> None:
        """Looks which tars files name, before any row is asked for: no two of them may be taken for the same shard."""
        by_key = (names for file in files if file.naming == "key" for names in _readable(file))
        self._tars = match_tars((home for names in by_key for home in homes(names)), self._paths, self._given)

    def find(self, file: NamedRows, names: pa.Array, start: int, own: bool) -> Rows:
        """The row of each name, int64 [n]; or ABSENT, AMBIGUOUS, AMBIGUOUS_TAR, ELSEWHERE.

        Args:
            file: that the names are of.
            names: strings [n].
            start: how many names of the file came before.
            own: whether the file belongs to the given shards alone.
        """
        if file.naming == "uid":
            shard = self._shard_of.get(file.home) if file.home else None
            if shard is not None and (self._given is None or shard in self._given):
                return self._find_in_shard(shard, names, start)
        if file.naming != "key":
            return self._look_up(file.naming, names.to_pylist(), own)
        return self._find_keys(names.to_pylist(), own)

    def _find_in_shard(self, number: int, names: pa.Array, start: int) -> Rows:
        """Find samples of a shard that is a file of metadata: mostly, they are its next ones."""
        if self._shard is None or self._shard.number != number:
            self._shard = self._read_shard(number)
        shard = self._shard
        rows = np.full(len(names), ABSENT, np.int64)
        if shard.keys[start : start + len(names)].equals(names):
            rows[:] = shard.rows[start : start + len(names)]
        else:
            found = pc.index_in(names, value_set=shard.keys)
            there = np.asarray(found.is_valid())
            rows[there] = shard.rows[found.drop_null()]
        if len(shard.twins):
            rows[np.asarray(pc.is_in(names, value_set=shard.twins))] = AMBIGUOUS
        if not shard.wanted:
            rows[rows != ABSENT] = ELSEWHERE
        return rows

    def _read_shard(self, number: int) -> _Shard:
        part = self._parts[self._part_of[number].as_py()]
        if self._samples is None or self._samples[0] != part:
            self._samples = part, self._catalog.samples(part, ["shard", "key"])
        samples = self._samples[1]
        at = np.flatnonzero(samples.column("shard").to_numpy() == number)
        keys = samples.column("key").take(pa.array(at)).combine_chunks()
        counts = keys.value_counts()
        twins = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        return _Shard(number, part.first_row + at, keys, twins, part.number in self._wanted)

    def _find_keys(self, names: Sequence[str], own: bool) -> Rows:
        rows = np.full(len(names), ABSENT, np.int64)
        in_tars = [in_tar(name) for name in names]
        self._place(rows, names, in_tars, own)
        plain = [at for at, place in enumerate(in_tars) if place is None]
        if plain:
            rows[plain] = self._look_up("key", [names[at] for at in plain], own)
            lost = {at for at in plain if rows[at] == ABSENT}
            self._place(rows, names, [in_folder(name) if at in lost else None for at, name in enumerate(names)], own)
        return rows

    def _place(self, rows: Rows, names: Sequence[str], places: Sequence[Place | None], own: bool) -> None:
        """Fill in the rows of those names whose places are known; of a dotted name the longer key goes first."""
        wanted: dict[int, str] = {}
        shorter: dict[int, str] = {}
        for at, place in enumerate(places):
            shard = ABSENT if place is None else self._tars.get(place.home, ABSENT)
            if place is not None and shard >= 0:
                wanted[at] = f"{shard}\t{dotted_key(names[at], place)}"
                shorter[at] = f"{shard}\t{place.key}"
            elif shard == AMBIGUOUS:
                rows[at] = AMBIGUOUS_TAR
        if wanted:
            rows[list(wanted)] = self._look_up("place", list(wanted.values()), own)
        again = {at: text for at, text in shorter.items() if text != wanted[at] and rows[at] == ABSENT}
        if again:
            rows[list(again)] = self._look_up("place", list(again.values()), own)

    def _look_up(self, kind: str, texts: Sequence[str], own: bool) -> Rows:
        if kind not in self._indices:
            self._indices[kind] = self._build(kind)
        rows = np.full(len(texts), ABSENT, np.int64)
        elsewhere = np.zeros(len(texts), np.bool_)
        strange = np.zeros(len(texts), np.bool_)
        hashes, named = hash_keys(texts), np.ones(len(texts), np.bool_)
        if kind in NOTED:
            hashes, named = as_hashes(noted_hashes(kind, pa.array(texts, pa.string())))
        for (wanted, given), index in self._indices[kind].items():
            hits = np.where(named, index.find(hashes), ABSENT)
            if own and not given:
                strange |= hits != ABSENT
            elif not wanted:
                elsewhere |= hits != ABSENT
            else:
                both = (rows != ABSENT) & (hits != ABSENT)
                rows = np.where(both, AMBIGUOUS, np.where(rows == ABSENT, hits, rows))
        rows[elsewhere & (rows != ABSENT)] = AMBIGUOUS
        rows[(elsewhere | strange) & (rows == ABSENT)] = ELSEWHERE
        return rows

    def _build(self, kind: str) -> dict[tuple[bool, bool], KeyIndex]:
        indices: dict[tuple[bool, bool], KeyIndex] = {}
        total = sum(part.rows for part in self._parts)
        for part in self._parts:
            samples = self._catalog.samples(part, ["shard", "key", "uid"])
            columns = (samples.column(name).to_pylist() for name in ("shard", "key", "uid"))
            if kind in NOTED:
                hashes, there = hashes_of_part(self._catalog, part, kind)
            else:
                texts = [_TEXTS[kind](*row) for row in zip(*columns, strict=True)]
                hashes, there = hash_keys(texts), np.array(list(map(bool, texts)), np.bool_)
            shards = samples.column("shard").to_numpy()
            named = there & ~np.isin(shards, list(self._catalog.replaced()))
            given = np.ones(len(shards), np.bool_) if self._given is None else np.isin(shards, list(self._given))
            for is_given in (True, False):
                at = np.flatnonzero((given == is_given) & named)
                if at.size:
                    name = (part.number in self._wanted, is_given)
                    if name not in indices:
                        indices[name] = KeyIndex(self._work / f"{kind}-{'-'.join(map(str, map(int, name)))}", total)
                    indices[name].add(hashes[at], part.first_row + at)
        for index in indices.values():
            index.seal()
        return indices


def _readable(file: NamedRows) -> Iterable[pa.Array]:
    """Yield the names of a file, as far as they can be read; its damage is reported when it is joined."""
    try:
        yield from file.names()
    except DAMAGE:
        return


class Place(NamedTuple):
    """The two parts of a name."""

    home: str  # path of the tar, with ".tar"; or of the folder, without
    key: str  # key in the tar


def in_tar(name: str) -> Place | None:
    """Return the tar and the key of `{tar path}/{key}.jpg`; None for other names."""
    at = name.rfind(_TAR)
    return None if at < 0 else Place(name[: at + 4], split_name(name[at + 5 :])[0])


def in_folder(name: str) -> Place | None:
    """Return the folder and the key of `{folder}/{key}.jpg`; None for a name without folder."""
    folder, slash, rest = name.rpartition("/")
    return Place(folder, split_name(rest)[0]) if slash else None


def dotted_key(name: str, place: Place) -> str:
    """Return the key of a name cut at the last dot, where that is longer: samples with dotted base names have such keys."""
    rest = name[len(place.home) + 1 :]
    dot = rest.rfind(".")
    return rest[:dot] if dot > len(place.key) else place.key


def homes(names: pa.Array) -> list[str]:
    """Return the distinct tars and folders at the start of some names."""
    with_folder = names.filter(pc.match_substring(names, "/").fill_null(False))
    folders = pc.unique(pc.replace_substring_regex(with_folder, pattern=r"/[^/]*$", replacement=""))
    texts = [f"{folder}/" for folder in folders.to_pylist()]
    return list({place.home: None for text in texts if (place := in_tar(text) or in_folder(text))})


def _components(home: str) -> list[str]:
    """Return the name of a tar and its folders, from the name backwards, without scheme; a folder stands for the tar of its name.

    The last is always "", so that two equal paths agree longer than a path and its end.
    """
    path = home.split("://", 1)[-1]
    name, *folders = [part for part in path.split("/") if part not in ("", ".")][::-1] or [""]
    return [name if home.endswith(".tar") else f"{name}.tar", *folders, ""]


def match_tars(asked: Iterable[str], paths: Sequence[str], preferred: frozenset[int] | None) -> dict[str, int]:
    """Return the shard of each home, of the catalog's paths of shards; or AMBIGUOUS if several fit. Homes without a shard are left out.

    A `preferred` shard wins where several fit equally well. A shard that several homes fit equally well is none's.
    """
    by_name: defaultdict[str, list[tuple[int, list[str]]]] = defaultdict(list)
    for shard, path in enumerate(paths):
        if is_tar(path):
            parts = _components(without_packing(path))
            by_name[parts[0]].append((shard, parts))
    matches: dict[str, int] = {}
    claims: defaultdict[int, list[tuple[int, str]]] = defaultdict(list)  # number of equal components, and home
    for home in asked:
        wanted = _components(home)
        if home in matches or wanted[0] not in by_name:
            continue
        candidates = by_name[wanted[0]]
        agreements = [_agreement(wanted, parts) for _, parts in candidates]
        best = max(agreements)
        fitting = [shard for (shard, _), agreed in zip(candidates, agreements, strict=True) if agreed == best]
        if len(fitting) > 1 and preferred is not None:
            fitting = [shard for shard in fitting if shard in preferred]
        matches[home] = fitting[0] if len(fitting) == 1 else AMBIGUOUS
        if len(fitting) == 1:
            claims[fitting[0]].append((best, home))
    for rivals in claims.values():  # of several homes, a shard goes to the one that agrees longest, or to none
        best = max(agreed for agreed, _ in rivals)
        winners = [home for agreed, home in rivals if agreed == best]
        for agreed, home in rivals:
            if agreed < best:
                del matches[home]
            elif len(winners) > 1:
                matches[home] = AMBIGUOUS
    return matches


def _agreement(left: list[str], right: list[str]) -> int:
    return len([*takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))])
