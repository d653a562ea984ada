"""Which clustering says most about rarity: the rank correlation of a sample's rate with the rarity of its class, on the shared pool.

    python benchmarks/clusterings.py [--seeds 3] [--pool ../shared/data/tinyimagenet-lt]

Rates are DynamiCS's (alpha 0.2, half of the pool, at most one copy). rho is Spearman's, of a sample's rate with minus its class's number of
images; "rates" are means over the thirds of the classes (head, medium, few). "typical" is Spearman's too, of a sample's rate with its
cosine to the mean of its class, inside each head class, their mean: below 0, frequent classes are shown by what is untypical of them. Mean
and standard deviation over seeds. The second table draws pools from the first in which a class's frequency is independent of what it shows
(in the shared pool whole regions are common or rare, which favours coarse groups); two such pools a seed. Classes come from truth.tsv,
for measuring only.
"""

import argparse
import csv
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import print_header
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from scipy.stats import rankdata

import tailwise
from tailwise.kernels.assign import assign
from tailwise.kernels.centroids import merge_centroids
from tailwise.kernels.density import NeighbourCounter, radius_that_holds, similarity_steps
from tailwise.kernels.grid import to_grid, unit_rows_on_grid
from tailwise.kernels.keyed import hash_range, stream_key
from tailwise.kernels.kmeans import kmeans
from tailwise.kernels.matching import EntryMatcher, rarest_entries
from tailwise.plan.quotas import fill_by_scale
from tailwise.steps.clustering.cluster import RADIUS_SHARE
from tailwise.steps.grouping.match import read_entries

ALPHA, KEEP = 0.2, 0.5
ENTRIES = Path(tailwise.__file__).parent / "recipes" / "compare" / "tinyimagenet-lt-entries.txt"


@dataclass(frozen=True)
class Pool:
    """Embeddings float16 [N, d], the class and the caption of each row, and the number of images of each class."""

    x: np.ndarray
    classes: np.ndarray
    count: np.ndarray
    captions: np.ndarray

    @property
    def thirds(self) -> np.ndarray:
        """0, 1, 2 for rows of head, medium, and few classes."""
        place = np.empty(len(self.count), int)
        place[np.argsort(-self.count, kind="stable")] = np.arange(len(self.count)) * 3 // len(self.count)
        return place[self.classes]


@dataclass(frozen=True)
class Found:
    """The rate of each row, and what it came from: groups, members of the largest."""

    rates: np.ndarray
    groups: int
    largest: int


def read_pool(folder: Path) -> tuple[Pool, np.ndarray]:
    """The pool, and which of its rows are planted duplicates."""
    with (folder / "truth.tsv").open() as stream:
        truth = {row["key"]: row for row in csv.DictReader(stream, delimiter="\t")}
    with (folder / "classes.tsv").open() as stream:
        count = np.array([int(row["train_count"]) for row in csv.DictReader(stream, delimiter="\t")])
    import pyarrow.parquet as pq

    rows, keys, captions = [], [], []
    for path in sorted((folder / "embeddings" / "img_emb").glob("*.npy")):
        rows.append(np.load(path))
        number = path.stem.rsplit("_", 1)[1]
        table = pq.read_table(folder / "embeddings" / "metadata" / f"metadata_{number}.parquet")
        keys += table.column("image_path").to_pylist()
        captions += table.column("caption").to_pylist()
    order = np.argsort(keys)  # the catalog's order, on which seeding depends
    keys = [keys[at] for at in order]
    classes = np.array([int(truth[key]["class_index"]) for key in keys])
    duplicate = np.array([bool(truth[key]["duplicate_of"]) for key in keys])
    return Pool(np.concatenate(rows)[order], classes, count, np.array(captions)[order]), duplicate


def region_free(pool: Pool, duplicate: np.ndarray, seed: int) -> Pool:
    """A pool drawn from another, its classes' frequencies shuffled as far as there are images."""
    random = np.random.default_rng(seed)
    wanted = random.permutation(np.geomspace(120, 4, len(pool.count))).astype(int)
    rows = [np.flatnonzero((pool.classes == label) & ~duplicate) for label in range(len(wanted))]
    chosen = np.sort(np.concatenate([random.permutation(own)[:most] for own, most in zip(rows, wanted, strict=True)]))
    classes = pool.classes[chosen]
    return Pool(pool.x[chosen], classes, np.bincount(classes, minlength=len(wanted)), pool.captions[chosen])


# --- rates --------------------------------------------------------------------------------------------------------------


def by_group(labels: np.ndarray, density: np.ndarray | None = None) -> Found:
    """DynamiCS: a group's weight is n^alpha; with densities, n · density^(alpha − 1), so that a member's rate goes by its density."""
    size = np.bincount(labels).astype(float)
    full = size > 0
    common = size if density is None else np.maximum(density[: len(size)], 1.0)
    weights = size[full] * common[full] ** (ALPHA - 1)
    quota = np.zeros(len(size))
    quota[full] = _fill(weights, size[full], round(KEEP * len(labels)))
    return Found((quota / np.maximum(size, 1))[labels], int(full.sum()), int(size.max()))


