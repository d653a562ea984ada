"""Quotas: fill and rounding at K = 50,000 clusters, against a quadratic-program solver (Clarabel) on the same problem."""

import statistics
import time

import numpy as np
import qpsolvers
import scipy.sparse
from common import print_header

from tailwise.plan.quotas import fill_by_scale, fill_by_shift, round_to_sum

K = 50_000
ROUNDS = 5


def problem(seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    random = np.random.default_rng(seed)
    sizes = (random.pareto(1.0, K) * 50 + 1).astype(np.int64)
    weights = np.exp(random.normal(size=K))
    return weights / weights.sum(), sizes, int(0.3 * sizes.sum())


def ours(weights: np.ndarray, sizes: np.ndarray, budget: int) -> np.ndarray:
    lower = np.ones(K, np.int64)
    filled = fill_by_shift(weights * budget, lower.astype(float), sizes.astype(float), budget)
    round_to_sum(filled, budget, lower, sizes, sizes)
    return filled


def scale(weights: np.ndarray, sizes: np.ndarray, budget: int) -> np.ndarray:
    filled = fill_by_scale(weights, np.zeros(len(sizes)), sizes.astype(float), budget)
    round_to_sum(filled * 2**30, budget << 30, np.zeros(K, np.int64), sizes << 30, sizes)
    return filled


def solver(weights: np.ndarray, sizes: np.ndarray, budget: int) -> np.ndarray:
    return qpsolvers.solve_qp(
        scipy.sparse.identity(K, format="csc"),
        -weights * budget,
        A=scipy.sparse.csc_matrix(np.ones((1, K))),
        b=np.array([float(budget)]),
        lb=np.ones(K),
        ub=sizes.astype(float),
        solver="clarabel",
        tol_gap_abs=1e-12,
        tol_gap_rel=1e-12,
        tol_feas=1e-12,
    )


def main() -> None:
    print_header(f"quotas: seconds at K = {K:,}, medians of {ROUNDS} problems", "clarabel", "qpsolvers")
    seconds: dict[str, list[float]] = {}
    gaps, sums = [], []
    for seed in range(ROUNDS):
        weights, sizes, budget = problem(seed)
        results = {}
        for task in (ours, scale, solver):
            start = time.perf_counter()
            results[task.__name__] = task(weights, sizes, budget)
            seconds.setdefault(task.__name__, []).append(time.perf_counter() - start)
        gaps.append(np.abs(results["ours"] - results["solver"]).max())
        sums.append(abs(results["ours"].sum() - budget))
    for name, values in seconds.items():
        print(f"{name:8s} {statistics.median(values):8.4f} s   ({min(values):.4f} … {max(values):.4f})")
    ratio = statistics.median(seconds["solver"]) / statistics.median(seconds["ours"])
    print(f"solver / ours: {ratio:.0f}; largest |ours − solver| {max(gaps):.2e} samples, |Σ − budget| {max(sums):.1e}")


if __name__ == "__main__":
    main()
