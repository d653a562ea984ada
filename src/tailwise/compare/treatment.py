"""Treatments: which samples a run could draw, and how often a training saw each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from tailwise.plan.plan import Plan


@dataclass(frozen=True)
class Exposures:
    """How often the samples that a plan may draw (candidates) are seen."""

    candidates: str  # hash of the set of candidates
    mean: float  # mean number of views of a candidate
    least: int | None  # fewest views of any candidate; None where the draw is random
    most: int | None  # most views of any candidate; None where the draw is random


def exposures(plan: Plan, samples_seen: int) -> Exposures:
    """Return how often a training that goes through a plan's epochs in order sees each candidate."""
    hashed, candidates = blake2b(digest_size=16), 0
    for span in plan.spans():
        inside = plan.candidates(span)
        hashed.update(np.packbits(inside).tobytes())
        candidates += int(inside.sum())
    least, most = _bounds(plan, samples_seen) if plan.exact else (None, None)
    return Exposures(hashed.hexdigest(), samples_seen / max(candidates, 1), least, most)


def _bounds(plan: Plan, samples_seen: int) -> tuple[int, int]:
    """Return the fewest and most views of a candidate. The last epoch may be incomplete."""
    full = plan.sizes > 0
    sizes, counts = plan.sizes[full], plan.counts(0)[full]
    if not plan.dynamic:  # every epoch holds the same samples
        epochs, rest = divmod(samples_seen, int(counts.sum()))
        return epochs * int((counts // sizes).min()), (epochs + (rest > 0)) * int((-(-counts // sizes)).max())
    # Copies of two members of a cluster differ by one at most, over any number of epochs.
    taken, epoch = np.zeros_like(counts), 0
    while int(taken.sum() + counts.sum()) <= samples_seen:
        taken, epoch = taken + counts, epoch + 1
        counts = plan.counts(epoch)[full]
    least = int((taken // sizes).min())
    if int(taken.sum()) < samples_seen:
        taken = taken + counts
    return least, int((-(-taken // sizes)).max())


def treatment_notes(rows: Sequence[Mapping[str, Any]], baseline: str) -> list[str]:
    """Return sentences on summary rows that are the same treatment, and on rows with other candidates than the baseline."""
    known = [row for row in rows if row["plan"] and row["plan"].get("exposures")]
    alike: dict[tuple[Any, ...], list[str]] = {}
    for row in known:
        seen = row["plan"]["exposures"]
        if seen["least"] is not None and seen["least"] == seen["most"]:
            alike.setdefault((seen["candidates"], seen["least"], row["compose"]), []).append(row["row"])
    notes = [
        f"{' and '.join(names)} are the same treatment: each sees every candidate exactly {times} times. They differ in order alone."
        for (_, times, _), names in alike.items()
        if len(names) > 1
    ]
    base = next((row["plan"]["exposures"]["candidates"] for row in known if row["row"] == baseline), None)
    other = [row["row"] for row in known if base is not None and row["plan"]["exposures"]["candidates"] != base]
    if other:
        notes.append(
            f"Other candidates than those of {baseline}: {', '.join(other)}. Their differences mix what may be drawn with how it is drawn; "
            "give rows the same `without`, or `proportional` over the same grouping, to compare draws alone."
        )
    return notes
