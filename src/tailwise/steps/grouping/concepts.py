"""Concepts: several a sample, from tables, from the JSON in tars, from captions, or those that other lists agree on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.types as pat

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Catalog, Part, Snapshot
from tailwise.catalog.columns import PartColumn
from tailwise.catalog.concepts import Concepts, concept_columns
from tailwise.catalog.files import digest, file_digest, write_table
from tailwise.catalog.kinds import CONCEPTS, LISTED
from tailwise.catalog.matches import Found
from tailwise.catalog.rejections import Rejections, RejectionWriter
from tailwise.context import Context
from tailwise.errors import UserError, check_share
from tailwise.requests import ConceptsRequest, refuse_given
from tailwise.shards.columns import unwrapped
from tailwise.shards.members import JSON_FIELD, MemberChoice, value_at
from tailwise.shards.noted import jsons_of
from tailwise.steps.grouping.match import MAX_ENTRIES, match_entries, read_entries, spellings_digest
from tailwise.steps.importing.captions import (
    KINDS,
    TextTable,
    choose_columns,
    find_text_tables,
    join_texts,
    joined_texts,
    make_row_lists,
    text_sizes,
)
from tailwise.steps.importing.joining import Wording
from tailwise.storage.delimited import parse_json
from tailwise.text import is_unicode

COLUMNS = ("concepts", "tags", "entities", "labels", "classes")  # that hold lists, where the user names none
WORDING = Wording("lists of concepts", "list of concepts", "joining concepts")
LISTS_AT_ONCE = 8192


@dataclass
class MadeConcepts:
    """Result of making lists of concepts.

    Attributes:
        concepts: what was made.
        rejections: rows of the tables that no sample got, by reason.
    """

    concepts: Concepts
    rejections: Rejections = field(default_factory=Rejections)


def make_concepts(
    catalog: Catalog | str | Path,
    sources: Sequence[str | Path],
    request: ConceptsRequest,
    context: Context | None = None,
) -> MadeConcepts:
    """Make lists of concepts for the samples of the newest snapshot; open those that were made of the same.

    A list holds each concept once. Concepts are numbered in the order of their names, by code point.

    Args:
        catalog: or its path; with samples.
        sources: tables as of `join_captions`, whose column holds lists of texts or whole numbers: Parquet lists, or JSON lists in
            text. Or one text json:FIELD, a field of each sample's JSON. None for `entries` and `both`.
        request: name of the lists, and what they are made from.
        context: runs the tasks and shows progress.

    Raises:
        UserError: a source cannot be read, no or too few samples have a concept, or too many rows are unusable.
    """
    context = context or Context()
    catalog = Catalog.open(catalog)
    check_share(request.max_rejected)
    check_share(request.max_misses, "max_misses")
    if bool(sources) == (request.entries is not None or bool(request.both)):
        raise UserError("give one of a TABLE, json:FIELD, `entries` FILE, and `both` NAME twice")
    snapshot = catalog.snapshot()
    config, inputs, maker = _maker(catalog, snapshot, [str(source) for source in sources], request)

    def write(artifact: Artifact, work: Path, log: RejectionWriter) -> dict[str, int]:
        job = _Job(catalog, snapshot, work, context)
        return _write(artifact, job, maker(job, log), request.max_misses)

    made = make_row_lists(CONCEPTS, catalog, request.name, config, inputs, write)
    return MadeConcepts(Concepts(catalog, request.name), made)


@dataclass(frozen=True)
class _Job:
    """Whose lists are made, and a folder for the work."""

    catalog: Catalog
    snapshot: Snapshot
    work: Path
    context: Context

    @property
    def parts(self) -> list[Part]:
        return self.catalog.parts(self.snapshot)


@dataclass(frozen=True)
class _Lists:
    """Lists of a snapshot, whose concepts are numbered as they were found."""

    names: Sequence[str]  # of the concepts
    part: Callable[[Part], Found]  # each concept once in a list


_Maker = Callable[[_Job, RejectionWriter], _Lists]


def _maker(
    catalog: Catalog, snapshot: Snapshot, sources: Sequence[str], request: ConceptsRequest
) -> tuple[dict[str, Any], dict[str, str], _Maker]:
    """Return the configuration and the inputs that decide the lists, and what makes them."""
    fold = {"ignore_case": True} if request.ignore_case else {}
    if request.both:
        others = [Concepts(catalog, name) for name in request.both]
        for other in others:
            other.check_covers(snapshot)
        inputs = {LISTED + other.name: other.id for other in others}
        return {"both": list(request.both)}, inputs, lambda *_: _agreed(others)
    if request.entries is not None:
        path = request.entries
        matching = {"ignore_case": request.ignore_case, "plurals": request.plurals}
        inputs = {"entries": spellings_digest(read_entries(path, **matching))}
        config = {"by": "caption", **({"plurals": True} if request.plurals else {}), **fold}
        return config, inputs, lambda job, _: _matched(job, path, request)
    if any(source.startswith(JSON_FIELD) for source in sources):
        refuse_given(request, {"by", "id_column", "column"}, f"with {sources[0]}")
        fields = MemberChoice.given(None, sources[0]).fields if len(sources) == 1 else ()
        if len(fields) != 1 or "," in sources[0]:
            raise UserError(
                f"{', '.join(sources)}: give one field of the JSON, such as json:tags, and no table beside it"
            )
        return {"by": "json", "column": fields[0], **fold}, {}, lambda job, _: _of_jsons(job, fields[0], request)
    paths = find_text_tables(sources)
    by, id_column, column = choose_columns(paths[0], request, COLUMNS)
    tables = [_ListTable(path, id_column, column, KINDS[by], WORDING.stage) for path in paths]
    inputs = {"tables": digest(list(map(file_digest, paths)))}
    config = {"by": by, "id_column": id_column, "column": column, **fold}
    return config, inputs, lambda job, log: _of_tables(job, tables, log, request)


class _ListTable(TextTable):
    """A table of lists, of Parquet or of JSON in text; read as JSON."""

    def texts_of(self, values: pa.Array) -> pa.Array:
        """Return values of the column as JSON."""
        plain = unwrapped(values)
        if pat.is_list(plain.type) or pat.is_large_list(plain.type) or pat.is_fixed_size_list(plain.type):
            listed = (None if value is None else json.dumps(value, default=_text) for value in plain.to_pylist())
            return pa.array(listed, pa.string())
        return super().texts_of(values)

    def names(self) -> Iterable[pa.Array]:
        """Yield the identifiers, without the lists."""
        return (names for names, _ in TextTable(self.path, self.id_column, self.id_column, self.naming).batches())


def _text(value: object) -> str:
    """Return bytes as text; a ValueError for what JSON has no form for."""
    if isinstance(value, bytes):
        return value.decode()
    raise ValueError(f"a list holds {value}, which is neither a text nor a whole number")


class _Spill:
    """Lists as they are found, on disk, with the concepts numbered as they come."""

    def __init__(self, folder: Path, *, ignore_case: bool) -> None:
        self._numbers: dict[str, int] = {}
        self._columns = PartColumn(folder, layout.ENTRY_COUNT), PartColumn(folder, layout.ENTRY)
        self._ignore_case = ignore_case

    def lists(self) -> _Lists:
        """Return what was written."""
        counts, numbers = self._columns
        return _Lists(list(self._numbers), lambda part: (counts.read(part), numbers.read(part)))

    def write(self, part: Part, there: npt.NDArray[np.bool_], lists: Iterable[object], source: str) -> None:
        """Write the lists of a part, of the rows that are `there`; a UserError names the source of one that is none."""
        lengths, numbers = [], list[npt.NDArray[np.int64]]()
        waiting = iter(lists)
        while some := list(islice(waiting, LISTS_AT_ONCE)):
            found = [self._numbers_of(each, source) for each in some]
            lengths += list(map(len, found))
            numbers.append(np.array([number for each in found for number in each], np.int64))
        counts = np.zeros(part.rows, np.int64)
        counts[there] = lengths
        for column, values in zip(self._columns, _distinct(counts, np.concatenate([*numbers, _NONE])), strict=True):
            column.write(part, values)
        if len(self._numbers) > MAX_ENTRIES:
            raise UserError(f"{source} has more than {MAX_ENTRIES:,} different concepts: give fewer")

    def _numbers_of(self, value: object, source: str) -> list[int]:
        listed = [] if value is None else value
        if not isinstance(listed, list):
            raise _no_list(source, value)
        numbers = []
        for each in listed:
            if each is None:
                continue
            if isinstance(each, bool) or not isinstance(each, str | int) or not is_unicode(str(each)):
                raise _no_list(source, value)
            if name := (str(each).lower() if self._ignore_case else str(each)).strip():
                numbers.append(self._numbers.setdefault(name, len(self._numbers)))
        return numbers


_NONE = np.empty(0, np.int64)


def _no_list(source: str, value: object) -> UserError:
    shown = json.dumps(value)
    shown = shown if len(shown) <= 80 else f"{shown[:80]}…"
    return UserError(f'{source} holds {shown}: give lists of texts or whole numbers, such as ["dog", "grass"]')


def _distinct(counts: npt.NDArray[np.int64], numbers: npt.NDArray[np.int64]) -> Found:
    """Return lists with each number once, ascending."""
    pairs = np.unique(np.repeat(np.arange(len(counts)), counts) << 32 | numbers)
    return np.bincount(pairs >> 32, minlength=len(counts)).astype(np.int32), (pairs & 0xFFFFFFFF).astype(np.int32)


def _of_tables(job: _Job, tables: Sequence[_ListTable], log: RejectionWriter, request: ConceptsRequest) -> _Lists:
    items, join = join_texts(
        job.catalog, job.snapshot, tables, request.max_rejected, job.work, log, job.context, WORDING
    )
    spill, column = _Spill(job.work, ignore_case=request.ignore_case), tables[0].column
    source = f"column {column!r} of {tables[0].path}" if len(tables) == 1 else f"column {column!r} of the tables"
    for item in job.context.progress(items, "reading lists", len(items)):
        texts = (text for pieces in joined_texts(join, item) for text in pieces)
        spill.write(item[0], text_sizes(join, item) > 0, (_parsed(bytes(text), source) for text in texts), source)
    return spill.lists()


def _parsed(text: bytes, source: str) -> object:
    try:
        return parse_json(text)
    except ValueError:
        raise _no_list(source, text.decode()) from None


def _of_jsons(job: _Job, name: str, request: ConceptsRequest) -> _Lists:
    spill, source = _Spill(job.work, ignore_case=request.ignore_case), f"{name} of the samples' .json"
    for part in job.context.progress(job.parts, "reading lists", len(job.parts)):
        values = (_field(content, name, source) for _, _, content in jsons_of(job.catalog, part))
        spill.write(part, np.ones(part.rows, np.bool_), values, source)
    return spill.lists()


def _field(content: bytes, name: str, source: str) -> object:
    """Return the list in a field of a sample's JSON, also one that is JSON in text; None where there is no JSON, or no such field."""
    try:
        value = value_at(parse_json(content), name) if content else None
    except ValueError:  # the import has reported it
        return None
    return _parsed(value.encode(), source) if isinstance(value, str) else value


