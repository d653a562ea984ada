"""Group by captions: each sample with those that share its rarest entry of a list (map and reduce)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tailwise.catalog.catalog import Catalog
from tailwise.catalog.files import digest
from tailwise.kernels.matching import rarest_entries
from tailwise.progress import Track, silent
from tailwise.stages.cluster import Clustering
from tailwise.stages.group import NO_GROUP, Groups, Pool, check_missing, make_grouping
from tailwise.stages.grouping import RAREST_ENTRY
from tailwise.stages.match_entries import MatchedPool, match_entries, read_entries


def group_by_entry(
    catalog: Catalog,
    entries: Path,
    *,
    name: str = "entries",
    ignore_case: bool = False,
    missing: str = "leave-out",
    without: Sequence[str] = (),
    workers: int | None = None,
    track: Track = silent,
) -> Clustering:
    """Makes the rarest entry in each caption the group of its sample, in the place of a cluster.

    Rarest: in the fewest captions, among those that drop lists and removals leave; of equally rare ones the first of the list. Groups
    are numbered in the order of the list; entries that are the rarest of no caption make none.

    Args:
        catalog: with samples.
        entries: a list of entries, see `match_entries.read_entries`.
        name: of the clustering.
        ignore_case: compare in lower case.
        missing: what becomes of samples without an entry: "leave-out" (no group, so that no plan draws them) or "own-group".
        without: names of drop lists; what they drop isn't counted, and belongs to no group.
        workers: processes that match captions; one a processor by default.
        track: shows progress.

    Raises:
        UserError: the list can't be read, or no caption holds an entry.
    """
    check_missing(missing)
    snapshot = catalog.snapshot()
    config = {
        "group_by": RAREST_ENTRY,
        "ignore_case": ignore_case,
        "missing": missing,
        "without": list(without),
        "snapshot": snapshot.number,
    }
    inputs = {"entries": digest(read_entries(entries, ignore_case=ignore_case))}

    def find(pool: Pool) -> Groups:
        matches = match_entries(
            catalog, entries, ignore_case=ignore_case, snapshot=snapshot, workers=workers, track=track
        )
        return _by_rarest(MatchedPool(catalog, snapshot, pool.survivors, matches))

    return make_grouping(catalog, name, config, inputs, find, str(entries), track)


def _by_rarest(pool: MatchedPool) -> Groups:
    counts, _ = pool.count()

    def rarest() -> Iterator[npt.NDArray[np.int32]]:
        return (rarest_entries(*found, counts) for _, found in pool.parts())

    used = np.zeros(len(counts), np.bool_)
    for labels in rarest():
        used[labels[labels >= 0]] = True
    numbers = np.append(np.where(used, np.cumsum(used) - 1, NO_GROUP), NO_GROUP).astype(np.int32)
    names = [entry for entry, some in zip(pool.matches.entries, used.tolist(), strict=True) if some]
    return Groups(names, (numbers[labels] for labels in rarest()), {"entries_without_group": int((~used).sum())})
