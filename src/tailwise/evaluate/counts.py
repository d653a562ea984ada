"""Training samples of each class: from a file, or by a search for its names in a pool's captions (map, then reduce)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog.catalog import Catalog, RowGroup, read_captions
from tailwise.catalog.concepts import Concepts
from tailwise.catalog.row_lists import places_of_lists
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.base import Needs, Task, Worker
from tailwise.kernels.matching import EntryMatcher, space_out
from tailwise.storage.delimited import parse_json, read_rows, read_text

INDEX_COLUMN = "class_index"
NAME_COLUMNS = ("name", "class")
COUNT_COLUMNS = ("train_count", "count")
_SHOWN = 3  # names


def read_train_counts(path: Path, classes: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return the training samples of each class from a file: int64 [C], for C class names by index.

    The file is CSV or TSV with a header (`class_index`, `name` or `class`, and `train_count` or `count`), or JSON (an object of numbers by
    class name, as in bethgelab/frequency_determines_performance, or a list by class index). A class that the file does not name as the
    set does gets the count of the one name that differs in case and punctuation alone: `basset_hound` for `Basset Hound`. Raise a UserError
    if the file cannot be read, has a class twice or not at all, or a count is not a whole number of 0 or more.
    """
    rows: list[tuple[int | str, Any]]
    try:
        if path.suffix.lower() != ".json":
            rows = _from_table(path.expanduser())
        elif isinstance(value := parse_json(read_text(path.expanduser())), list | dict):
            rows = list(value.items() if isinstance(value, dict) else enumerate(value))
        else:
            what = "neither an object of counts by class name nor a list of counts"
            raise UserError(f"{path} holds {what}: give one of them")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as training counts: {error}") from error
    known: dict[int | str, list[int]] = {}
    for index, name in enumerate(classes):
        known.setdefault(name, []).append(index)
    counts = np.full(len(classes), -1, np.int64)
    spelt = _respelt(rows, classes)
    for key, value in rows:
        if isinstance(key, int) and not 0 <= key < len(classes):
            raise UserError(f"{path} counts class {key}: the set has classes 0 … {len(classes) - 1}")
        for index in [key] if isinstance(key, int) else known.get(spelt.get(key, key), ()):
            if counts[index] >= 0:
                raise UserError(f"{path} counts {key!r} twice: give each class once")
            try:
                number = int(value)
            except (TypeError, ValueError, OverflowError):
                number = -1
            if not 0 <= number < 1 << 63 or (isinstance(value, float) and value != number):
                raise UserError(f"{path} counts {key!r} as {value!r}: must be a whole number, 0 or more")
            counts[index] = number
    if absent := [classes[index] for index in np.flatnonzero(counts < 0).tolist()]:
        missing = (
            f"no count for {len(absent):,} of {len(classes):,} classes, such as {', '.join(map(repr, absent[:_SHOWN]))}"
        )
        others = [repr(key) for key, _ in rows if isinstance(key, str) and spelt.get(key, key) not in known][:_SHOWN]
        named = f" (it names no class by {', '.join(others)})" * bool(others)
        raise UserError(f"{path} has {missing}{named}: give 0 for a class never seen")
    return counts


def _respelt(rows: Sequence[tuple[int | str, Any]], classes: Sequence[str]) -> dict[int | str, str]:
    """Return the class of each name of a file that no class has as it is, and that is one's but for case and punctuation."""
    given = {key for key, _ in rows if isinstance(key, str)}
    wanted, there = dict[str, set[str]](), dict[str, set[str]]()
    for names, found in ((set(classes) - given, wanted), (given - set(classes), there)):
        for name in names:
            found.setdefault(re.sub(r"[\W_]+", " ", name).strip().casefold(), set()).add(name)
    alone = (plain for plain in there if len(there[plain]) == 1 and len(wanted.get(plain, ())) == 1)
    return {name: each for plain in alone for name in there[plain] for each in wanted[plain]}


