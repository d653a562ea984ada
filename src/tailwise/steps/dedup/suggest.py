"""A guide for choosing ε and K of dedup: what would go, what such pairs look like, and what clusters hide.

The ε that keeps a given share of the pool: papers state the share (SemDeDup, arXiv 2303.09540; DBP, arXiv 2401.04578). ε is a multiple of 1
/ GRID, so that `epsilon` with the same number gives the same list. The comparison knows how many samples "any-earlier" drops at each ε, and
no rule drops more. For other rules a search decides at a few ε: it assumes that a rule drops a constant part of what "any-earlier" does,
and learns from each answer. Samples of equal similarity go together, so more than the share can stay, but never less. Under "greedy", a
greater ε may drop a sample fewer: of several ε that answer, the search returns one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tailwise.catalog.catalog import Catalog, Part, Snapshot
from tailwise.catalog.columns import RowsByPart
from tailwise.catalog.comparisons import Neighbours
from tailwise.context import Context
from tailwise.devices import find_device
from tailwise.errors import UserError
from tailwise.execution.base import KERNEL, WithWorker, Worker
from tailwise.kernels.duplicates import duplicate_threshold
from tailwise.kernels.grid import row_chunks
from tailwise.kernels.keyed import hash_range, stream_key
from tailwise.kernels.kmeans import chosen_rows
from tailwise.kernels.similarity import similar_pairs
from tailwise.plan.quotas import samples_of_share
from tailwise.requests import DedupRequest, bytes_of, refuse_given
from tailwise.steps.dedup.comparison import Address, Comparison
from tailwise.steps.dedup.members import make_neighbours

GRID = 1_000_000
CLOSE = 1e-4  # the search ends when no more than this share of the pool stays beyond the target
EPSILONS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)
PAIRS_PER_BAND = 2
QUERIES = 1000
POOL_ROWS = 1_000_000
CHUNK_ROWS = 16_384


def find_epsilon(compared: Comparison, neighbours: Neighbours, share: float, dropped: Callable[[float], int]) -> float:
    """Return the ε at which `share` of the pool stays, or the least share above it that the search finds.

    `share`: samples that stay, as a share of the pool. `dropped`: returns how many samples the rule drops at an ε; at most as many as "any-
    earlier".

    Raises:
        UserError: no ε from 0 to 1 keeps this share.
    """
    pool, judged = compared.survivors.pool, compared.new
    stay = samples_of_share(share, pool, judged, f"{judged:,} take part", "`target_share`")
    count = WithWorker(partial(_count, compared.address, neighbours.folder))
    counts = compared.context.executor.reduce(count, compared.parts, np.add, KERNEL)
    most: npt.NDArray[np.int64] = np.cumsum(counts)[: GRID + 1]  # samples that "any-earlier" drops at each ε
    if most[0] > judged - stay:
        raise _unreachable(share, pool, stay, "largest", "identical embeddings", judged - int(most[0]))
    if (fewest := judged - int(most[-1])) <= stay:
        at, gone = _search(most, judged - stay, int(CLOSE * pool), dropped)
        if at < GRID or judged - gone <= stay + int(CLOSE * pool):
            return at / GRID
        fewest = judged - gone
    raise _unreachable(share, pool, stay, "smallest", "ε = 1", fewest)


def _unreachable(share: float, pool: int, stay: int, which: str, what: str, least: int) -> UserError:
    rounded = math.floor if which == "largest" else math.ceil  # so that the share is accepted
    bound = f"dropping by {what} leaves {least:,}: the {which} possible share is {rounded(least / pool * 1e6) / 1e6:g}"
    return UserError(f"`target_share` {share:g} asks that {stay:,} of {pool:,} samples stay, but {bound}")


def _search(most: npt.NDArray[np.int64], limit: int, slack: int, dropped: Callable[[float], int]) -> tuple[int, int]:
    """Return a multiple of 1 / GRID at which at most `limit` samples go, while the next one drops more; and how many go.

    Also return one at which at most `slack` samples fewer go. The bracket always holds the answer: interpolation over `most` narrows it,
    and bisection every fourth time.
    """
    low, high = int(np.searchsorted(most, limit, side="right")) - 1, GRID + 1
    at_low, at_high, tries = dropped(low / GRID), None, 0
    while high - low > 1 and limit - at_low > slack:
        tries, missing = tries + 1, limit - slack // 2 - at_low
        if at_high is None:  # in proportion; then further, to have a bracket
            wanted = most[low] * (1 + tries * missing / max(at_low, 1)) + 1
        else:
            wanted = most[low] + missing * (most[high] - most[low]) / (at_high - at_low)
        at = int(np.searchsorted(most, wanted, side="right")) - 1
        at = (low + high) // 2 if at_high is not None and tries % 4 == 0 else min(max(at, low + 1), high - 1)
        gone = dropped(at / GRID)
        if gone <= limit:
            low, at_low = at, gone
        else:
            high, at_high = at, gone
    return low, at_low


def _count(compared: Address, folder: Path, part: Part, worker: Worker) -> npt.NDArray[np.int64]:
    """Count the samples by the least multiple of 1 / GRID that makes them duplicates: int64 [GRID + 2], the last for those of none."""
    neighbours = Neighbours(compared.open(worker).catalog, folder)
    thresholds = np.minimum(1.0 - np.arange(GRID + 1) / GRID, duplicate_threshold(0))
    least = np.searchsorted(-thresholds, -neighbours.similarity[part.span], side="right")
    return np.bincount(least, minlength=GRID + 2)


@dataclass(frozen=True)
class EpsilonGuide:
    """Effect of one ε."""

    epsilon: float
    # samples that have an earlier duplicate in their cluster: what "any-earlier" drops, and "greedy" at most; exact
    dropped: int
    share: float  # of the samples judged
    pairs: int  # duplicates of the queries found in the pool
    pairs_inside: int  # of these, in the query's own cluster
    queries: int  # queries with a duplicate anywhere in the pool
    queries_inside: int  # queries with one in their own cluster


@dataclass(frozen=True)
class Sample:
    """Where a sample is found."""

    row: int  # in the catalog
    shard: str  # path of its tar
    key: str
    caption: str


@dataclass(frozen=True)
class SamplePair:
    """Two samples that share a cluster."""

    epsilon: float  # the least ε listed that makes them duplicates
    similarity: float  # of their embeddings
    sample: Sample
    earlier: Sample  # the most similar of those before it in keep-order


@dataclass(frozen=True)
class Suggestion:
    """The guide."""

    clusters: str  # name of the clustering
    samples: int  # judged
    compared: int  # pairs of samples in one cluster
    queries: int  # samples whose duplicates were looked for in the whole pool
    pool: int  # how many samples they were compared with: all, or those drawn
    epsilons: list[EpsilonGuide]  # one for each ε
    pairs: list[SamplePair]  # a few from each band of similarity, most similar first


def suggest(
    catalog: Catalog | str | Path,
    request: DedupRequest,
    context: Context | None = None,
    *,
    queries: int = QUERIES,
    pool_rows: int = POOL_ROWS,
) -> Suggestion:
    """Make the guide; finds the neighbours first, which `dedup` of the same request uses afterwards.

    Args:
        catalog: or its path; with a clustering of the newest snapshot.
        request: what a dedup would compare.
        context: runs the tasks and shows progress.
        queries: approximate number of samples to compare, drawn by hash.
        pool_rows: approximate number of samples that they are compared with, drawn by hash too.

    Raises:
        UserError: as `dedup`.
    """
    refuse_given(request, {"epsilon", "target_share", "name", "rule", "exact", "against"}, "with `suggest`")
    device, memory = str(find_device(request.device)), bytes_of("max_memory", request.max_memory)
    compared = Comparison(Catalog.open(catalog), request, context or Context())
    neighbours = make_neighbours(compared, max_memory_bytes=memory, device=device)
    dropped = _dropped(compared, neighbours)
    recall = _Recall(compared, queries, pool_rows, device)
    recall.search(compared.context)
    new, old = compared.compared_sizes.T
    guides = [
        EpsilonGuide(
            epsilon,
            int(dropped[at]),
            float(dropped[at] / max(compared.new, 1)),
            *(int(recall.pairs[at]), int(recall.pairs_inside[at])),
            *(int(recall.found[:, at].sum()), int(recall.found_inside[:, at].sum())),
        )
        for at, epsilon in enumerate(EPSILONS)
    ]
    return Suggestion(
        clusters=compared.clustering,
        samples=compared.new,
        compared=int((new * (new - 1) // 2 + new * old).sum()),
        queries=len(recall.rows),
        pool=recall.pool,
        epsilons=guides,
        pairs=_sample_pairs(compared, neighbours),
    )


def _bands(similarity: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The index of the least ε listed that makes a similarity a duplicate; len(EPSILONS) if none does."""
    descending = np.array([duplicate_threshold(epsilon) for epsilon in EPSILONS])
    return np.searchsorted(-descending, -similarity, side="right").astype(np.int64)


