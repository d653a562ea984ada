"""Figures of all clusters for the report, and the samples that stand for each: one pass over the catalog, part by part.

The driver holds about 100 bytes a cluster and plan, the chosen samples, and the words of at most CAPTIONS captions.

Typical words of a cluster are words of its captions by tf-idf, a cluster being a document. Words are runs of letters and digits, in lower
case, of 2 to 24 characters. A script without spaces gives whole runs.

K: clusters; P: plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.kinds import CLUSTERING
from tailwise.catalog.removals import Removals
from tailwise.context import Context
from tailwise.execution.base import Task, Worker
from tailwise.kernels.keyed import hash_each, stream_key
from tailwise.kernels.projection import principal_axes, umap_plane
from tailwise.plan.plan import Plan

BINS = 100  # of similarities from −1 to 1
EDGES = np.linspace(-1, 1, BINS + 1)
CHUNK_ROWS = 1 << 20
MOST_GROUPS = 10_000  # of a grouping that can colour clusters
NEAREST, FARTHEST = 0, 1  # kinds of samples; then three for each plan
KEPT, DROPPED, REPEATED = 2, 3, 4
PICK = np.dtype([("cluster", "<i4"), ("kind", "<i2"), ("key", "<f8"), ("row", "<i8")])
CAPTIONS = 1_000_000  # that are looked at, about; they and their words bound the memory
WORDS = 8  # of a cluster
LETTERS = 24  # of a word, at most


@dataclass
class ClusterFigures:
    """Figures of the clusters of a clustering.

    Attributes:
        clustering: the clustering.
        sizes: int64 [K], members that are not removed.
        quotas: float64 [P, K], expected copies of the members in epoch 0.
        similarities: float64 [1 + P, BINS]: samples by similarity to their centroid; of the pool, then expected copies of each plan.
        picks: PICK [·], the samples that stand for clusters, by cluster and kind.
        words: typical words of each cluster, the most typical first; empty strings without any.
        groups: by grouping, the commonest group of each cluster, int32 [K], −1 for none, and its share of the members, float64 [K].
        places: float32 [K, 2], centroids in two dimensions; None without centroids.
    """

    clustering: Clustering
    sizes: npt.NDArray[np.int64]
    quotas: npt.NDArray[np.float64]
    similarities: npt.NDArray[np.float64]
    picks: npt.NDArray[Any]
    words: list[str]
    groups: dict[str, tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]]
    places: npt.NDArray[np.float32] | None


@dataclass
class _PartFigures:
    sizes: npt.NDArray[np.int64]
    quotas: npt.NDArray[np.float64]
    similarities: npt.NDArray[np.float64]
    picks: npt.NDArray[Any]
    words: list[pa.Table]  # of `count_words`
    pairs: dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = field(default_factory=dict)


def cluster_figures(
    clustering: Clustering, plans: Sequence[Plan], images: int, most_images: int, projection: str, context: Context
) -> ClusterFigures:
    """Return the figures of all clusters.

    Args:
        clustering: a clustering or grouping.
        plans: plans of the same catalog, P.
        images: samples of each kind that stand for a cluster.
        most_images: bound on all of them; clusters over the whole range of sizes have some.
        projection: "pca" or "umap".
        context: runs the tasks.
    """
    catalog = clustering.catalog
    sizes = clustering.table.column("size").to_numpy().astype(np.int64)
    kinds = 2 * clustering.has_centroids + 3 * len(plans)
    shown = _shown(sizes, max(1, most_images // max(kinds, 1)))
    count = max(1, min(images, most_images // max(1, kinds * int(shown.sum()))))
    task = _Summarise(
        catalog.folder, clustering.name, tuple(plan.name for plan in plans), tuple(_groupings(clustering)), shown, count
    )
    found = _nothing(len(sizes), len(plans))
    for part in context.map(task, catalog.parts(clustering.snapshot), "looking at clusters"):
        found.sizes += part.sizes
        found.quotas += part.quotas
        found.similarities += part.similarities
        found.picks = first_of_each(np.concatenate([found.picks, part.picks]), count)
        found.words += part.words
        for name, (keys, counts) in part.pairs.items():
            before = found.pairs.get(name, (keys[:0], counts[:0]))
            found.pairs[name] = _sum_by_key(np.concatenate([before[0], keys]), np.concatenate([before[1], counts]))
    sizes = found.sizes
    groups = {name: _commonest(*pairs, sizes) for name, pairs in found.pairs.items()}
    places = _places(clustering, projection) if clustering.has_centroids else None
    words = typical_words(found.words, len(sizes))
    return ClusterFigures(clustering, sizes, found.quotas, found.similarities, found.picks, words, groups, places)


def _nothing(clusters: int, plans: int) -> _PartFigures:
    sums = np.zeros(clusters, np.int64), np.zeros((plans, clusters)), np.zeros((1 + plans, BINS))
    return _PartFigures(*sums, np.empty(0, PICK), [])


def _shown(sizes: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.bool_]:
    """Return the clusters that have pictures: all that are not empty, or `most` of them at equal steps from largest to smallest."""
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 0]
    if len(order) > most:
        order = order[np.linspace(0, len(order) - 1, most).astype(np.int64)]
    shown = np.zeros(len(sizes), np.bool_)
    shown[order] = True
    return shown


def _groupings(clustering: Clustering) -> list[str]:
    """Return the names of the other groupings of the same snapshot that can colour the clusters."""
    names = []
    for name in CLUSTERING.finished(clustering.catalog.folder):
        other = Clustering.open(clustering.catalog, name)
        same = other.snapshot.number == clustering.snapshot.number and name != clustering.name
        if same and other.values is not None and len(other.values) <= MOST_GROUPS:
            names.append(name)
    return names


@dataclass(frozen=True, eq=False)
class _Summarise(Task[Part, _PartFigures]):
    folder: Path  # of the catalog
    clustering: str
    plans: tuple[str, ...]
    groupings: tuple[str, ...]
    shown: npt.NDArray[np.bool_]  # bool [K], clusters that samples stand for
    count: int  # samples of each kind

    def run(self, item: Part, worker: Worker) -> _PartFigures:
        catalog, clustering, plans, removals = worker.cached(self, self._open)
        labels = np.where(removals.keeps(item.span), clustering.labels.read(item), np.int32(-1))
        similarity = clustering.similarities.read(item) if clustering.has_centroids else None
        known, clusters = len(plans), len(self.shown)
        found = _nothing(clusters, known)
        found.sizes += np.bincount(labels[labels >= 0], minlength=clusters)
        for start in range(0, item.rows, CHUNK_ROWS):
            inside = slice(start, min(start + CHUNK_ROWS, item.rows))
            self._add(
                found, plans, item.first_row + start, labels[inside], None if similarity is None else similarity[inside]
            )
        for name in self.groupings:
            other = Clustering.open(catalog, name)
            groups = other.labels.read(item)
            both = (labels >= 0) & (groups >= 0)
            pairs = labels[both].astype(np.int64) * MOST_GROUPS + groups[both]
            found.pairs[name] = np.unique(pairs, return_counts=True)
        most = max(1, CAPTIONS // clusters)  # of a cluster
        rows = np.flatnonzero((labels >= 0) & (clustering.ranks.read(item) < most))
        if len(rows):
            captions = catalog.samples_at(item.number, rows, ["caption"]).column("caption")
            found.words.append(count_words(captions, labels[rows]))
        return found

    def _open(self) -> tuple[Catalog, Clustering, list[Plan], Removals]:
        catalog = Catalog.open(self.folder)
        clustering, plans = Clustering.open(catalog, self.clustering), [Plan(catalog, name) for name in self.plans]
        return catalog, clustering, plans, Removals.of(catalog, clustering.snapshot)

    def _add(
        self,
        found: _PartFigures,
        plans: Sequence[Plan],
        first: int,
        labels: npt.NDArray[np.int32],
        similarity: npt.NDArray[np.float32] | None,
    ) -> None:
        members = np.flatnonzero(labels >= 0)
        mine, rows = labels[members], first + members
        standing = np.flatnonzero(self.shown[mine])  # only of these are samples chosen
        chance = hash_each(stream_key(0, "report"), rows[standing]) / 2.0**64
        picks = [found.picks]
        bins = None
        if similarity is not None:
            near = similarity[members].astype(np.float64)
            bins = similarity_bins(near)
            found.similarities[0] += np.bincount(bins, minlength=BINS)
            for kind, key in ((NEAREST, -near), (FARTHEST, near)):
                picks.append(_picks(mine[standing], kind, key[standing], rows[standing], self.count))
        for number, plan in enumerate(plans):
            drawable = rows < plan.rows
            rates, copies = np.zeros(len(rows)), np.zeros(len(rows), np.uint8)
            rates[drawable], copies[drawable] = plan.rate(rows[drawable]), plan.draw(0, rows[drawable])
            found.quotas[number] += np.bincount(mine, rates, len(self.shown))
            if bins is not None:
                found.similarities[1 + number] += np.bincount(bins, rates, BINS)
            drawn = copies[standing]
            for kind, mask in ((KEPT, drawn == 1), (DROPPED, drawn == 0), (REPEATED, drawn > 1)):
                at = standing[mask]
                picks.append(_picks(mine[at], kind + 3 * number, chance[mask], rows[at], self.count))
        found.picks = first_of_each(np.concatenate(picks), self.count)


def similarity_bins(values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return the bin of each similarity, one of BINS: int64, the shape of `values`."""
    return np.clip((values + 1) * (BINS / 2), 0, BINS - 1).astype(np.int64)


