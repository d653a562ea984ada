"""Names of samples in files made elsewhere, by hash, on disk: which samples of a snapshot they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog.catalog import Catalog, Part, Snapshot
from tailwise.catalog.files import create_array
from tailwise.catalog.noted import NOTED, hex_bytes, noted_hashes
from tailwise.errors import UserError
from tailwise.execution.keys import ABSENT, HASH, KeyIndex, as_hashes, hash_keys
from tailwise.shards.noted import hashes_of_part
from tailwise.storage.local import remove_folder

Names = Sequence[str] | npt.NDArray[Any]  # texts; or uids as HASH
Entries = tuple[Names, npt.NDArray[np.float64] | None]  # names, and the values of all or none
EXAMPLES = 1 << 16  # names that are kept as text, for errors
OF_ONE_SAMPLE = ("key", "image_path", "shard")  # kinds of names: two samples of one such name are not separated


def name_hashes(kind: str, names: Names) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Return the hash of each name, HASH [n], and which are names of this kind, bool [n].

    Kinds: uid, key, image_path, shard (its path, a tab, the key), and those of NOTED.
    """
    if isinstance(names, np.ndarray):
        return names, np.ones(len(names), np.bool_)
    if kind in NOTED:
        return as_hashes(noted_hashes(kind, pa.array(names, pa.string())))
    if kind != "uid":
        return hash_keys(names), np.ones(len(names), np.bool_)
    found, good = hex_bytes(pa.array(names, pa.string()), 32)
    hashes = np.zeros(len(names), HASH)
    hashes[good] = np.ascontiguousarray(found).view(HASH).ravel()
    return hashes, good