def _fill(weights: np.ndarray, capacity: np.ndarray, budget: float) -> np.ndarray:
    return fill_by_scale(weights, np.zeros(len(weights)), capacity, budget)


def by_row(density: np.ndarray) -> Found:
    """The same for a density of each row's own."""
    rates = _fill(density ** (ALPHA - 1), np.ones(len(density)), round(KEEP * len(density)))
    return Found(rates, len(density), 1)


# --- fits that several candidates share: made once, their time counted for each ---------------------------------------------

_fits: dict[tuple[object, ...], tuple[np.ndarray, float]] = {}
_saved_seconds = [0.0]


def fit(pool: Pool, k: int, seed: int, near: int = 0, steps: int = 0) -> np.ndarray:
    """k-means of the rows, then fitted again so many times on the `near` rows nearest to each centroid."""
    key = (id(pool), k, seed, near, steps)
    if key in _fits:
        _saved_seconds[0] += _fits[key][1]
    else:
        start = time.process_time() + _saved_seconds[0]
        if steps:
            chosen = _nearest(pool.x, fit(pool, k, seed, near, steps - 1), near)
            centroids = kmeans(pool.x[chosen], k, seed=seed + 1000 * steps).centroids
        else:
            centroids = kmeans(pool.x, k, seed=seed).centroids
        _fits[key] = centroids, time.process_time() + _saved_seconds[0] - start
    return _fits[key][0]


# --- candidates: (pool, seed) → Found -------------------------------------------------------------------------------------


def oracle(pool: Pool, _seed: int) -> Found:
    return by_group(pool.classes)


def entry(pool: Pool, _seed: int) -> Found:
    """`tailwise group --entries`: the rarest entry of the list in each caption."""
    listed = read_entries(ENTRIES)
    counts, entries = EntryMatcher(listed)(pool.captions.tolist())
    return by_group(rarest_entries(counts, entries, np.bincount(entries, minlength=len(listed))))


def plain(pool: Pool, seed: int, *, k: int) -> Found:
    return by_group(assign(pool.x, fit(pool, k, seed))[0])


def merged(pool: Pool, seed: int, *, k: int, at: float, order: str = "index", lloyd: bool = False) -> Found:
    """DynamiCS's merging; in another order of the centroids (by size of their clusters); or with Lloyd iterations after it."""
    centroids = fit(pool, k, seed)
    size = np.bincount(assign(pool.x, centroids)[0], minlength=k)
    centroids = centroids[{"index": np.arange(k), "large": np.argsort(-size), "small": np.argsort(size)}[order]]
    kept = centroids[merge_centroids(centroids, at)]
    for _ in range(10 * lloyd):
        kept = _means(pool.x, assign(pool.x, kept)[0], kept)
    return by_group(assign(pool.x, kept)[0])


def linked(pool: Pool, seed: int, *, k: int, at: float, how: str = "average") -> Found:
    """Centroids joined by hierarchical clustering; a group is the union of its centroids' clusters."""
    centroids = fit(pool, k, seed).astype(float)
    distance = np.maximum(1 - centroids @ centroids.T, 0)
    np.fill_diagonal(distance, 0)
    group = fcluster(linkage(squareform(distance, checks=False), how), 1 - at, "distance") - 1
    return by_group(group[assign(pool.x, centroids.astype(np.float32))[0]])


def leader(pool: Pool, seed: int, *, at: float) -> Found:
    """One pass in pseudo-random order: a row farther than the threshold from all leaders becomes one; then nearest leaders."""
    x = pool.x.astype(np.float32)
    leaders, count = np.zeros_like(x), 0
    for row in np.argsort(hash_range(stream_key(seed, "leader"), 0, len(x))):
        if not count or (leaders[:count] @ x[row]).max() < at:
            leaders[count] = x[row]
            count += 1
    return by_group(assign(pool.x, unit_rows_on_grid(leaders[:count].astype(float)))[0])