def _dropped(compared: Comparison, neighbours: Neighbours) -> npt.NDArray[np.int64]:
    counts = np.zeros(len(EPSILONS) + 1, np.int64)
    for part in compared.parts:
        counts += np.bincount(_bands(neighbours.similarity[part.span]), minlength=len(counts))
    return np.cumsum(counts)[:-1]


def _sample_pairs(compared: Comparison, neighbours: Neighbours) -> list[SamplePair]:
    key = stream_key(compared.seed, "pairs to look at")
    best: list[list[tuple[int, int]]] = [[] for _ in EPSILONS]  # (hash, row)
    for part in compared.parts:
        bands = _bands(neighbours.similarity[part.span])
        hashes = hash_range(key, part.first_row, part.rows)
        for band, chosen in enumerate(best):
            rows = np.flatnonzero(bands == band)
            rows = rows[np.argsort(hashes[rows], kind="stable")[:PAIRS_PER_BAND]]
            chosen += [(int(hashes[row]), part.first_row + int(row)) for row in rows]
            chosen[:] = sorted(chosen)[:PAIRS_PER_BAND]
    picked = [(band, row) for band, chosen in enumerate(best) for _, row in chosen]
    rows = np.array([row for _, row in picked], np.int64)
    others, similarities = neighbours.row[rows].tolist(), neighbours.similarity[rows].tolist()
    samples = find_samples(compared.catalog, compared.snapshot, [*rows.tolist(), *others])
    pairs = [
        SamplePair(EPSILONS[band], similarity, samples[row], samples[other])
        for (band, row), other, similarity in zip(picked, others, similarities, strict=True)
    ]
    return sorted(pairs, key=lambda pair: (-pair.similarity, pair.sample.row))


