"""Draws: rows/s of one core, for both draws, by epoch; with the quotas' counts per epoch timed apart.

The peer is the plain way: one NumPy random number per row, compared with the row's rate.
"""

import statistics
import time

import numpy as np
from common import print_header

from tailwise.kernels.ranks import appearance_ranks
from tailwise.plan.bernoulli import bernoulli_copies
from tailwise.plan.quotas import UNITS, fill_by_scale, round_to_sum
from tailwise.plan.stream import Stream

ROWS, CLUSTERS, ROUNDS = 10_000_000, 50_000, 3


def main() -> None:
    print_header(
        f"draws: {ROWS:,} rows in {CLUSTERS:,} clusters of Pareto sizes, α 0.2, half of the pool, R = 1", "numba"
    )
    random = np.random.default_rng(0)
    shares = random.pareto(1.0, CLUSTERS) + 0.05
    labels = random.choice(CLUSTERS, ROWS, p=shares / shares.sum()).astype(np.int32)
    sizes = np.bincount(labels, minlength=CLUSTERS)
    ranks = appearance_ranks(labels, np.zeros(CLUSTERS, np.int64))
    filled = np.zeros(CLUSTERS)
    filled[sizes > 0] = fill_by_scale(
        sizes[sizes > 0] ** 0.2, np.zeros((sizes > 0).sum()), sizes[sizes > 0].astype(float), ROWS // 2
    )
    quotas = round_to_sum(filled * UNITS, (ROWS // 2) << 30, np.zeros(CLUSTERS, np.int64), sizes << 30, sizes)
    stream = Stream(sizes, lambda _: quotas, 0)
    stream.copies(1, labels[:10], ranks[:10])  # compiles
    for epoch in (0, 1, 5, 20):
        start = time.perf_counter()
        stream.position(epoch + 1)
        counting = time.perf_counter() - start
        slots = stream.advance_slots(labels, stream.first_slots(labels, ranks), 0, epoch)
        replayed, given = [], []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            copies = stream.copies(epoch, labels, ranks)
            middle = time.perf_counter()
            stream.copies(epoch, labels, ranks, slots)
            replayed.append(ROWS / (middle - start) / 1e6)
            given.append(ROWS / (time.perf_counter() - middle) / 1e6)
        assert copies.sum() == ROWS // 2
        print(
            f"stream, epoch {epoch:2d}: {statistics.median(replayed):6.1f} M rows/s from scratch, "
            f"{statistics.median(given):6.1f} M rows/s with the slots of the epoch before (counts so far: {counting:.3f} s)"
        )
    rows = np.arange(ROWS)
    rates = quotas / UNITS / np.maximum(sizes, 1)
    bernoulli_copies(0, 0, rows[:10], rates, labels[:10])
    speeds: dict[str, list[float]] = {"bernoulli": [], "NumPy": []}
    for _ in range(ROUNDS):
        start = time.perf_counter()
        bernoulli_copies(0, 0, rows, rates, labels)
        middle = time.perf_counter()
        (random.random(ROWS) < rates[labels]).astype(np.uint8)
        speeds["bernoulli"].append(ROWS / (middle - start) / 1e6)
        speeds["NumPy"].append(ROWS / (time.perf_counter() - middle) / 1e6)
    ours, plain = (statistics.median(speeds[name]) for name in ("bernoulli", "NumPy"))
    print(f"bernoulli: {ours:.1f} M rows/s; the plain way in NumPy: {plain:.1f}; ratio {ours / plain:.1f}")


if __name__ == "__main__":
    main()