def _from_table(path: Path) -> list[tuple[int | str, Any]]:
    rows = read_rows(path)
    _, names = next(rows, (0, [""]))
    counted = next((name for name in COUNT_COLUMNS if name in names), None)
    named = next((name for name in (INDEX_COLUMN, *NAME_COLUMNS) if name in names), None)
    if counted is None or named is None:
        needed = f"{INDEX_COLUMN} or {' or '.join(NAME_COLUMNS)}, and {' or '.join(COUNT_COLUMNS)}"
        raise UserError(f"{path} has columns {', '.join(names)}: give {needed}")
    if again := [name for name in (named, counted) if names.count(name) > 1]:
        raise UserError(f"{path} has {names.count(again[0])} columns called {again[0]!r}: give it one")
    key, value = names.index(named), names.index(counted)
    return [(int(row[key]) if named == INDEX_COLUMN else row[key], row[value]) for _, row in rows]


def count_in_pool(
    folder: Path, classes: Sequence[str], *, workers: int | None = None, context: Context | None = None
) -> npt.NDArray[np.int64]:
    """Return the number of captions in a pool's newest snapshot that name each class: int64 [C].

    Captions and names are compared in lower case. A caption names a class if one of the class's comma-separated names ("tabby, tabby cat")
    occurs as whole words, by the rule of `EntryMatcher`. A caption counts once for each class it names. Raise a UserError if there is no
    catalog.
    """
    catalog = Catalog.open(folder)
    groups = catalog.row_groups(catalog.parts())
    found = (context or Context()).map(_Count(tuple(classes)), groups, "matching captions", Needs(workers=workers))
    return sum(found, np.zeros(len(classes), np.int64))


def count_concepts(folder: Path, name: str, classes: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return the number of samples that have each class among the concepts of their lists: int64 [C].

    Names are compared in lower case. A concept is a class if it is one of the class's comma-separated names ("tabby, tabby cat"). A sample
    counts once for each class. Raise a UserError if there is no catalog, or no lists of this name.
    """
    concepts = Concepts(Catalog.open(folder), name)
    owners: dict[str, list[int]] = {}
    for index, synonyms in enumerate(classes):
        for synonym in synonyms.lower().split(","):
            owners.setdefault(synonym.strip(), []).append(index)
    found = [dict.fromkeys(owners.get(entry.lower(), ())) for entry in concepts.entries]
    firsts = np.cumsum([0, *map(len, found)])[:-1]
    lengths = np.array(list(map(len, found)), np.int64)
    owned = np.array([index for each in found for index in each], np.int64)
    counts = np.zeros(len(classes), np.int64)
    for part in concepts.catalog.parts(concepts.snapshot):
        of_row, entries = concepts.part(part, np.ones(part.rows, np.bool_))
        mine = lengths[entries]
        rows = np.repeat(np.repeat(np.arange(part.rows), of_row), mine)
        pairs = np.unique(rows * len(classes) + owned[places_of_lists(firsts[entries], mine)])
        counts += np.bincount(pairs % len(classes), minlength=len(classes))
    return counts


@dataclass(frozen=True)
class _Count(Task[RowGroup, npt.NDArray[np.int64]]):
    """Count the captions that name each class, int64 [C]."""

    classes: tuple[str, ...]

    def run(self, item: RowGroup, worker: Worker) -> npt.NDArray[np.int64]:
        matcher, owners = worker.cached(self, self._matcher)
        counts, entries = matcher(read_captions(item))
        rows = np.repeat(np.arange(len(counts)), counts)
        named = zip(rows.tolist(), entries.tolist(), strict=True)
        pairs = {(row, owner) for row, entry in named for owner in owners[entry]}
        return np.bincount(np.array([owner for _, owner in pairs], np.int64), minlength=len(self.classes))

    def _matcher(self) -> tuple[EntryMatcher, list[list[int]]]:
        """Return the automaton of all names, and the classes that each of its entries names."""
        owners: dict[str, list[int]] = {}
        for index, synonyms in enumerate(self.classes):
            for synonym in dict.fromkeys(synonyms.split(",")):
                # Captions get the same spaces, so that names with a full stop or a colon match.
                entry = space_out(synonym.lower().encode()).decode().strip()
                if entry:
                    owners.setdefault(entry, []).append(index)
        return EntryMatcher(list(owners), ignore_case=True), [list(dict.fromkeys(found)) for found in owners.values()]
