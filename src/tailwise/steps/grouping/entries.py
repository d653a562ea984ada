"""Group by captions: each sample with those that share its rarest entry of a list (map and reduce)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog.catalog import Catalog
from tailwise.catalog.clusterings import RAREST_CONCEPT, RAREST_ENTRY, Clustering
from tailwise.catalog.concepts import Concepts
from tailwise.catalog.kinds import LISTED
from tailwise.context import Context
from tailwise.errors import UserError, check_share
from tailwise.kernels.matching import rarest_entries
from tailwise.requests import GroupRequest, refuse_given
from tailwise.steps.grouping.match import MatchedPool, match_entries, read_entries, spellings_digest
from tailwise.steps.grouping.write import NO_GROUP, Groups, Pool, config_of, make_grouping

MAX_MISSES = 0.5
_SHOWN = 5  # captions and words
_READ_CAPTIONS = 100_000  # without an entry, in which frequent ones are looked for
_CAPTION_CHARACTERS = 60


def group_by_entry(catalog: Catalog, entries: Path, request: GroupRequest, context: Context) -> Clustering:
    """Make the rarest entry in each caption the group of its sample.

    Rarest: in the fewest captions, among those that drop lists and removals leave; of equally rare ones the first of the list. Groups
    are numbered in the order of the list; entries that are the rarest of no caption make none.
    """
    ignore_case, missing = request.ignore_case, request.missing
    if request.allow_misses:
        refuse_given(request, {"max_misses"}, "with `allow_misses`")
    max_misses = 1.0 if request.allow_misses else MAX_MISSES if request.max_misses is None else request.max_misses
    check_share(max_misses, "max_misses")
    snapshot = catalog.snapshot()
    config = {**config_of(RAREST_ENTRY, request, snapshot), "ignore_case": ignore_case}
    config |= {"plurals": True} if request.plurals else {}
    inputs = {"entries": spellings_digest(read_entries(entries, ignore_case=ignore_case, plurals=request.plurals))}

    def find(pool: Pool) -> Groups:
        match = partial(match_entries, catalog, entries, snapshot=snapshot, workers=request.workers, context=context)
        found = (match(ignore_case=ignoring, plurals=request.plurals) for ignoring in (False, True))
        both = [MatchedPool(catalog, snapshot, pool.survivors, matches) for matches in found]
        figures = _figures(both[ignore_case]) | {
            "matched_as_given": both[False].matched(),
            "matched_ignoring_case": both[True].matched(),
        }
        if missing == "leave-out":
            _check_misses(figures, entries, max_misses, ignore_case=ignore_case)
        return _by_rarest(both[ignore_case], figures)

    return make_grouping(catalog, request.name or "entries", config, inputs, find, str(entries), context)


def group_by_concept(catalog: Catalog, request: GroupRequest, context: Context) -> Clustering:
    """Make the rarest concept in each sample's list its group; see `group_by_entry` for what is rarest."""
    concepts, snapshot = Concepts(catalog, str(request.concepts)), catalog.snapshot()
    concepts.check_covers(snapshot)
    config = config_of(RAREST_CONCEPT, request, snapshot)

    def find(pool: Pool) -> Groups:
        return _by_rarest(MatchedPool(catalog, snapshot, pool.survivors, concepts), {})

    name = request.name or concepts.name
    return make_grouping(catalog, name, config, {LISTED + concepts.name: concepts.id}, find, name, context)


def _figures(pool: MatchedPool) -> dict[str, Any]:
    """Return how many samples take part and have no entry, and the most frequent captions and words of these."""
    samples = unmatched = 0
    captions: Counter[str] = Counter()
    words: Counter[str] = Counter()
    for part, (counts, _) in pool.parts():
        kept = pool.survivors.keeps(part.span)
        missed = np.flatnonzero(kept & (counts == 0))
        samples += int(kept.sum())
        unmatched += len(missed)
        wanted = missed[: _READ_CAPTIONS - captions.total()]
        if len(wanted):
            for caption in pool.catalog.samples(part, ["caption"]).column(0).take(wanted).to_pylist():
                captions[caption] += 1
                words.update(set(caption.split()))
    return {
        "taking_part": samples,
        "unmatched": unmatched,
        "unmatched_captions": [caption for caption, _ in captions.most_common(_SHOWN)],
        "unmatched_words": [word for word, _ in words.most_common(_SHOWN)],
    }


def _check_misses(found: dict[str, Any], entries: Path, max_misses: float, *, ignore_case: bool) -> None:
    if found["unmatched"] <= max_misses * found["taking_part"]:
        return
    more = found["matched_ignoring_case"] - found["matched_as_given"]
    remedy = f"`ignore_case` finds {more:,} more; otherwise " * (more > 0 and not ignore_case)
    raise UserError(
        f"{found['unmatched']:,} of {found['taking_part']:,} samples have no entry of {entries} in their captions and would be in no "
        f"group (at most a share of {max_misses:g} is taken for right): {found['matched_as_given']:,} have one as the entries are "
        f"written, {found['matched_ignoring_case']:,} ignoring case; frequent captions without one: {quoted(found['unmatched_captions'])}. "
        f"{remedy}add entries, or accept it with `allow_misses`"
    )


def quoted(texts: Sequence[str]) -> str:
    """Return captions or words in one line, long ones cut, and with escapes for all that is not printable."""
    return ", ".join(
        repr(text if len(text) <= _CAPTION_CHARACTERS else f"{text[:_CAPTION_CHARACTERS]}…") for text in texts
    )


def _by_rarest(pool: MatchedPool, found: dict[str, Any]) -> Groups:
    counts, _ = pool.count()

    def rarest() -> Iterator[npt.NDArray[np.int32]]:
        return (rarest_entries(*found, counts) for _, found in pool.parts())

    used = np.zeros(len(counts), np.bool_)
    for labels in rarest():
        used[labels[labels >= 0]] = True
    numbers = np.append(np.where(used, np.cumsum(used) - 1, NO_GROUP), NO_GROUP).astype(np.int32)
    names = [entry for entry, some in zip(pool.matches.entries, used.tolist(), strict=True) if some]
    return Groups(
        names, (numbers[labels] for labels in rarest()), {"entries_without_group": int((~used).sum()), **found}
    )