def _matched(job: _Job, path: Path, request: ConceptsRequest) -> _Lists:
    matching = {"ignore_case": request.ignore_case, "plurals": request.plurals, "workers": request.workers}
    matches = match_entries(job.catalog, path, snapshot=job.snapshot, context=job.context, **matching)  # type: ignore[arg-type]
    return _Lists(matches.entries, lambda part: matches.part(part, np.ones(part.rows, np.bool_)))


def _agreed(others: Sequence[Concepts]) -> _Lists:
    """Return the concepts, by name, that all lists of a sample have."""
    names = sorted(set.intersection(*(set(other.entries) for other in others)))
    place = {name: number for number, name in enumerate(names)}
    places = [np.array([place.get(name, -1) for name in other.entries], np.int64) for other in others]

    def agreed(part: Part) -> Found:
        kept, common = np.ones(part.rows, np.bool_), np.empty(0, np.int64)
        for number, (other, numbers) in enumerate(zip(others, places, strict=True)):
            counts, codes = other.part(part, kept)
            mine = numbers[codes]
            pairs = np.sort((np.repeat(np.arange(part.rows), counts) << 32 | mine)[mine >= 0])
            common = np.intersect1d(common, pairs, assume_unique=True) if number else pairs
        return np.bincount(common >> 32, minlength=part.rows).astype(np.int32), (common & 0xFFFFFFFF).astype(np.int32)

    return _Lists(names, agreed)