def sample_hashes(catalog: Catalog, part: Part, kind: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Return the hash of the name of each sample of a part, HASH [rows], and which samples have one, bool [rows]."""
    if kind in NOTED:
        return hashes_of_part(catalog, part, kind)
    if kind == "uid":
        return as_hashes(catalog.samples(part, ["uid"]).column(0))
    samples = catalog.samples(part, ["shard", "key"])
    keys: list[str] = samples.column("key").to_pylist()
    if kind == "shard":
        paths = catalog.shards().column("path").take(samples.column("shard").combine_chunks()).to_pylist()
        keys = [place_name(path, key) for path, key in zip(paths, keys, strict=True)]
    return hash_keys(keys), np.ones(part.rows, np.bool_)


def place_name(shard: str, key: str) -> str:
    """Return the name of kind "shard" of a sample, from the path of its shard and its key."""
    return f"{shard}\t{key}"


def sample_name(catalog: Catalog, part: Part, at: int, kind: str) -> str:
    """Return what a sample is called in errors about names of a kind: its uid or key."""
    (found,) = catalog.samples_at(part.number, np.array([at]), ["key", "uid"]).to_pylist()
    return str(found["uid"].hex() if kind == "uid" else found["key"])


class NameIndex(KeyIndex):
    """The names of a file by hash: about 50 bytes a name on disk, one bucket in memory at a time. `seal` it after the last `take`.

    Attributes:
        count: names that the file gives, repeated ones among them.
        copies: how often each name is given, uint32 [count], at the place of the first; 0 at other places.
        used: samples that have each name, uint32 [count], at the place of the first.
    """

    def __init__(self, folder: Path, names: int, *, paired: bool = False) -> None:
        """Begin an empty index in a folder that does not exist yet, for about that number of names; `paired` for `pair`."""
        super().__init__(folder, names)
        self.count = 0
        self.paired, self._heads = paired, dict[int, int]()
        self._examples: list[tuple[str, int]] = []
        self._values = (folder / "values").open("wb")

    def take(self, kind: str, names: Names, values: npt.NDArray[np.float64] | None = None) -> None:
        """Add names of a kind, in the order of the file, and their values [n], which all or none have."""
        hashes, good = name_hashes(kind, names)
        numbers = np.arange(self.count, self.count + len(hashes))
        for at in range(min(len(names), EXAMPLES - len(self._examples))):
            name = names[at]
            self._examples.append((name if isinstance(name, str) else name.tobytes().hex(), self.count + at))
        self.add(hashes[good], numbers[good])
        if values is not None:
            self._values.write(np.ascontiguousarray(values, np.float64).data)
        self.count += len(hashes)

    def seal(self, *_: Any, **__: Any) -> int:  # noqa: ANN401  (as KeyIndex)
        """Sort the names; return how many are given again. Then `find` works: it returns the place of the first of equal names."""
        self._values.close()
        self.copies = create_array(self.folder / "copies.npy", (self.count,), np.uint32)
        self.used = create_array(self.folder / "used.npy", (self.count,), np.uint32)
        if self.paired:
            self._next = create_array(self.folder / "next.npy", (self.count,), np.int64)
            self._next[:] = ABSENT
        distinct = 0
        for bucket in range(self._shuffle.buckets):
            entries = self._sorted(bucket)[0]
            other = np.ones(len(entries), np.bool_)
            other[1:] = (entries["high"][1:] != entries["high"][:-1]) | (entries["low"][1:] != entries["low"][:-1])
            first = np.flatnonzero(other)
            self.copies[entries["row"][first]] = np.diff(np.append(first, len(entries)))
            if self.paired:
                self._next[entries["row"][:-1][~other[1:]]] = entries["row"][1:][~other[1:]]
            self._write(bucket, entries)
            distinct += len(first)
        remove_folder(self._shuffle.folder)
        return self.count - distinct

    @cached_property
    def values(self) -> npt.NDArray[np.float64]:
        """The values, float64 [count], mapped; the copies of each name where the file gives no values."""
        path = self.folder / "values"
        return np.memmap(path, np.float64, "r") if path.stat().st_size else np.asarray(self.copies, np.float64)

    def note(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Note that samples have some names; return which names had one before, or have several of these: bool [n]."""
        places, first, counts = np.unique(numbers, return_index=True, return_counts=True)
        again: npt.NDArray[np.bool_] = np.ones(len(numbers), np.bool_)
        np.put(again, first, self.used[places] > 0)
        self.used[places] += counts.astype(np.uint32)
        return again

    def pair(self, numbers: npt.NDArray[np.int64], again: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Return a place of its own for each sample [n], from that of the first of its equal names, and whether one had it before.

        The first of several samples of one name gets its first place, and so on; ABSENT where no place is left.
        """
        found = np.where(again, ABSENT, numbers)
        for at in np.flatnonzero(self.copies[numbers] > 1).tolist():
            first = int(numbers[at])
            found[at] = place = self._heads.get(first, first)
            self._heads[first] = int(self._next[place]) if place >= 0 else ABSENT
        return found

    @property
    def distinct(self) -> int:
        """Number of distinct names; each that is no name of its kind counts."""
        return int(np.count_nonzero(self.copies)) + self.count - int(self.copies.sum())

    @property
    def matched(self) -> int:
        """Number of distinct names that a sample has."""
        return int(np.count_nonzero(self.used))

    @property
    def unknown(self) -> int:
        """Number of names that no sample has, repeated ones among them."""
        return self.count - int(self.copies[np.flatnonzero(self.used)].sum())

    @property
    def example(self) -> str | None:
        """The first name that no sample has, if it is among the first EXAMPLES."""
        some = self.copies.any()  # else not one is a name of its kind
        return next((name for name, at in self._examples if not self.used[at] and (self.copies[at] or not some)), None)


def named_rows(
    catalog: Catalog, snapshot: Snapshot, kind: str, index: NameIndex
) -> Iterator[tuple[Part, npt.NDArray[np.int64]]]:
    """Yield the parts of a snapshot, and the place in the index of the name of each row: int64 [rows], ABSENT for none.

    Rows of replaced files have no name. A UserError if several samples have one key (see OF_ONE_SAMPLE).
    """
    replaced = catalog.replaced_rows(snapshot)
    for part in catalog.parts(snapshot):
        hashes, there = sample_hashes(catalog, part, kind)
        there = there & ~np.isin(np.arange(part.first_row, part.span.stop), replaced)
        numbers = np.where(there, index.find(hashes), ABSENT)
        hits = np.flatnonzero(numbers >= 0)
        again = index.note(numbers[hits])
        if kind in OF_ONE_SAMPLE and again.any():
            name = sample_name(catalog, part, int(hits[again][0]), kind)
            raise UserError(f"the key {name!r} belongs to several samples: name them by uid, or by shard and key")
        if index.paired:
            numbers[hits] = index.pair(numbers[hits], again)
        yield part, numbers


@dataclass(frozen=True)
class Matched:
    """Names of a file, matched to the samples of a snapshot.

    Attributes:
        kind: of the names.
        index: sealed, with the names that samples have noted.
        parts: of the snapshot.
        places: place in the index of the name of each row, int64 [N], mapped; ABSENT for none.
    """

    kind: str
    index: NameIndex
    parts: Sequence[Part]
    places: npt.NDArray[np.int64]

    def rows(self) -> Iterator[tuple[Part, npt.NDArray[np.int64]]]:
        """Yield the parts and their places, as `named_rows`."""
        return ((part, self.places[part.span]) for part in self.parts)


def match_names(
    catalog: Catalog,
    snapshot: Snapshot,
    kinds: Iterable[str],
    entries: Callable[[str], Iterable[Entries]],
    work: Path,
    *,
    paired: bool = False,
) -> Matched:
    """Return the names of a file by the kind of which samples have most, of some kinds; the first of equal ones.

    No other kind is tried once samples have all names, none of them twice. A kind of which several samples have one name (see `named_rows`)
    is left out, if names of another kind belong to samples.

    Args:
        catalog: with the samples.
        snapshot: whose rows.
        kinds: kinds of names, at least one.
        entries: returns the names of a kind, in batches.
        work: a folder for the indexes, and for the places.
        paired: give each of several samples of one name a place of its own (see `NameIndex.pair`).

    Raises:
        UserError: several samples have one name, and not one sample has a name of another kind.
    """
    best: Matched | None = None
    most, fault = 0, None
    for kind in kinds:
        index = NameIndex(work / kind, snapshot.rows, paired=paired)
        for names, values in entries(kind):
            index.take(kind, names, values)
        index.seal()
        found = Matched(
            kind, index, catalog.parts(snapshot), create_array(work / f"{kind}.npy", (snapshot.rows,), np.int64)
        )
        try:
            for part, numbers in named_rows(catalog, snapshot, kind, index):
                found.places[part.span] = numbers
        except UserError as error:
            fault = fault or error
            continue
        count = int((found.places >= 0).sum()) if paired else index.matched
        loser, best = (best, found) if count > most or not most else (found, best)
        if loser is not None:
            remove_folder(loser.index.folder)
        most = max(most, count)
        if count == index.count:
            break
    if fault is not None and not most:
        raise fault
    assert best is not None
    return best
