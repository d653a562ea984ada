"""Duplicates on both sides of a border between clusters: F1 and seconds of dedup by K and by the number of nearest clusters probed.

A pool is a folder with `train/*.tar`, `embeddings/` and `truth.tsv` (read here alone; its column duplicate_of names the sample that one is
a copy of). A dropped sample is right if the sample it goes for has the same origin; F1 is the best of the listed ε. K = 1 compares all
with all. The last figures need no truth: the share of the samples that K = 1 drops at an ε, in an order that does not depend on K, that
this K drops too. Seconds are medians of the rounds, each with a comparison of its own.
usage: dedup_borders.py [--pool FOLDER] [--clusters 25 100 400 1600] [--probes 1 2 3] [--rounds 3] [--near 0.01 0.03]
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from common import print_header
from dedup_quality import judge, truth
from pools import REAL

import tailwise
from tailwise.catalog.drops import DropList
from tailwise.requests import ClusterRequest, DedupRequest

EPSILONS = (0.0, 0.001, 0.005, 0.01, 0.03, 0.06, 0.07, 0.08, 0.09, 0.1, 0.12)
TIMED_EPSILON = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, default=REAL)
    parser.add_argument("--embeddings", type=Path, help="if they lie elsewhere")
    parser.add_argument("--clusters", type=int, nargs="+", default=[25, 100, 400, 1600])
    parser.add_argument("--probes", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--near", type=float, nargs="*", default=[0.01, 0.03, 0.05], help="ε of the figures without truth"
    )
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print_header(f"dedup across borders: {arguments.pool.name}", "torch")
    with tempfile.TemporaryDirectory() as folder:
        sources = [arguments.pool / "train", arguments.embeddings or arguments.pool / "embeddings"]
        catalog = tailwise.import_pool(sources, Path(folder) / "catalog").catalog
        origin, planted = truth(catalog, arguments.pool / "truth.tsv")
        print(f"{len(origin):,} samples, {planted:,} of them copies of others")
        whole: dict[float, np.ndarray] = {}
        for clusters in (1, *arguments.clusters):
            tailwise.cluster(catalog, ClusterRequest(k=clusters, name=f"k{clusters}", force=clusters == 1))
            for probe in arguments.probes if clusters > 1 else [1]:
                f1, epsilon, precision, recall = max(
                    score(catalog, origin, planted, clusters, probe, epsilon) for epsilon in EPSILONS
                )
                lists = {epsilon: near(catalog, clusters, probe, epsilon) for epsilon in arguments.near}
                whole = whole or lists
                found = ", ".join(f"{(lists[e] & whole[e]).sum() / whole[e].sum():.3f} at ε {e:g}" for e in lists)
                seconds = [timed(catalog, clusters, probe, number) for number in range(arguments.rounds)]
                print(
                    f"  K {clusters:5,}, probe {probe}: F1 {f1:.4f} at ε {epsilon:g} (precision {precision:.3f}, recall {recall:.3f}); "
                    f"of what K = 1 drops: {found}; "
                    f"{statistics.median(seconds):.3f} s ({min(seconds):.3f}–{max(seconds):.3f})",
                    flush=True,
                )


def score(
    catalog: tailwise.Catalog, origin: np.ndarray, planted: int, clusters: int, probe: int, epsilon: float
) -> tuple[float, float, float, float]:
    name = f"k{clusters}-{probe}-{epsilon}"
    tailwise.dedup(catalog, DedupRequest(epsilon=epsilon, clustering=f"k{clusters}", probe=probe, name=name))
    found = judge(catalog, origin, planted, name)
    return found.f1, epsilon, found.precision, found.recall


def near(catalog: tailwise.Catalog, clusters: int, probe: int, epsilon: float) -> np.ndarray:
    """Mark what goes at an ε, by an order of its own: bool [N]."""
    name = f"near-{clusters}-{probe}-{epsilon}"
    request = DedupRequest(epsilon=epsilon, clustering=f"k{clusters}", probe=probe, order="random", name=name)
    tailwise.dedup(catalog, request)
    return np.asarray(DropList(catalog, name).mask[:])


def timed(catalog: tailwise.Catalog, clusters: int, probe: int, number: int) -> float:
    shutil.rmtree(catalog.folder / "neighbours")
    name, start = f"timed-{clusters}-{probe}-{number}", time.perf_counter()
    tailwise.dedup(catalog, DedupRequest(epsilon=TIMED_EPSILON, clustering=f"k{clusters}", probe=probe, name=name))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