def find_samples(catalog: Catalog, snapshot: Snapshot, rows: list[int]) -> dict[int, Sample]:
    """Shard, key and caption of a few rows."""
    paths = catalog.shards(snapshot).column("path").to_pylist()
    samples, wanted = {}, np.unique(rows)
    for part, places in RowsByPart(catalog.parts(snapshot)).split(wanted):
        mine = wanted[places]
        table = catalog.samples_at(part.number, mine - part.first_row, ["shard", "key", "caption"])
        for row, item in zip(mine.tolist(), table.to_pylist(), strict=True):
            samples[row] = Sample(row, paths[item["shard"]], item["key"], item["caption"])
    return samples


class _Recall:
    """How many duplicates of a few samples lie in their own cluster.

    Attributes:
        pairs, pairs_inside: int64 [ε].
        found, found_inside: bool [queries, ε].
        pool: how many samples the queries were compared with.
    """

    def __init__(self, compared: Comparison, queries: int, pool_rows: int, device: str) -> None:
        self.compared, self.device, self.pool = compared, device, 0
        self._pool_rows = pool_rows
        drawn = list(self._draw(queries, "queries"))
        self.rows = np.concatenate([rows for rows, _, _ in drawn])
        self._places = np.concatenate([places for _, places, _ in drawn])
        self._x = np.concatenate([x for _, _, x in drawn])
        self.pairs, self.pairs_inside = np.zeros((2, len(EPSILONS)), np.int64)
        self.found, self.found_inside = np.zeros((2, len(self.rows), len(EPSILONS)), np.bool_)

    def _draw(
        self, wanted: int, purpose: str
    ) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.float16]]]:
        """Yield rows, clusters [n, probe] and embeddings of about `wanted` samples that take part."""
        compared = self.compared
        share = min(wanted / max(int(compared.sizes.sum()), 1), 1.0)
        key = stream_key(compared.seed, f"{purpose} of the guide")
        for part in compared.parts:
            places = compared.places(part)
            for start, chunk in row_chunks([compared.embeddings(part)], CHUNK_ROWS):
                mine = chosen_rows(part.first_row + start, len(chunk), share, key)
                mine &= places[start : start + len(chunk), 0] >= 0
                at = np.flatnonzero(mine)
                yield part.first_row + start + at, places[start + at], chunk[at]

    def search(self, context: Context) -> None:
        if not len(self.rows):
            return
        threshold = duplicate_threshold(EPSILONS[-1])
        chunks = sum(-(-part.rows // CHUNK_ROWS) for part in self.compared.parts)
        for rows, places, x in context.progress(self._draw(self._pool_rows, "pool"), "looking across clusters", chunks):
            self.pool += len(rows)
            if not len(rows):
                continue
            query, other, similarity = similar_pairs(self._x, x, threshold, device=self.device)
            real = self.rows[query] != rows[other]
            query, other, band = query[real], other[real], _bands(similarity[real])
            mine, theirs = self._places[query][:, :, None], places[other][:, None, :]
            inside = ((mine == theirs) & (mine >= 0)).any(axis=(1, 2))
            self.pairs += np.cumsum(np.bincount(band, minlength=len(EPSILONS)))
            self.pairs_inside += np.cumsum(np.bincount(band[inside], minlength=len(EPSILONS)))
            self.found |= self._reached(query, band)
            self.found_inside |= self._reached(query[inside], band[inside])

    def _reached(self, query: npt.NDArray[np.int64], band: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which queries have a duplicate at each ε: bool [queries, ε]."""
        reached = np.zeros(self.found.shape, np.bool_)
        reached[query, band] = True
        return np.logical_or.accumulate(reached, axis=1)
