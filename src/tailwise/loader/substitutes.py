"""Rows that stand in for those that were removed or can't be read, so that batches never shrink: a function of plan and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from tailwise.catalog.removals import NOTHING_REMOVED, Removals
from tailwise.kernels.keyed import hash_range, stream_key
from tailwise.kernels.substitutes import match_left_out
from tailwise.loader.sections import Sections
from tailwise.plan.plan import Plan
from tailwise.storage.lru import LRUCache

ATTEMPTS = 64  # other shards that are asked; where none has a readable row to spare, the pool is lost
KEPT_SHARDS = 64


class Substitutes:
    """Stand-ins for rows of a plan."""

    def __init__(self, plan: Plan, sections: Sections, removals: Removals = NOTHING_REMOVED) -> None:
        """Takes the plan, what knows its draws, and the rows that nobody may see."""
        self._plan, self._sections, self._removals = plan, sections, removals
        self._matches: LRUCache[tuple[int, int], npt.NDArray[np.int64]] = LRUCache(KEPT_SHARDS)

    def of(self, row: int, epoch: int) -> Iterator[int]:
        """Rows to try in place of `row`, best first.

        The first is a row of the same shard that the epoch left out, a different one for each row that may need it. If there is none,
        or it can't be read either: left-out rows of other shards, chosen by hash; then, where shards have nothing left out, any of
        their rows that can be drawn. Rows that the plan never draws (those without a cluster, or of rate 0) stand in for nobody, nor do
        removed ones.
        """
        offsets = self._plan.shard_offsets
        shard = int(self._plan.shards_of(np.array(row)))
        first = int(offsets[shard])
        match = int(self._match(epoch, shard)[row - first])
        if match >= 0:
            yield first + match
        shards = len(offsets) - 1
        key = stream_key(self._sections.seed, "substitute", epoch, row)
        choices = (hash_range(key, 0, 2 * ATTEMPTS) >> np.uint64(1)).astype(np.int64)
        for spare_only in (True, False):
            for at in range(ATTEMPTS):
                other = int(choices[2 * at] % shards)
                spare, drawn = self._spare(epoch, other)
                candidates = np.flatnonzero(
                    spare if spare_only else spare | (drawn & self._removals.keeps(self._plan.rows_of(other)))
                )
                if len(candidates):
                    yield int(offsets[other] + candidates[choices[2 * at + 1] % len(candidates)])

    def _spare(self, epoch: int, shard: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Of a shard's rows, those left out by the epoch that may stand in for others, and those drawn: bool [n] each."""
        plan = self._plan
        rows = plan.rows_of(shard)
        drawn = self._sections.shard_copies(epoch, shard) > 0
        if plan.by_rate:
            eligible = np.asarray(plan.rates[rows]) > 0
        else:
            groups = np.asarray(plan.groups[rows])
            eligible = (groups >= 0) & plan.reachable[groups]
        return eligible & ~drawn & self._removals.keeps(rows), drawn

    def _match(self, epoch: int, shard: int) -> npt.NDArray[np.int64]:
        def match() -> npt.NDArray[np.int64]:
            spare, drawn = self._spare(epoch, shard)
            return match_left_out(drawn, spare)

        return self._matches.get((self._plan.drawn_epoch(epoch), shard), match)