def hierarchical(pool: Pool, seed: int, *, levels: tuple[int, ...], near: int, steps: int = 3, rule: str) -> Found:
    """Vo et al. 2024: k-means of the rows, of its centroids, …; at each level fitted again on the `near` points nearest to each centroid.

    Rates by the clusters of the first level, of the last, or by the paper's own sampler: an equal share of the budget for each last-level
    cluster, of that an equal share for each of its children, and so on, what is full giving its surplus to its siblings.
    """
    points, up = pool.x, []
    for level, k in enumerate(levels):
        centroids = (
            fit(pool, k, seed, near, steps if near else 0) if not level else kmeans(points, k, seed=seed).centroids
        )
        for step in range(steps if near and level else 0):
            chosen = _nearest(points, centroids, near)
            centroids = kmeans(points[chosen], k, seed=seed + 1000 * (step + 1)).centroids
        up.append(assign(points, centroids)[0])
        points = centroids
    labels = up[0]
    if rule == "first":
        return by_group(labels)
    if rule == "last":
        for above in up[1:]:
            labels = above[labels]
        return by_group(labels)
    capacity = [np.ones(len(labels))]
    for at, above in enumerate(up):
        capacity.append(np.bincount(above, capacity[-1], minlength=levels[at]))
    budget = _share(capacity[-1], round(KEEP * len(labels)))
    for at in range(len(up) - 1, -1, -1):
        quota = np.zeros(len(up[at]))
        for parent in np.flatnonzero(budget > 0):
            own = np.flatnonzero(up[at] == parent)
            quota[own] = _share(capacity[at][own], budget[parent])
        budget = quota
    size = np.bincount(labels)
    return Found(budget, int((size > 0).sum()), int(size.max()))


def row_density(pool: Pool, seed: int, *, at: float, sample: int) -> Found:
    """Rows of a pseudo-random sample within a cosine of each row, as a density of the row."""
    key = stream_key(seed, "density sample")
    chosen = np.sort(np.argsort(hash_range(key, 0, len(pool.x)))[:sample])
    x = pool.x.astype(np.float32)
    other = x[chosen]
    counts = np.concatenate([(x[start : start + 2048] @ other.T >= at).sum(1) for start in range(0, len(x), 2048)])
    member = np.isin(np.arange(len(x)), chosen)
    return by_row(1 + (counts - member) * len(x) / len(chosen))


def row_neighbours(pool: Pool, _seed: int, *, nearest: int) -> Found:
    """k-NN density: distance to the k-th nearest row, to the power −10 (an assumed dimension of 10); it has no seed."""
    x = pool.x.astype(np.float32)
    kth = [
        -np.partition(-(x[start : start + 1024] @ x.T), nearest, axis=1)[:, nearest] for start in range(0, len(x), 1024)
    ]
    return by_row(np.maximum(1 - np.concatenate(kth), 1e-3).astype(float) ** -10.0)


def density(pool: Pool, seed: int, *, k: int, at: float | None, merge: float | None = None) -> Found:
    """`tailwise cluster --density`: rows within a cosine of each centroid."""
    centroids = fit(pool, k, seed)
    if merge is not None:
        centroids = centroids[merge_centroids(centroids, merge)]
    labels, similarity = assign(pool.x, centroids)
    radius = radius_that_holds(similarity_steps(similarity), RADIUS_SHARE) if at is None else at
    return by_group(labels, NeighbourCounter(centroids, radius)(pool.x).astype(float))