def _write(artifact: Artifact, job: _Job, lists: _Lists, max_misses: float) -> dict[str, int]:
    """Write the lists with concepts numbered by name, those that a sample has, and their table; return the figures of the summary."""
    counts, listed = np.zeros(len(lists.names), np.int64), 0
    for part in job.parts:
        of_row, numbers = lists.part(part)
        counts += np.bincount(numbers, minlength=len(counts))
        listed += int(np.count_nonzero(of_row))
    rows = job.snapshot.rows
    if not listed or rows - listed > max_misses * rows:
        accept = f" (at most a share of {max_misses:g} is taken for right), or accept it with `max_misses`" * (
            listed > 0
        )
        raise UserError(
            f"{rows - listed:,} of {rows:,} samples have no concept: compare the source with the pool{accept}"
        )
    order = sorted(np.flatnonzero(counts).tolist(), key=lists.names.__getitem__)
    place = np.full(len(counts), -1, np.int64)
    place[order] = np.arange(len(order))
    ends, concepts = concept_columns(artifact)
    for part in job.context.progress(job.parts, "writing concepts", len(job.parts)):
        of_row, numbers = lists.part(part)
        of_row, numbers = _distinct(of_row.astype(np.int64), place[numbers])
        ends.write(part, np.cumsum(of_row, dtype=np.int64))
        concepts.write(part, numbers)
    names = pa.array([lists.names[number] for number in order], pa.string())
    table = pa.table({"concept": names, "count": pa.array(counts[order], pa.int64())})
    write_table(artifact.path(layout.ENTRY_TABLE), table)
    return {"with_concepts": listed, "concepts": len(order), "entries": int(counts.sum())}
