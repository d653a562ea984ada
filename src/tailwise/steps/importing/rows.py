"""Import: from what files name samples by (key, uid, tar and key, metadata file and uid, sha256, url) to rows of the catalog."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.noted import NOTED, noted_hashes
from tailwise.execution.keys import ABSENT, AMBIGUOUS, KeyIndex, as_hashes, hash_keys
from tailwise.shards.columns import DAMAGE
from tailwise.shards.noted import hashes_of_part
from tailwise.sources.embedding_files import NamedRows
from tailwise.sources.paths import Place, dotted_key, homes, in_folder, in_tar, match_tars

ELSEWHERE = -3  # a sample that these files are not for: it has its embedding, or is in another tar
AMBIGUOUS_TAR = -4
Rows = npt.NDArray[np.int64]

# What each index holds of a sample, from its shard, key and uid.
_TEXTS: dict[str, Callable[[int, str, bytes], str]] = {
    "key": lambda shard, key, uid: key,  # noqa: ARG005
    "uid": lambda shard, key, uid: uid.hex(),  # noqa: ARG005
    "place": lambda shard, key, uid: f"{shard}\t{key}",  # noqa: ARG005
}


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