def _means(x: np.ndarray, labels: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    sums = np.zeros(centroids.shape)
    np.add.at(sums, labels, to_grid(x).astype(float))
    means = unit_rows_on_grid(sums)
    return np.where(means.any(axis=1)[:, None], means, centroids)


def _nearest(points: np.ndarray, centroids: np.ndarray, near: int) -> np.ndarray:
    labels, similarity = assign(points, centroids)
    order = np.lexsort((-similarity, labels))
    first = np.r_[True, np.diff(labels[order]) > 0]
    starts = np.flatnonzero(first)
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    return np.sort(order[rank < near])


def _share(capacity: np.ndarray, budget: float) -> np.ndarray:
    quota = np.zeros(len(capacity))
    full = capacity > 0
    quota[full] = _fill(np.ones(int(full.sum())), capacity[full].astype(float), min(budget, capacity.sum()))
    return quota


Candidate = Callable[..., Found]


def candidates(k: int) -> Iterator[tuple[str, Candidate, dict[str, object]]]:
    """Names, functions and their options, round a number of clusters."""
    yield "true classes (oracle)", oracle, {}
    yield "rarest entry of the caption", entry, {}
    for count in (k // 4, k // 2, k, 5 * k // 2, 5 * k):
        yield f"plain, K {count:,}", plain, {"k": count}
    for at in (0.6, 0.7, 0.8):
        yield f"merged at {at}, K {k}", merged, {"k": k, "at": at}
    yield f"merged at 0.7, K {5 * k // 2:,}", merged, {"k": 5 * k // 2, "at": 0.7}
    yield f"merged at 0.7, small clusters first, K {k}", merged, {"k": k, "at": 0.7, "order": "small"}
    yield f"merged at 0.7, large clusters first, K {k}", merged, {"k": k, "at": 0.7, "order": "large"}
    yield f"merged at 0.7, then 10 Lloyd iterations, K {k}", merged, {"k": k, "at": 0.7, "lloyd": True}
    for how, at in (("average", 0.4), ("average", 0.5), ("single", 0.7), ("single", 0.8)):
        yield f"{how} linkage of centroids at {at}, K {k}", linked, {"k": k, "at": at, "how": how}
    yield f"average linkage of centroids at 0.4, K {5 * k // 2:,}", linked, {"k": 5 * k // 2, "at": 0.4}
    for at in (0.3, 0.4, 0.5):
        yield f"leader at {at}", leader, {"at": at}
    for near, rule, levels in (
        (0, "last", (5 * k, k // 2)),
        (6, "last", (5 * k, k // 2)),
        (6, "own", (5 * k, k // 2)),
        (6, "own", (5 * k, k, k // 4)),
        (10, "first", (k,)),
        (20, "first", (k,)),
    ):
        text = "→".join(f"{level:,}" for level in levels)
        rule_text = {"last": "n^alpha of the last level", "first": "n^alpha", "own": "its own sampler"}[rule]
        name = f"hierarchical {text}, {f'resampled {near}' if near else 'not resampled'}, {rule_text}"
        yield name, hierarchical, {"levels": levels, "near": near, "rule": rule}
    for nearest in (30, 300):
        yield f"k-NN density of each row, {nearest} nearest", row_neighbours, {"nearest": nearest}
    for at in (0.3, 0.5):
        yield f"density of each row within {at}, sample of 4,096", row_density, {"at": at, "sample": 4096}
    for count in (k // 4, k // 2, k, 5 * k // 2, 5 * k):
        yield f"density within auto, K {count:,}", density, {"k": count, "at": None}
    for at in (0.3, 0.4, 0.5, 0.6):
        yield f"density within {at}, K {k}", density, {"k": k, "at": at}
    yield f"density within 0.5, K {5 * k:,}", density, {"k": 5 * k, "at": 0.5}
    yield f"density within auto, merged at 0.7, K {k}", density, {"k": k, "at": None, "merge": 0.7}


def measure(pool: Pool, seed: int, find: Candidate, options: dict[str, object]) -> dict[str, float]:
    start = time.process_time() + _saved_seconds[0]
    found = find(pool, seed, **options)
    seconds = time.process_time() + _saved_seconds[0] - start
    rarity = rankdata(-pool.count[pool.classes])
    figures = {"rho": float(np.corrcoef(rankdata(found.rates), rarity)[0, 1])}
    for number, name in enumerate(("head", "medium", "few")):
        figures[name] = float(found.rates[pool.thirds == number].mean())
    figures["typical"] = statistics.fmean(_typical(pool, found.rates))
    return {**figures, "groups": found.groups, "largest": found.largest, "seconds": seconds}


def _typical(pool: Pool, rates: np.ndarray) -> Iterator[float]:
    for label in np.unique(pool.classes[pool.thirds == 0]):
        own = np.flatnonzero(pool.classes == label)
        x = pool.x[own].astype(np.float32)
        alike = np.ptp(rates[own]) == 0
        yield 0.0 if alike else float(np.corrcoef(rankdata(rates[own]), rankdata(x @ x.mean(axis=0)))[0, 1])


def print_table(title: str, pools: list[tuple[int, Pool]], k: int, only: str) -> None:
    print(
        f"\n{title}\n\n| grouping | rho (sd) | head | medium | few | typical | groups | largest | CPU s |\n|{' --- |' * 9}"
    )
    for name, function, options in candidates(k):
        if only not in name:
            continue
        figures = defaultdict(list)
        for seed, pool in pools:
            for key, value in measure(pool, seed, function, options).items():
                figures[key].append(value)
        mean = {key: statistics.fmean(values) for key, values in figures.items()}
        spread = statistics.stdev(figures["rho"]) if len(pools) > 1 else 0.0
        print(
            f"| {name} | {mean['rho']:.3f} ({spread:.3f}) | {mean['head']:.3f} | {mean['medium']:.3f} | {mean['few']:.3f} "
            f"| {mean['typical']:+.3f} "
            f"| {mean['groups']:,.0f} | {mean['largest']:,.0f} | {mean['seconds']:.1f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / "tinyimagenet-lt"
    parser.add_argument("--pool", type=Path, default=beside)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="rows of the table whose name holds this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print_header("Rarity that groupings see; one thread", "scipy")
    pool, duplicate = read_pool(options.pool)
    print_table(f"The pool, {len(pool.x):,} rows", [(seed, pool) for seed in range(options.seeds)], 400, options.only)
    free = [
        (seed, region_free(pool, duplicate, seed)) for seed in range(2 * options.seeds)
    ]  # small, and each is another pool
    rows = ", ".join(f"{len(item.x):,}" for _, item in free)
    print_table(f"Frequency independent of what a class shows, {rows} rows", free, 80, options.only)


if __name__ == "__main__":
    main()
