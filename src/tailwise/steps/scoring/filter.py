"""Filter: drops samples by a score (a reduce that finds the bounds, then a map)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Catalog, Part, Snapshot
from tailwise.catalog.drops import DropList, Survivors
from tailwise.catalog.kinds import plain_name
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.kernels.selection import order_statistics
from tailwise.mapped import release_pages
from tailwise.plan.quotas import samples_of_share
from tailwise.requests import FilterRequest, ScoreRequest, refuse_given
from tailwise.steps.drops import drop_table, write_drops
from tailwise.steps.scoring.by_list import drop_by_list, try_list
from tailwise.steps.scoring.scores import SCORES, score_config, score_figures, score_inputs, score_parts

QUANTILES = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100)  # percent
BOUNDS = ("minimum", "maximum", "keep", "keep_lowest")
MISSING = ("drop", "keep")
DATACOMP = "datacomp"  # the only `rule`
Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Filtered:
    """Result of a filter.

    Attributes:
        name: of the drop list; None after a trial.
        summary: score, pool (samples that are not removed), samples (that take part), scored, quantiles (percent, score); of a file also
            keys and keys_without_sample; with a rule also kept, dropped, reasons. Of a list: see `by_list.drop_by_list`.
    """

    name: str | None
    summary: Mapping[str, Any]


def filter_samples(catalog: Catalog | str | Path, request: FilterRequest, context: Context | None = None) -> Filtered:
    """Make a drop list of the samples of the newest snapshot whose score doesn't pass a rule, or that a list names, or doesn't.

    Args:
        catalog: or its path; with what the score is made from.
        request: the score, and which scores stay; or the list.
        context: runs the tasks and shows progress.

    Raises:
        UserError: a bad rule, no such score, no sample with one, a list that can't be read or is of another pool, or nothing would be left.
    """
    context = context or Context()
    catalog = Catalog.open(catalog)
    name = plain_name(request.list_name) if request.name is None else request.name
    if request.by is None:
        drop_by_list(catalog, name, request, context)
        return Filtered(name, DropList(catalog, name).summary)
    request = _with_rule(request)
    _check(request)
    score, snapshot = request.score, catalog.snapshot()
    survivors = Survivors(catalog, request.without, snapshot)
    config = {
        "snapshot": snapshot.number,
        "without": list(request.without),
        "score": score_config(score),
        "rule": {bound: getattr(request, bound) for bound in (*BOUNDS, "missing")}
        | ({} if request.rule is None else {"as": request.rule}),
    }
    inputs = {"snapshot": snapshot.id, **score_inputs(catalog, snapshot, score), **survivors.inputs}
    with Artifact(catalog.drops_folder(name), "filter", config, inputs) as artifact:
        if not artifact.done:
            judge = _Judge(catalog, snapshot, score, survivors, context)
            judge.apply(request)
            tables = context.progress(judge.tables(), "writing drops", len(judge.parts))
            write_drops(artifact, judge.parts, tables, context)
            artifact.finish(judge.summary())
    return Filtered(name, DropList(catalog, name).summary)


def try_filter(catalog: Catalog | str | Path, request: FilterRequest, context: Context | None = None) -> Filtered:
    """Return how a score is distributed, and, with bounds, what would be dropped; makes no drop list. See `filter_samples`."""
    context = context or Context()
    catalog = Catalog.open(catalog)
    refuse_given(request, {"name"}, "with `dry_run`: no drop list is made")
    if request.by is None:
        return Filtered(None, try_list(catalog, request, context))
    request = _with_rule(request)
    ruled = _is_ruled(request)
    if ruled:
        _check(request)
    else:
        refuse_given(request, {"missing"}, "without `minimum`, `maximum`, `keep` or `keep_lowest`")
    snapshot = catalog.snapshot()
    judge = _Judge(catalog, snapshot, request.score, Survivors(catalog, request.without, snapshot), context)
    if ruled:
        judge.apply(request)
    return Filtered(None, judge.summary())


def _is_ruled(request: FilterRequest) -> bool:
    return any(getattr(request, bound) is not None for bound in BOUNDS)


def _with_rule(request: FilterRequest) -> FilterRequest:
    """Return the request with the rule that its score has by default, if it gives none."""
    score = SCORES.get(request.score.name)
    return request if score is None or _is_ruled(request) else replace(request, minimum=score.minimum)


def _check(request: FilterRequest) -> None:
    """Refuse what is no rule."""
    least, most = request.minimum, request.maximum
    bounds = least is not None or most is not None
    if bounds + (request.keep is not None) + (request.keep_lowest is not None) != 1:
        raise UserError(
            "give one of `minimum` and/or `maximum`, `keep` SHARE, `keep_lowest` SHARE (or `dry_run`, to see the scores first)"
        )
    for option, share in (("`keep`", request.keep), ("`keep_lowest`", request.keep_lowest)):
        if share is not None and not 0 < share <= 1:
            raise UserError(f"{option} {share}: must be a share above 0 and at most 1")
    for option, bound in (("`minimum`", least), ("`maximum`", most)):
        if bound is not None and math.isnan(bound):
            raise UserError(f"{option} {bound}: must be a number")
    if least is not None and most is not None and least > most:
        raise UserError(f"`minimum` {least} is above `maximum` {most}: no score is between them")
    if request.rule not in {None, DATACOMP}:
        raise UserError(f"`rule` {request.rule!r}: use {DATACOMP}, or leave it out")
    if request.missing not in MISSING:
        raise UserError(f"`missing` {request.missing!r}: use {' or '.join(MISSING)}")


@dataclass(frozen=True)
class _Test:
    """One condition on scores, all in float32: sign · score at most `bound`, and of those that equal it, the first `ties` rows."""

    reason: str
    sign: np.float32
    bound: np.float32
    ties: int


class _Judge:
    """Says of each sample whether it stays, and why not."""

    def __init__(
        self, catalog: Catalog, snapshot: Snapshot, request: ScoreRequest, survivors: Survivors, context: Context
    ) -> None:
        """Makes the score, and finds how it is distributed.

        Raises:
            UserError: no sample that takes part has it.
        """
        self.name, self.survivors = request.name, survivors
        self.pool, self.parts = survivors.pool, catalog.parts(snapshot)
        self.blocks = list(score_parts(catalog, snapshot, request, context))
        self.joined = score_figures(catalog, snapshot, request)
        self.samples = self.scored = 0
        for part, scores in zip(self.parts, self.blocks, strict=True):
            kept = survivors.keeps(part.span)
            self.samples += int(kept.sum())
            self.scored += int((kept & ~np.isnan(scores)).sum())
        if not self.scored:
            raise UserError(f"not one of {self.samples:,} samples has a {self.name}: nothing to filter by")
        ranks = [(mark * (self.scored - 1) + 50) // 100 for mark in QUANTILES]
        values, _ = order_statistics(self._scored, ranks)
        self.quantiles = [
            {"percent": mark, "score": float(value)} for mark, value in zip(QUANTILES, values, strict=True)
        ]
        self.tests: list[_Test] = []
        self.reasons: Counter[str] | None = None
        self.missing = "keep"

    def _scored(self, sign: int = 1) -> Iterator[Scores]:
        """The score, times `sign`, of the samples that take part and have one, part by part."""
        for part, scores in zip(self.parts, self.blocks, strict=True):
            yield np.float32(sign) * scores[self.survivors.keeps(part.span) & ~np.isnan(scores)]
            release_pages(scores)

    def apply(self, rule: FilterRequest) -> None:
        """Finds the bounds of a rule, and counts what it drops.

        Raises:
            UserError: nothing would be left.
        """
        self.missing = rule.missing
        if rule.minimum is not None:
            self.tests.append(self._bound(rule.minimum, -1, "below"))
        if rule.maximum is not None:
            self.tests.append(self._bound(rule.maximum, 1, "above"))
        if rule.keep is not None:
            self.tests.append(
                self._share("`keep`", rule.keep, -1, "highest") if rule.rule is None else self._toolkit_share(rule.keep)
            )
        if rule.keep_lowest is not None:
            self.tests.append(self._share("`keep_lowest`", rule.keep_lowest, 1, "lowest"))
        self.reasons = Counter()
        for _, _, reasons in self._judged():
            self.reasons += Counter(dict(zip(self._names, np.bincount(reasons[reasons >= 0]).tolist(), strict=False)))
        if self.reasons.total() == self.samples:
            low, high = self.quantiles[0]["score"], self.quantiles[-1]["score"]
            raise UserError(
                f"all of {self.samples:,} samples would be dropped: {self.name} is between {low:.6g} and {high:.6g}; "
                "see `dry_run` for its distribution"
            )

    def _bound(self, value: float, sign: int, word: str) -> _Test:
        # Scores are float32: a bound between two of them would part a score from the very number that it was made from.
        with np.errstate(over="ignore"):
            bound = np.float32(value)
        return _Test(f"{self.name} {word} {value:.9g}", np.float32(sign), np.float32(sign) * bound, self.scored)

    def _share(self, option: str, share: float, sign: int, word: str) -> _Test:
        limit = f"{self.samples:,} take part and {self.scored:,} of these have a {self.name}"
        kept = samples_of_share(share, self.pool, self.scored, limit, option)
        reason = f"{self.name} not among the {word} {share:.9g} of the pool"
        values, below = order_statistics(lambda: self._scored(sign), [kept - 1])
        return _Test(reason, np.float32(sign), values[0], kept - int(below[0]))

    def _toolkit_share(self, share: float) -> _Test:
        """As DataComp's toolkit: the bound is the score at place int(N · share) from the top, counted from 0; all that equal it stay."""
        place = int(self.pool * share)
        if place >= self.scored:
            raise UserError(
                f"`keep` {share}: the bound is score {place + 1:,} from the top, and {self.scored:,} samples have one"
            )
        values, _ = order_statistics(lambda: self._scored(-1), [place])
        return _Test(f"{self.name} below {-values[0]:.9g}", np.float32(-1), values[0], self.scored)

    @property
    def _names(self) -> list[str]:
        return [*(test.reason for test in self.tests), f"no {self.name}"]

    def _judged(self) -> Iterator[tuple[Part, Scores, npt.NDArray[np.int32]]]:
        """Yield the parts, their scores, and the number of the reason of each row in `_names`, int32 [n]; −1: it stays."""
        left = [test.ties for test in self.tests]
        for part, scores in zip(self.parts, self.blocks, strict=True):
            reasons = np.full(part.rows, -1, np.int32)
            judged = self.survivors.keeps(part.span)
            missing = np.isnan(scores)
            if self.missing == "drop":
                reasons[judged & missing] = len(self.tests)
            judged &= ~missing
            for number, test in enumerate(self.tests):
                signed = test.sign * scores
                passes = signed < test.bound
                ties = np.flatnonzero(judged & (signed == test.bound))[: left[number]]
                left[number] -= len(ties)
                passes[ties] = True
                reasons[judged & ~passes & (reasons < 0)] = number
            yield part, scores, reasons
            release_pages(scores)

    def tables(self) -> Iterator[pa.Table]:
        """Yield the dropped rows and the reasons, part by part: DROPPED_SCHEMA."""
        for part, scores, reasons in self._judged():
            dropped = np.flatnonzero(reasons >= 0)
            columns = {
                "row": part.first_row + dropped,
                "reason": pa.array(self._names).take(pa.array(reasons[dropped])),
                "value": pa.array(scores[dropped].astype(np.float64), mask=np.isnan(scores[dropped])),
            }
            yield drop_table(columns)

    def summary(self) -> dict[str, Any]:
        """Return figures for people."""
        figures: dict[str, Any] = {
            "score": self.name,
            "pool": self.pool,
            "samples": self.samples,
            "scored": self.scored,
        }
        if self.reasons is not None:
            dropped, reasons = self.reasons.total(), dict(sorted(self.reasons.items()))
            figures |= {"kept": self.samples - dropped, "dropped": dropped, "reasons": reasons}
        return {**figures, **self.joined, "quantiles": self.quantiles}
