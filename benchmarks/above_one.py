"""Rates above 1 in DynamiCS: truncated as its authors' trainer does, or refilled, at R copies a sample; what an epoch and six epochs hold.

The pool is 10M rows in 50,000 clusters of Pareto sizes (those of draws.py), or a catalog's clustering; α 0.2, half of the pool.
usage: above_one.py [CATALOG CLUSTERING]
"""

import sys

import numpy as np
from common import print_header

from tailwise.catalog import Catalog
from tailwise.catalog.clusterings import Clustering
from tailwise.plan.methods import METHODS, Clusters
from tailwise.plan.quotas import UNITS
from tailwise.plan.stream import Stream
from tailwise.steps.planning.weighted import quotas_of

ROWS, CLUSTERS, KEEP, ALPHA, EPOCHS = 10_000_000, 50_000, 0.5, 0.2, 6


def pareto_sizes() -> np.ndarray:
    random = np.random.default_rng(0)
    shares = random.pareto(1.0, CLUSTERS) + 0.05
    return np.bincount(random.choice(CLUSTERS, ROWS, p=shares / shares.sum()), minlength=CLUSTERS)


def main() -> None:
    if len(sys.argv) == 3:
        clustering = Clustering.open(Catalog.open(sys.argv[1]), sys.argv[2])
        sizes, what = clustering.table.column("size").to_numpy(), " ".join(sys.argv[1:])
    else:
        sizes, what = pareto_sizes(), "Pareto sizes"
    sizes = sizes[sizes > 0]
    pool, clusters = int(sizes.sum()), Clusters(sizes, np.zeros(len(sizes)), np.zeros(len(sizes)))
    print_header(f"rates above 1: {what}, {pool:,} rows in {len(sizes):,} clusters, α {ALPHA}, keep {KEEP}")
    fifth = np.argsort(sizes, kind="stable")[: len(sizes) // 5]
    for above_one, repeats in (
        ("truncate", 1),
        ("refill", 1),
        ("truncate", 2),
        ("refill", 2),
        ("truncate", 5),
        ("refill", 5),
    ):
        config = {"budget": int(KEEP * pool), "max_repeats": repeats, "min_per_cluster": 0, "class_balance": 0.0}
        config |= {"dynamic": True, "draw": "stream", "above_one": above_one}
        quotas = quotas_of(clusters, METHODS["dynamics"], {"alpha": ALPHA}, config)
        taken, counts = (Stream(sizes, lambda _, q=quotas: q, 0).position(epoch).taken for epoch in (EPOCHS, 1))
        full = quotas >= sizes * repeats * UNITS
        print(
            f"R = {repeats}, {above_one:8s}: drawn {counts.sum() / pool:6.1%} of the pool, "
            f"distinct {np.minimum(counts, sizes).sum() / pool:6.1%}, "
            f"seen after {EPOCHS} epochs {np.minimum(taken, sizes).sum() / pool:6.1%}; "
            f"rate of the smallest fifth of clusters {quotas[fifth].sum() / UNITS / sizes[fifth].sum():.2f}, "
            f"of the largest cluster {quotas[sizes.argmax()] / UNITS / sizes.max():.4f}; "
            f"{full.mean():6.1%} of clusters at their maximum take {quotas[full].sum() / quotas.sum():5.1%} of the draw"
        )


if __name__ == "__main__":
    main()