def _picks(
    clusters: npt.NDArray[Any], kind: int, keys: npt.NDArray[np.float64], rows: npt.NDArray[np.int64], count: int
) -> npt.NDArray[Any]:
    picks = np.empty(len(rows), PICK)
    picks["cluster"], picks["kind"], picks["key"], picks["row"] = clusters, kind, keys, rows
    return first_of_each(picks, count)


def first_of_each(picks: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    """Return the first `count` picks of each cluster and kind by key, then by row; sorted by cluster, kind and key: PICK [·]."""
    picks = picks[np.lexsort((picks["row"], picks["key"], picks["kind"], picks["cluster"]))]
    new = np.ones(len(picks), np.bool_)
    new[1:] = (picks["cluster"][1:] != picks["cluster"][:-1]) | (picks["kind"][1:] != picks["kind"][:-1])
    first = np.maximum.accumulate(np.where(new, np.arange(len(picks)), 0))
    return picks[np.arange(len(picks)) - first < count]


def _sum_by_key(
    keys: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    found, at = np.unique(keys, return_inverse=True)
    return found, np.bincount(at, counts, len(found)).astype(np.int64)


def _commonest(
    keys: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    """Return the commonest group of each cluster, and its share of the members."""
    clusters, groups = np.divmod(keys, MOST_GROUPS)
    order = np.lexsort((groups, -counts, clusters))
    clusters, first = np.unique(clusters[order], return_index=True)
    best = np.full(len(sizes), -1, np.int32)
    share = np.zeros(len(sizes))
    best[clusters] = groups[order][first]
    share[clusters] = counts[order][first] / np.maximum(sizes[clusters], 1)
    return best, share


def _places(clustering: Clustering, projection: str) -> npt.NDArray[np.float32]:
    """Return centroids in two dimensions: float32 [K, 2]."""
    centroids = clustering.centroids
    if projection == "umap":
        return umap_plane(centroids)
    mean, axes = principal_axes(centroids)
    return np.asarray((centroids - mean) @ axes.T, np.float32)


def count_words(captions: pa.ChunkedArray, clusters: npt.NDArray[np.int32]) -> pa.Table:
    """Return word (dictionary), cluster (int32) and captions (int64): how many captions of a cluster have a word.

    `clusters`, int32 [n], are those of the captions.
    """
    lists = pc.split_pattern_regex(pc.utf8_lower(captions), r"[^\p{L}\p{N}]+").combine_chunks()
    words = pc.list_flatten(lists).dictionary_encode()
    vocabulary = words.dictionary
    lengths = pc.utf8_length(vocabulary).to_numpy(zero_copy_only=False)
    number = pc.match_substring_regex(vocabulary, r"^\p{N}+$").to_numpy(zero_copy_only=False)
    fit = ((lengths >= 2) & (lengths <= LETTERS) & ~number)[words.indices.to_numpy()]
    parents, indices = pc.list_parent_indices(lists).to_numpy()[fit], words.indices.to_numpy()[fit]
    caption, word = np.divmod(np.unique(parents * np.int64(len(vocabulary) + 1) + indices), len(vocabulary) + 1)
    pairs, counts = np.unique(word * (np.int64(1) << 32) + clusters[caption], return_counts=True)
    word, cluster = np.divmod(pairs, np.int64(1) << 32)
    texts = pa.DictionaryArray.from_arrays(pa.array(word, pa.int32()), vocabulary)
    return pa.table({"word": texts, "cluster": pa.array(cluster, pa.int32()), "captions": counts})


def typical_words(tables: Sequence[pa.Table], clusters: int) -> list[str]:
    """Return the WORDS most typical words of each cluster, separated by spaces, from the tables of `count_words` of all parts."""
    if not tables:
        return [""] * clusters
    table = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
    words = table.column("word").chunk(0) if len(table) else pa.array([""]).dictionary_encode()[:0]
    texts = words.dictionary.to_pylist()
    rank = np.empty(len(texts), np.int64)  # of equal scores, by text: the order of parts decides nothing
    rank[np.argsort(np.array(texts, object), kind="stable")] = np.arange(len(texts))
    pairs = words.indices.to_numpy().astype(np.int64) * clusters + table.column("cluster").to_numpy()
    pairs, at = np.unique(pairs, return_inverse=True)
    captions = np.bincount(at, table.column("captions").to_numpy(), len(pairs))
    word, cluster = np.divmod(pairs, max(clusters, 1))
    holders = np.bincount(word, minlength=len(texts))
    score = captions * np.log((1 + clusters) / holders[word])
    order = np.lexsort((rank[word], -score, cluster))
    word = word[order]
    bounds = np.searchsorted(cluster[order], np.arange(clusters + 1)).tolist()
    return [
        " ".join(texts[at] for at in word[start : min(stop, start + WORDS)].tolist())
        for start, stop in pairwise(bounds)
    ]
