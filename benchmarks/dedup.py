"""Dedup: samples/s of the whole stage, and of its kernel against the plain way, by cluster.

The plain way is the published one: a full float32 matrix of similarities of each cluster, by torch, whose upper triangle's maxima are
compared with 1 − ε. It finds the most similar earlier member only to float32's precision; ours is exact. Both get the same members,
turn by turn. The pool is made up: directions with noise, 10 % near-duplicates, cluster sizes as k-means makes them (log-normal, σ 0.4).
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from common import append_shards, print_header

import tailwise
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.embeddings import open_column, write_part
from tailwise.catalog.layout import LABEL
from tailwise.kernels.similarity import most_similar_earlier
from tailwise.requests import ClusterRequest, DedupRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.dedup.dedup import dedup

EPSILON, PART_ROWS, DUPLICATES = 0.05, 1_000_000, 0.1
COMPARED_CLUSTERS, ROUNDS = 200, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2_000_000)
    parser.add_argument("--clusters", type=int, default=2000)
    parser.add_argument("--dimension", type=int, default=64)
    arguments = parser.parse_args()
    print_header(
        f"dedup: {arguments.samples:,} samples of {arguments.dimension} dimensions in {arguments.clusters:,} clusters, ε {EPSILON}",
        *("torch", "numba"),
    )
    most_similar_earlier(np.eye(16, dtype=np.float16))  # compiles
    with tempfile.TemporaryDirectory() as folder:
        catalog = make_catalog(Path(folder) / "catalog", arguments.samples, arguments.clusters, arguments.dimension)
        kernels(catalog)
        for memory in (8 << 30, 900 << 20):
            stage(catalog, memory)


def make_catalog(folder: Path, rows: int, clusters: int, dimension: int) -> tailwise.Catalog:
    catalog = tailwise.Catalog.create(folder)
    sizes = [min(PART_ROWS, rows - first) for first in range(0, rows, PART_ROWS)]
    snapshot = append_shards(catalog, sizes)
    random = np.random.default_rng(0)
    centres = random.standard_normal((clusters, dimension)).astype(np.float32)
    shares = random.lognormal(sigma=0.4, size=clusters)
    open_column(catalog, "image", dimension, "made up")
    for part in catalog.parts(snapshot):
        labels = random.choice(clusters, part.rows, p=shares / shares.sum())
        x = centres[labels] + random.standard_normal((part.rows, dimension), np.float32)
        copies = random.permutation(part.rows)[: int(DUPLICATES * part.rows)]
        sources = random.integers(0, part.rows, len(copies))
        x[copies] = x[sources] + 0.1 * random.standard_normal((len(copies), dimension), np.float32)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        write_part(catalog, "image", part, dimension, [x.astype(np.float16)])
    cluster(catalog, ClusterRequest(clusters, iterations=3))
    return catalog


def plain(x: npt.NDArray[np.float16]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    rows = torch.from_numpy(x.astype(np.float32))
    rows = torch.nn.functional.normalize(rows)
    best, at = torch.triu(rows @ rows.T, diagonal=1).max(dim=0)
    return best.numpy(), at.numpy()


def kernels(catalog: tailwise.Catalog) -> None:
    """Clusters one by one, by both ways, turn by turn."""
    labels = np.concatenate(list(Clustering.open(catalog, "main").parts(LABEL)))
    rows = np.concatenate(catalog.embedding_parts("image", catalog.snapshot()))
    clusters = [rows[labels == cluster] for cluster in np.unique(labels)[:COMPARED_CLUSTERS]]
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    ratios = []
    for _ in range(ROUNDS):
        for name, way in (("ours", most_similar_earlier), ("plain", plain)):
            start = time.perf_counter()
            for x in clusters:
                way(x)
            seconds[name].append(time.perf_counter() - start)
        ratios.append(seconds["plain"][-1] / seconds["ours"][-1])
    for x in clusters:
        (best, _), (other, _) = most_similar_earlier(x), plain(x)
        np.testing.assert_allclose(
            np.maximum(best, 0), other, atol=1e-5
        )  # the zeros below the diagonal win over negatives
    for name, values in seconds.items():
        print(f"  {name}: {sum(map(len, clusters)) / statistics.median(values):,.0f} samples/s in the kernel")
    print(
        f"  ours is {statistics.median(ratios):.2f} times as fast as plain (rounds: {', '.join(f'{r:.2f}' for r in ratios)})"
    )


def stage(catalog: tailwise.Catalog, memory: int) -> None:
    """From the catalog's files to the drop list's; greedy, then another ε and rule from the same comparison."""
    rows = catalog.snapshot().rows
    for leftover in ("drops", "neighbours"):
        shutil.rmtree(catalog.folder / leftover, ignore_errors=True)
    for name, epsilon, rule in (("first", EPSILON, "greedy"), ("then", 0.1, "greedy"), ("last", 0.1, "any-earlier")):
        start, processor = time.perf_counter(), time.process_time()
        made = dedup(catalog, DedupRequest(epsilon=epsilon, rule=rule, name=name, max_memory=f"{memory / 1000:g}KB"))
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
        print(
            f"  {name}, {rule}, ε {epsilon}, --max-memory {memory / 1e9:.2g} GB: {rows / seconds:,.0f} samples/s ({seconds:.1f} s, "
            f"{processor:.1f} s of processor time), "
            f"{made.summary['dropped'] / rows:.1%} dropped"
        )


if __name__ == "__main__":
    main()
