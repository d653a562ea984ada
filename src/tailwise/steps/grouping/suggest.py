"""Suggest a list of entries: the terms of the captions that end a phrase most often (map and reduce, twice)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.drops import Survivors
from tailwise.catalog.outputs import is_text, writing_output
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.base import Needs, WithWorker, Worker
from tailwise.kernels.matching import EntryMatcher, number_forms
from tailwise.kernels.phrases import shrunk, terms
from tailwise.requests import GroupRequest
from tailwise.steps.grouping.match import number_spellings
from tailwise.steps.planning.grouping import Rows

CANDIDATES = 1 << 18  # terms that are counted at a time, or twice as many
COLLOCATION = 3  # how many times as often as by chance two words stand together, at least
CHUNK = 1 << 16  # captions
_ALL = ""  # no term; under it stand the sums


@dataclass(frozen=True)
class SuggestedEntry:
    """A term, and in how many captions it stands and ends a phrase."""

    entry: str
    captions: int  # that match it as an entry
    ends: int  # that have a phrase that ends with it, as it is spelled


@dataclass(frozen=True)
class Suggestion:
    """A list of entries."""

    captions: int  # that were read
    least: int  # terms that end a phrase in more captions than this are complete; others are not shown
    entries: list[SuggestedEntry]  # by `ends`, then by code point


def suggest_entries(
    catalog: Catalog | str | Path, request: GroupRequest, context: Context | None = None, *, most: int = CANDIDATES
) -> Suggestion:
    """Suggest entries for the newest snapshot: the words, and pairs of words, that end a phrase in most captions.

    Pairs whose words stand together less than COLLOCATION times as often as by chance are left out. With `plurals`, a term is left out
    if a more frequent one is its regular plural or singular. The result does not depend on parts and workers.

    `request`: with `suggest`; the file `output` gets an entry, `captions` and `ends` a line, with tabs between. `most`: terms that a worker
    counts: complete above a share of 1 / `most` of all occurrences at the end of a phrase.

    Raises:
        UserError: no term is frequent enough, or the output cannot be written.
    """
    catalog, context = Catalog.open(catalog), context or Context()
    output = request.output and writing_output(
        request.output, catalog, overwrite=request.overwrite, is_ours=is_text("")
    )
    with output or nullcontext() as file:
        found = _suggest(catalog, request, context, most)
        if file is not None:
            lines = [(item.entry.replace("|", r"\|"), item.captions, item.ends) for item in found.entries]
            file.write_text(
                "".join(f"{entry}\t{captions}\t{ends}\n" for entry, captions, ends in lines), encoding="utf-8"
            )
    return found


def _suggest(catalog: Catalog, request: GroupRequest, context: Context, most: int) -> Suggestion:
    parts, snapshot = catalog.parts(), catalog.snapshot()
    inputs = {"snapshot": snapshot.id, **Survivors(catalog, request.without, snapshot).inputs}
    rows = Rows(catalog.folder, snapshot.number, tuple(request.without), tuple(inputs.items()))
    captions, needs = _Captions(rows, request.ignore_case), Needs(workers=request.workers)
    frequent, counts, ends = Counter[str](), Counter[str](), Counter[str]()
    for some in context.map(WithWorker(partial(captions.frequent, most)), parts, "terms of captions", needs):
        frequent.update(some)
        frequent = shrunk(frequent, most)
    words = frozenset(word for term in frequent for word in (term, *term.split(" ")))
    for found in context.map(WithWorker(partial(captions.count, words)), parts, "captions of terms", needs):
        counts.update(found[0])
        ends.update(found[1])
    read, least = counts.pop(_ALL, 0), ends.pop(_ALL, 0) // (most + 1)
    best = [term for term in sorted(ends, key=lambda term: (-ends[term], term)) if ends[term] > least]
    kept, forms = list[str](), set[str]()
    for term in best:
        pair = [counts[word] for word in term.split(" ")]
        if term not in forms and (len(pair) < 2 or counts[term] * read >= COLLOCATION * pair[0] * pair[1]):
            kept.append(term)
            forms.update(number_forms(term) if request.plurals else ())
        if len(kept) == request.terms:
            break
    if not kept:
        raise UserError(
            f"no term ends a phrase in more than {least:,} of {read:,} captions: there is nothing to suggest"
        )
    if request.plurals:
        spelled = number_spellings([[term] for term in kept], plurals=True)
        task = WithWorker(partial(captions.count_entries, tuple(spelled), tuple(spelled.values())))
        matched = sum(context.map(task, parts, "captions of entries", needs), np.zeros(len(kept), np.int64))
        counts = Counter(dict(zip(kept, matched.tolist(), strict=True)))
    return Suggestion(read, least, [SuggestedEntry(term, counts[term], ends[term]) for term in kept])


@dataclass(frozen=True)
class _Captions:
    """The captions of the samples that take part."""

    rows: Rows
    ignore_case: bool

    def chunks(self, part: Part, worker: Worker) -> Iterator[list[str]]:
        survivors, _ = self.rows.open(worker)
        column = Catalog.open(self.rows.catalog).samples(part, ["caption"]).column(0)
        kept = column.filter(pa.array(survivors.keeps(part.span)))
        for start in range(0, len(kept), CHUNK):
            found: list[str] = kept.slice(start, CHUNK).to_pylist()
            yield [caption.lower() for caption in found] if self.ignore_case else found

    def frequent(self, most: int, part: Part, worker: Worker) -> Counter[str]:
        """Return terms that may end a phrase in many captions of a part; see `shrunk`."""
        found = Counter[str]()
        for caption in chain.from_iterable(self.chunks(part, worker)):
            found.update(term for term, ends in terms(caption).items() if ends)
            if len(found) > 2 * most:
                found = shrunk(found, most)
        return shrunk(found, most)

    def count(self, wanted: frozenset[str], part: Part, worker: Worker) -> tuple[Counter[str], Counter[str]]:
        """Count the captions that each of some terms stands in, and those with a phrase that ends with it; under _ALL, all of both."""
        counts, at_end = Counter[str](), Counter[str]()
        for caption in chain.from_iterable(self.chunks(part, worker)):
            found = terms(caption)
            ends = [term for term, is_end in found.items() if is_end]
            counts.update(wanted.intersection(found))
            at_end.update(wanted.intersection(ends))
            counts[_ALL] += 1
            at_end[_ALL] += len(ends)
        return counts, at_end

    def count_entries(
        self, spellings: tuple[str, ...], entries: tuple[int, ...], part: Part, worker: Worker
    ) -> npt.NDArray[np.int64]:
        """Count the captions of each entry, with all of its spellings: int64 [K]."""
        matcher = worker.cached((self, spellings), lambda: EntryMatcher(spellings, entries))
        counts = np.zeros(max(entries) + 1, np.int64)
        for chunk in self.chunks(part, worker):
            counts += np.bincount(matcher(chunk)[1], minlength=len(counts))
        return counts
