"""Match: which entries of a list stand in which captions (map). Plans with different settings share it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog.catalog import Catalog, Part, RowGroup, Snapshot, read_captions
from tailwise.catalog.concepts import Concepts
from tailwise.catalog.drops import Survivors
from tailwise.catalog.files import digest
from tailwise.catalog.matches import Found, Matches, matches_artifact, read_entry_table
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.base import Needs, Task, Worker
from tailwise.kernels.matching import EntryMatcher, number_forms
from tailwise.storage.delimited import parse_json, read_text

MAX_ENTRIES = 5_000_000


@dataclass(frozen=True)
class MatchedPool:
    """The matches of those samples that take part."""

    catalog: Catalog
    snapshot: Snapshot
    survivors: Survivors
    matches: Matches | Concepts

    def parts(self) -> Iterator[tuple[Part, Found]]:
        """Part by part: how many entries each row has, and which."""
        for part in self.catalog.parts(self.snapshot):
            yield part, self.matches.part(part, self.survivors.keeps(part.span))

    def matched(self) -> int:
        """Return how many samples have an entry."""
        return sum(int(np.count_nonzero(of_row)) for _, (of_row, _) in self.parts())

    def count(self) -> tuple[npt.NDArray[np.int64], int]:
        """In how many captions each entry stands, int64 [K]; and how many samples have an entry.

        Raises:
            UserError: none has.
        """
        counts = np.zeros(len(self.matches.entries), np.int64)
        matched = 0
        for _, (of_row, entries) in self.parts():
            counts += np.bincount(entries, minlength=len(counts))
            matched += int(np.count_nonzero(of_row))
        if not matched and isinstance(self.matches, Concepts):
            raise UserError(
                f"none of the samples that take part has a concept of {self.matches.name!r}: use other lists"
            )
        if not matched:
            raise UserError(
                f"not one caption holds one of the {len(counts):,} entries, such as {self.matches.entries[0]!r}: "
                "compare the list with the captions (case counts, unless `ignore_case`)"
            )
        return counts, matched


def match_entries(
    catalog: Catalog,
    path: Path,
    *,
    ignore_case: bool = False,
    plurals: bool = False,
    snapshot: Snapshot | None = None,
    workers: int | None = None,
    context: Context | None = None,
) -> Matches:
    """Matches the captions of a snapshot against the entries of a file; opens what an earlier call with the same has made.

    Args:
        catalog: with samples.
        path: see `read_entries`.
        ignore_case: compare in lower case.
        plurals: see `read_entries`.
        snapshot: whose captions; the newest by default.
        workers: processes; one a processor by default. Each holds the automaton: about 300 bytes per character of the entries.
        context: runs the tasks and shows progress.

    Raises:
        UserError: the file can't be read, or holds no entry, or too many.
    """
    spellings = read_entries(path, ignore_case=ignore_case, plurals=plurals)
    snapshot = snapshot or catalog.snapshot()
    config = {"ignore_case": ignore_case, "snapshot": snapshot.number}
    inputs = {"snapshot": snapshot.id, "entries": spellings_digest(spellings)}
    with matches_artifact(catalog, config, inputs) as artifact:
        if not artifact.done:
            matches = Matches(artifact.folder, artifact.place.name, spellings)
            _match(catalog, matches, snapshot, ignore_case, workers, context or Context())
            artifact.finish({"entries": len(matches.entries)})
    return Matches(artifact.folder, artifact.place.name, spellings)


def read_entries(path: Path, *, ignore_case: bool = False, plurals: bool = False) -> dict[str, int]:
    r"""Return each spelling of the entries of a file and the number of its entry, in the order of the file, without blank ones.

    Args:
        path: text, one entry a line, blanks round it don't count; or .json, a list of strings, as MetaCLIP's metadata.json, taken as is.
            An entry is named by the first of its spellings: "shirt|shirts" on a line, where "\|" is a bar of the spelling itself; in
            .json, a list of strings. What follows a tab in a line is a remark.
        ignore_case: turn them into lower case.
        plurals: add the `number_forms` of each spelling, unless they are spelled by another entry, or are a form of an earlier one.

    Raises:
        UserError: the file can't be read, or holds no entry, or too many; two entries have the same spelling.
    """
    try:
        text = read_text(path)
        listed = parse_json(text) if path.suffix.lower() == ".json" else list(map(_spellings, text.split("\n")))
        if not isinstance(listed, list) or not all(
            isinstance(each, str) for each in chain.from_iterable(map(_as_list, listed))
        ):
            raise UserError(f"{path} is not a JSON list of strings, or of lists of strings")
        lines: list[list[str]] = list(map(_as_list, listed))
        "".join(chain.from_iterable(lines)).encode()  # JSON can hold half a character
        folded = (tuple(each.lower() if ignore_case else each for each in line if each.strip()) for line in lines)
        entries = [line for line in dict.fromkeys(folded) if line]
        spellings = number_spellings(entries, plurals=plurals)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as a list of entries: {error}") from error
    if not 1 <= len(entries) <= MAX_ENTRIES:
        raise UserError(f"{path} holds {len(entries):,} entries: give 1 to {MAX_ENTRIES:,}, one a line")
    return spellings


def _as_list(entry: Any) -> list[Any]:  # noqa: ANN401  (of JSON)
    return entry if isinstance(entry, list) else [entry]


def _spellings(line: str) -> list[str]:
    """Return the spellings of a line: "shirt|shirts", and a remark after a tab."""
    spellings = [each.strip().replace(r"\|", "|") for each in re.split(r"(?<!\\)\|", line.strip().partition("\t")[0])]
    if len(spellings) > 1 and "" in spellings:
        raise ValueError(rf"nothing stands beside a | of {line!r}: write \| for a bar that belongs to the entry")
    return spellings


def number_spellings(entries: Iterable[Sequence[str]], *, plurals: bool = False) -> dict[str, int]:
    """Return each spelling and the number of its entry; see `read_entries`. A ValueError names a spelling of two entries."""
    numbers: dict[str, int] = {}
    for number, spellings in enumerate(entries):
        for spelling in spellings:
            if numbers.setdefault(spelling, number) != number:
                raise ValueError(f"{spelling!r} spells two entries: give it to one of them")
    for spelling, number in list(numbers.items()) if plurals else ():
        for form in number_forms(spelling):
            numbers.setdefault(form, number)
    return numbers


def spellings_digest(spellings: Mapping[str, int]) -> str:
    """Return the hash of a list of entries; of a list without synonyms, the one that earlier versions gave it."""
    plain = list(spellings.values()) == list(range(len(spellings)))
    return digest(list(spellings) if plain else list(spellings.items()))


@dataclass(frozen=True)
class _Match(Task[RowGroup, Found]):
    entries: Path
    ignore_case: bool

    def run(self, item: RowGroup, worker: Worker) -> Found:
        def make() -> EntryMatcher:
            return EntryMatcher(*read_entry_table(self.entries), ignore_case=self.ignore_case)

        return worker.cached(self, make)(read_captions(item))


def _match(
    catalog: Catalog, matches: Matches, snapshot: Snapshot, ignore_case: bool, workers: int | None, context: Context
) -> None:
    """Write the list, and the matches of all parts that do not exist yet."""
    task = _Match(matches.write_entries(), ignore_case)
    parts = [
        part for part in catalog.parts(snapshot) if not all(column.path(part).exists() for column in matches.columns)
    ]
    groups = [catalog.row_groups([part]) for part in parts]
    results = context.map(task, list(chain(*groups)), "matching captions", Needs(workers=workers))
    for part, mine in zip(parts, groups, strict=True):
        found = list(islice(results, len(mine)))
        for number, column in enumerate(matches.columns):
            column.write(part, np.concatenate([np.empty(0, np.int32), *(arrays[number] for arrays in found)]))
    next(results, None)  # ends the bar
