"""The three kernels against their peers, turn by turn: assignment, k-means, near-duplicates inside clusters.

Rows are made up: a mixture of groups of power-law sizes about a common mean direction, noise of a decaying spectrum, unit norm, float16.
Peers get the same rows in float32, ready made. Seconds and ratios are medians of the rounds, with the least and the greatest of them.
Cosines and losses are judged in float64, for all alike.
`--device cuda` runs assignment and k-means on a CUDA device. Peers there: flash-kmeans and cuML, if installed, and the float16 products
alone. The products' rows are on the device before the clock starts; all others start from host memory. Not yet run on a CUDA device.
usage: kernels.py [assign] [kmeans] [duplicates] [--rounds 3] [--assign 300000x512x1000 100000x768x20000] [--plot FILE] [--device cpu|cuda]
"""

import argparse
import importlib.util
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pools
import torch
from common import print_header

from tailwise.kernels.assign import TILE_CENTROIDS, TILE_ROWS, Assigner, assign
from tailwise.kernels.grid import unit_rows_on_grid
from tailwise.kernels.kmeans import kmeans
from tailwise.kernels.screening import faster_precision
from tailwise.kernels.similarity import SMALL, most_similar_earlier
from tailwise.kernels.threads import map_in_order, run_tiles

Half = npt.NDArray[np.float16]
Floats = npt.NDArray[np.float32]
Seconds = dict[str, list[float]]

GROUPS, NOISE, GROUP_DECAY, SPECTRUM_DECAY, CHUNK_ROWS = 3000, 1.4, 0.7, 0.5, 16_384
ASSIGN = ("300000x512x1000", "100000x768x20000")
ASSIGN_GOALS = dict(zip(ASSIGN, (3.0, 4.5), strict=True))  # times faiss, on processors without AMX
FLOAT32_GOAL, KMEANS_GOAL, DUPLICATES_GOAL = 0.9, 3.5, 4.0
MANY_CENTROIDS, MANY_CENTROIDS_GOAL = "200000x768x10000", 5.0
EQUAL_GOAL, LOSS_GOAL = 0.9999, 1e-6
CUDA_PRODUCTS_GOAL, CUDA_PEERS_GOAL = 0.6, 1.2
REFERENCE_ROWS, REFERENCE_CHUNK = 4096, 512  # whose labels are compared with those of float64 products
ONE_CLUSTER_GOAL_BYTES = 2e9
ITERATIONS = 10
FEWER_ITERATIONS = (1, 2, 4, 7)  # of peers that tell nothing of their course
SKLEARN_ITERATIONS = (1, 2, 4, 8, 16, 32)
NAIVE_ROWS, PRODUCT_ROWS, CEILING_ROWS = 8192, 2048, 32_768
COPIES = 0.1  # share of near-copies among a cluster's members
OURS, FAISS, FLASH, CUML = "ours", "faiss", "flash-kmeans", "cuML"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", help="assign, kmeans, duplicates; all by default. many: k-means at K = 10,000"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each comparison; k-means has another seed in each")
    parser.add_argument("--assign", nargs="+", default=ASSIGN, metavar="ROWSxDIMENSIONxK")
    parser.add_argument("--kmeans", default=ASSIGN[0], metavar="ROWSxDIMENSIONxK")
    parser.add_argument("--sklearn", default="20000x128x300", metavar="ROWSxDIMENSIONxK")
    parser.add_argument("--members", type=int, nargs="+", default=[1000, 2000, 5000, 20_000], help="of a cluster")
    parser.add_argument("--one-cluster", type=int, default=200_000, help="members of the cluster whose memory counts")
    parser.add_argument("--dimension", type=int, default=512, help="of the clusters' members")
    parser.add_argument("--plot", type=Path, help="draws the course of k-means, as .svg or .png")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: assign and kmeans alone")
    arguments = parser.parse_args()
    known = {"cpu": ["assign", "kmeans", "duplicates", "many"], "cuda": ["assign", "kmeans"]}[arguments.device]
    parts = arguments.parts or known[:3]
    if unknown := set(parts) - set(known):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}; on this device: {', '.join(known)}")
    if arguments.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("no CUDA device here")
        print_header(f"kernels: {', '.join(parts)}, on {torch.cuda.get_device_name()}", "torch")
        for part in parts:
            for shape in arguments.assign if part == "assign" else [arguments.kmeans]:
                compare_on_device(part, shape, arguments.rounds, arguments.device)
        return
    print_header(
        f"kernels: {', '.join(parts)}, on the CPU", *("torch", "numba", "faiss-cpu", "fastkmeans", "scikit-learn")
    )
    print(f"screening runs in {faster_precision()}; {torch.get_num_threads()} threads; {arguments.rounds} rounds")
    if "assign" in parts:
        for shape in arguments.assign:
            compare_assign(shape, arguments.rounds)
    if "kmeans" in parts:
        courses = [compare_kmeans(arguments.kmeans, arguments.rounds)]
        courses += [
            compare_with_sklearn(*case, arguments.rounds)  # type: ignore[arg-type]
            for case in sklearn_cases(arguments.sklearn)
        ]
        if arguments.plot:
            draw(courses, arguments.plot)
    if "many" in parts:
        compare_with_faiss(*made_up_points(MANY_CENTROIDS), {}, arguments.rounds, MANY_CENTROIDS_GOAL)
    if "duplicates" in parts:
        for members in arguments.members:
            compare_duplicates(members, arguments.dimension, arguments.rounds)
        one_cluster(arguments.one_cluster, arguments.dimension)


# --- data, clocks and verdicts ------------------------------------------------------------------------------------------


def made_up_chunks(rows: int, dimension: int, *, first_chunk: int = 0) -> Iterator[Floats]:
    """Unit rows in chunks of CHUNK_ROWS; chunk n is the same however many are asked for."""
    random = np.random.default_rng(0)
    spectrum = np.arange(1, dimension + 1, dtype=np.float32) ** -SPECTRUM_DECAY
    spectrum /= np.linalg.norm(spectrum)
    groups = random.standard_normal((GROUPS, dimension), np.float32) * spectrum
    groups /= np.linalg.norm(groups, axis=1, keepdims=True)
    groups += random.standard_normal(dimension, np.float32) / np.float32(dimension**0.5)
    shares = np.arange(1, GROUPS + 1) ** -GROUP_DECAY
    for start in range(0, rows, CHUNK_ROWS):
        count = min(CHUNK_ROWS, rows - start)
        random = np.random.default_rng([1, first_chunk + start // CHUNK_ROWS])
        x = random.standard_normal((count, dimension), np.float32)
        x *= spectrum * np.float32(NOISE)
        x += groups[random.choice(GROUPS, count, p=shares / shares.sum())]
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        yield x


def made_up_rows(rows: int, dimension: int, dtype: type = np.float16) -> npt.NDArray[Any]:
    x = np.empty((rows, dimension), dtype)
    for number, chunk in enumerate(made_up_chunks(rows, dimension)):
        x[number * CHUNK_ROWS : number * CHUNK_ROWS + len(chunk)] = chunk
    return x


def parse_shape(text: str) -> tuple[int, int, int]:
    rows, dimension, clusters = (int(each) for each in text.split("x"))
    return rows, dimension, clusters


def take_turns(ways: dict[str, Callable[[int], Any]], rounds: int) -> tuple[Seconds, dict[str, list[Any]]]:
    """Runs each way in each round; seconds and results by way."""
    seconds: Seconds = {name: [] for name in ways}
    made: dict[str, list[Any]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            made[name].append(way(number))
            seconds[name].append(time.perf_counter() - start)
    return seconds, made


def spread(values: list[float], form: str) -> str:
    low, middle, high = (format(value, form) for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low}–{high})"


def ratios(seconds: Seconds, peer: str, ours: str) -> list[float]:
    return [theirs / mine for theirs, mine in zip(seconds[peer], seconds[ours], strict=True)]


def verdict(value: float, goal: float | None, most: bool = False) -> str:
    if goal is None:
        return ""
    reached = value <= goal if most else value >= goal
    return f" [goal {'≤' if most else '≥'} {goal:g}: {'reached' if reached else 'NOT reached'}]"


# --- assignment ---------------------------------------------------------------------------------------------------------


def compare_assign(shape: str, rounds: int) -> None:
    import faiss

    rows, dimension, k = parse_shape(shape)
    print(f"\nassign: {rows:,} × {dimension} rows, {k:,} centroids (k-means of these rows, 2 iterations)", flush=True)
    unrounded = made_up_rows(rows, dimension, np.float32)
    half = unrounded.astype(np.float16)
    wide = half.astype(np.float32)
    centroids = kmeans(half, k, iterations=2, device="cpu").centroids
    index = faiss.IndexFlatIP(dimension)
    index.add(centroids)
    low = torch.from_numpy(centroids).bfloat16().T
    float32_products, on_float32_rows = f"{OURS}, float32 products", f"{OURS}, float32 rows"
    ways: dict[str, Callable[[int], Any]] = {
        OURS: lambda _: assign(half, centroids, device="cpu")[0],
        FAISS: lambda _: index.search(wide, 1)[1][:, 0],
        on_float32_rows: lambda _: assign(unrounded, centroids, device="cpu")[0],
        float32_products: lambda _: Assigner(centroids, device="cpu", precision="float32")(half)[0],
        "naive bfloat16": lambda _: naive_assign(half, low),
    }
    assign(half[:TILE_ROWS], centroids, device="cpu")  # compiles
    Assigner(centroids, device="cpu", precision="float32")(half[:TILE_ROWS])
    seconds, made = take_turns(ways, rounds)
    goals = {OURS: ASSIGN_GOALS.get(shape), float32_products: FLOAT32_GOAL}
    work = 2e-9 * rows * dimension * k
    for name, values in seconds.items():
        times = ratios(seconds, FAISS, name)
        middle = statistics.median(times)
        print(
            f"  {name:24s} {spread(values, '.3f')} s, {work / statistics.median(values):,.0f} GFLOP/s, "
            f"{spread(times, '.2f')} times as fast as faiss{verdict(middle, goals.get(name))}"
        )
    unrounded_labels = index.search(unrounded, 1)[1][:, 0]
    labels = {name: results[-1] for name, results in made.items()}
    for name in (OURS, on_float32_rows, float32_products, "naive bfloat16"):
        on_wide = name == on_float32_rows
        own, theirs = (unrounded, unrounded_labels) if on_wide else (wide, labels[FAISS])
        print_equality(name, own, centroids, labels[name], theirs)
        print_reference(name, own, centroids, labels[name])
    mine = statistics.median(seconds[OURS])
    for name, ceiling in product_seconds(wide, centroids).items():
        print(
            f"  matrix products alone, {name}: {ceiling:.3f} s, {work / ceiling:,.0f} G(FL)OP/s; "
            f"ours runs at {ceiling / mine:.0%} of that, naive bfloat16 at {ceiling / statistics.median(seconds['naive bfloat16']):.0%}"
        )


def naive_assign(x: Half, low: torch.Tensor) -> npt.NDArray[np.int64]:
    """The plain way on a CPU that has bfloat16: products and argmax, chunk by chunk."""
    chunks = (torch.from_numpy(x[start : start + NAIVE_ROWS]).bfloat16() for start in range(0, len(x), NAIVE_ROWS))
    return torch.cat([(chunk @ low).argmax(dim=1) for chunk in chunks]).numpy()


def print_equality(name: str, x: Floats, centroids: Floats, mine: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> None:
    """How many labels equal faiss's, and what the others lose, or win, in cosine."""
    other = np.flatnonzero(mine != theirs)
    loss = cosines(x[other], centroids[theirs[other]]) - cosines(x[other], centroids[mine[other]])
    equal, worst = 1 - len(other) / len(x), max(float(loss.max(initial=0)), 0.0)
    goals = ("", "") if name.startswith("naive") else (verdict(equal, EQUAL_GOAL), verdict(worst, LOSS_GOAL, most=True))
    print(
        f"  {name:24s} labels equal to faiss's {equal:.4%} ({len(other):,} differ){goals[0]}, worst loss of cosine {worst:.2g}{goals[1]}, "
        f"faiss's against it {max(float((-loss).max(initial=0)), 0.0):.2g}"
    )


def print_reference(name: str, x: Floats, centroids: Floats, labels: npt.NDArray[Any]) -> None:
    """How many labels of rows at even steps equal the argmax of float64 products; of equal products, the first counts."""
    at = np.linspace(0, len(x) - 1, min(REFERENCE_ROWS, len(x))).astype(np.int64)
    columns = centroids.T.astype(np.float64)
    chunks = (x[at[start : start + REFERENCE_CHUNK]] for start in range(0, len(at), REFERENCE_CHUNK))
    expected = np.concatenate([(chunk.astype(np.float64) @ columns).argmax(axis=1) for chunk in chunks])
    differ = np.count_nonzero(expected != labels[at])
    result = f"{differ:,} labels differ from" if differ else "all labels equal"
    print(f"  {name:24s} of {len(at):,} rows, {result} float64's")


def cosines(x: Floats, others: Floats) -> npt.NDArray[np.float64]:
    left, right = x.astype(np.float64), others.astype(np.float64)
    dots = np.einsum("nd,nd->n", left, right)
    return dots / (np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1))


def product_seconds(x: Floats, centroids: Floats) -> dict[str, float]:
    """Seconds of the matrix products alone, for all rows: the faster of tiles side by side, and products that share the threads."""
    some = torch.from_numpy(x[:CEILING_ROWS])
    found = {}
    for name, multiply, out_type, left, right in (
        ("int8", torch._int_mm, torch.int32, (some * 400).round().clamp(-127, 127).to(torch.int8), torch.int8),
        ("bfloat16", torch.mm, torch.bfloat16, some.bfloat16(), torch.bfloat16),
        ("float32", torch.mm, torch.float32, some, torch.float32),
    ):
        columns = torch.from_numpy(centroids * (400 if out_type == torch.int32 else 1)).to(right)
        ways = (tiled_products, shared_products)
        trials = [timed(way, multiply, out_type, left, columns) for way in ways for _ in range(2)]
        found[name] = min(trials) * len(x) / len(some)
    return found


def timed(
    way: Callable[..., None],
    multiply: Callable[..., Any],
    out_type: torch.dtype,
    left: torch.Tensor,
    right: torch.Tensor,
) -> float:
    start = time.perf_counter()
    way(multiply, out_type, left, right)
    return time.perf_counter() - start


def tiled_products(
    multiply: Callable[..., Any], out_type: torch.dtype, left: torch.Tensor, right: torch.Tensor
) -> None:
    def work(start: int, scratch: torch.Tensor) -> None:
        rows = left[start : start + TILE_ROWS]
        for first in range(0, len(right), TILE_CENTROIDS):
            columns = right[first : first + TILE_CENTROIDS]
            multiply(rows, columns.T, out=scratch[: len(rows) * len(columns)].view(len(rows), len(columns)))

    size = TILE_ROWS * TILE_CENTROIDS
    starts = range(0, len(left), TILE_ROWS)
    run_tiles(work, starts, torch.get_num_threads(), lambda: torch.empty(size, dtype=out_type))


def shared_products(
    multiply: Callable[..., Any], out_type: torch.dtype, left: torch.Tensor, right: torch.Tensor
) -> None:
    scratch = torch.empty(PRODUCT_ROWS * len(right), dtype=out_type)
    for start in range(0, len(left), PRODUCT_ROWS):
        rows = left[start : start + PRODUCT_ROWS]
        multiply(rows, right.T, out=scratch[: len(rows) * len(right)].view(len(rows), len(right)))


# --- k-means ------------------------------------------------------------------------------------------------------------


class Fit(NamedTuple):
    """Centroids, and what the way itself tells of its course: seconds after each iteration, mean cosine to the centroids it began with."""

    centroids: npt.NDArray[Any]
    seconds: list[float]
    cosines: list[float]


class Course(NamedTuple):
    """Mean cosines by seconds, of one data set: a list of points for each way."""

    title: str
    points: dict[str, list[tuple[float, float]]]


class Rows(NamedTuple):
    """The same rows twice."""

    half: Half
    wide: Floats


def fit_ours(x: Rows, k: int, seed: int, iterations: int | None, device: str = "cpu") -> Fit:
    start, seconds = time.perf_counter(), list[float]()
    fixed = {} if iterations is None else {"iterations": iterations, "tolerance": -np.inf}
    made = kmeans(
        x.half,
        k,
        seed=seed,
        device=device,
        on_iteration=lambda *_: seconds.append(time.perf_counter() - start),
        **fixed,  # type: ignore[arg-type]
    )
    return Fit(made.centroids, seconds, made.objective)


def fit_faiss(x: Rows, k: int, seed: int, iterations: int) -> Fit:
    import faiss

    made = faiss.Kmeans(
        x.wide.shape[1], k, niter=iterations, spherical=True, seed=seed + 1, max_points_per_centroid=len(x.wide)
    )
    made.train(x.wide)
    return Fit(
        made.centroids, [each["time"] for each in made.iteration_stats], [each / len(x.wide) for each in made.obj]
    )


def fit_fastkmeans(x: Rows, k: int, seed: int, iterations: int) -> Fit:
    from fastkmeans import FastKMeans

    made = FastKMeans(x.wide.shape[1], k, niter=iterations, gpu=False, seed=seed)
    made.train(x.wide)
    return Fit(made.centroids, [], [])


def fit_sklearn(x: Rows, k: int, seed: int, iterations: int) -> Fit:
    import warnings

    from sklearn.cluster import KMeans

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it hasn't converged
        made = KMeans(k, n_init=1, max_iter=iterations, random_state=seed).fit(x.wide)
    return Fit(made.cluster_centers_, [], [])


def fit_naive(x: Rows, k: int, seed: int, iterations: int) -> Fit:
    """Lloyd's iterations from random rows, by naive_assign."""
    chosen = np.random.default_rng(seed).choice(len(x.half), k, replace=False)
    centroids = torch.from_numpy(x.wide[chosen])
    for _ in range(iterations):
        labels = torch.from_numpy(naive_assign(x.half, centroids.bfloat16().T))
        sums = torch.zeros_like(centroids)
        for start in range(0, len(labels), NAIVE_ROWS):
            sums.index_add_(0, labels[start : start + NAIVE_ROWS], torch.from_numpy(x.wide[start : start + NAIVE_ROWS]))
        norms = sums.norm(dim=1, keepdim=True)
        centroids = torch.where(norms > 0, sums / norms.clamp(min=1e-9), centroids)
    return Fit(centroids.numpy(), [], [])


def mean_cosine(x: Half, centroids: npt.NDArray[Any]) -> float:
    """By one exact assignment to the centroids' directions."""
    _, similarity = assign(x, unit_rows_on_grid(centroids), device="cpu")
    return float(similarity.mean())


def points(fit: Fit, seconds: float, judged: float) -> list[tuple[float, float]]:
    """A fit's course: what an iteration begins with is what the one before ended with."""
    return [*zip(fit.seconds[:-1], fit.cosines[1:], strict=True), (seconds, judged)]


def compare_fits(
    x: Rows, ways: dict[str, Callable[[int], Fit]], rounds: int
) -> tuple[Seconds, dict[str, list[float]], dict[str, list[tuple[float, float]]]]:
    """Seconds and mean cosines by way and seed, and the courses of the first seed."""
    seconds, made = take_turns(ways, rounds)
    judged = {name: [mean_cosine(x.half, fit.centroids) for fit in fits] for name, fits in made.items()}
    courses = {name: points(fits[0], seconds[name][0], judged[name][0]) for name, fits in made.items()}
    for name, values in seconds.items():
        iterations = sorted({len(fit.seconds) for fit in made[name]})
        took = f", {' or '.join(map(str, iterations))} iterations" if iterations[-1] else ""
        print(
            f"  {name:28s} {spread(values, '.2f')} s, mean cosine {spread(judged[name], '.5f')}{took}; "
            f"{OURS} is {spread(ratios(seconds, name, OURS), '.2f')} times as fast"
        )
    return seconds, judged, courses


def made_up_points(shape: str) -> tuple[Rows, int]:
    """Return rows for a k-means, and K."""
    rows, dimension, k = parse_shape(shape)
    print(
        f"\nk-means: {rows:,} × {dimension} rows, K {k:,}, {ITERATIONS} iterations, another seed each round", flush=True
    )
    half = made_up_rows(rows, dimension)
    kmeans(half[: 8 * 512], 8, iterations=3, device="cpu")  # compiles
    return Rows(half, half.astype(np.float32)), k


def compare_with_faiss(
    x: Rows, k: int, others: dict[str, Callable[[int], Fit]], rounds: int, goal: float
) -> dict[str, list[tuple[float, float]]]:
    """Ours, faiss and others in turns; return their courses."""
    ways: dict[str, Callable[[int], Fit]] = {
        OURS: lambda seed: fit_ours(x, k, seed, ITERATIONS),
        FAISS: lambda seed: fit_faiss(x, k, seed, ITERATIONS),
        **others,
    }
    seconds, judged, courses = compare_fits(x, ways, rounds)
    times = ratios(seconds, FAISS, OURS)
    print(f"  ours against faiss: {spread(times, '.2f')} times as fast{verdict(statistics.median(times), goal)}")
    gains = [mine - theirs for mine, theirs in zip(judged[OURS], judged[FAISS], strict=True)]
    print(f"  ours against faiss: mean cosine {spread(gains, '+.5f')}{verdict(min(gains), 0)}")
    return courses


def compare_kmeans(shape: str, rounds: int) -> Course:
    x, k = made_up_points(shape)
    others: dict[str, Callable[[int], Fit]] = {
        "fastkmeans": lambda seed: fit_fastkmeans(x, k, seed, ITERATIONS),
        "naive bfloat16": lambda seed: fit_naive(x, k, seed, ITERATIONS),
        f"{OURS}, default iterations": lambda seed: fit_ours(x, k, seed, None),
    }
    courses = compare_with_faiss(x, k, others, rounds, KMEANS_GOAL)
    for name, way in (("fastkmeans", fit_fastkmeans), ("naive bfloat16", fit_naive)):
        courses[name] = fewer(x, k, way, FEWER_ITERATIONS, courses[name])
    return Course("{:,} × {:,}, K {:,}".format(*x.half.shape, k), courses)


def fewer(
    x: Rows,
    k: int,
    way: Callable[[Rows, int, int, int], Fit],
    iterations: tuple[int, ...],
    last: list[tuple[float, float]],
) -> list[tuple[float, float]]:
    """The course of a way that tells nothing of it, from runs of fewer iterations."""
    found = []
    for count in iterations:
        start = time.perf_counter()
        centroids = way(x, k, 0, count).centroids
        found.append((time.perf_counter() - start, mean_cosine(x.half, centroids)))
    return [*found, *last]


def sklearn_cases(shape: str) -> Iterator[tuple[str, Half, int]]:
    rows, dimension, k = parse_shape(shape)
    yield f"{rows:,} × {dimension}, K {k:,}", made_up_rows(rows, dimension), k
    folder = pools.REAL / "embeddings" / "img_emb"
    if folder.is_dir():
        x = np.concatenate([np.load(path) for path in sorted(folder.glob("*.npy"))]).astype(np.float32)
        x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
        yield f"{len(x):,} × {x.shape[1]} image embeddings, K 400", x, 400


def compare_with_sklearn(title: str, half: Half, k: int, rounds: int) -> Course:
    print(f"\nk-means: {title}, another seed each round", flush=True)
    x = Rows(half, half.astype(np.float32))
    ways: dict[str, Callable[[int], Fit]] = {
        OURS: lambda seed: fit_ours(x, k, seed, None),
        "sklearn": lambda seed: fit_sklearn(x, k, seed, 300),
        f"{FAISS}, 20 iterations": lambda seed: fit_faiss(x, k, seed, 20),
    }
    _, judged, courses = compare_fits(x, ways, rounds)
    gains = [mine - theirs for mine, theirs in zip(judged[OURS], judged["sklearn"], strict=True)]
    print(f"  ours against sklearn: mean cosine {spread(gains, '+.5f')}{verdict(min(gains), 0)}")
    courses["sklearn"] = fewer(x, k, fit_sklearn, SKLEARN_ITERATIONS, courses["sklearn"])
    return Course(title, courses)


def draw(courses: list[Course], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams.update({"svg.hashsalt": "tailwise", "svg.fonttype": "none"})  # the same small file each time
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, grid = plt.subplots(1, len(courses), figsize=(4.2 * len(courses), 3.8), squeeze=False, layout="constrained")
    for axes, course in zip(grid[0], courses, strict=True):
        for name, found in course.points.items():
            axes.plot(*zip(*found, strict=True), "o-", markersize=3, label=name)
        axes.set(xscale="log", xlabel="seconds", title=course.title)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.title.set_fontsize(9)
        axes.legend(fontsize=8)
    grid[0][0].set_ylabel("mean cosine to the centroid")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)


# --- assignment and k-means on a device ---------------------------------------------------------------------------------


def compare_on_device(part: str, shape: str, rounds: int, device: str) -> None:
    """Ours, installed peers and the products alone: k-means, or assignment to the centroids of a k-means of two iterations."""
    rows, dimension, k = parse_shape(shape)
    iterations = ITERATIONS if part == "kmeans" else 1
    print(f"\n{part} on {device}: {rows:,} × {dimension} rows, K {k:,}, iterations: {iterations}", flush=True)
    half = made_up_rows(rows, dimension)
    x = Rows(half, half.astype(np.float32))
    centroids = None if part == "kmeans" else kmeans(half, k, iterations=2, device=device).centroids
    ways: dict[str, Callable[[int], Any]] = {OURS: lambda _: assign(half, centroids, device=device)[0]}
    if centroids is None:
        ways[OURS] = lambda seed: fit_ours(x, k, seed, ITERATIONS, device).centroids
    for name, module, way in ((FLASH, "flash_kmeans", flash_on_device), (CUML, "cuml", cuml_on_device)):
        if importlib.util.find_spec(module) is None:
            print(f"  {name}: not installed")
        else:
            ways[name] = way(x, k, centroids, device)
    take_turns(ways, 1)  # compiles
    seconds, made = take_turns(ways, rounds)
    for name, values in seconds.items():
        times = ratios(seconds, name, OURS)
        goal = verdict(statistics.median(times), CUDA_PEERS_GOAL) if name != OURS else ""
        print(f"  {name:24s} {spread(values, '.4f')} s; {OURS} is {spread(times, '.2f')} times as fast{goal}")
        if centroids is None:
            print(f"  {name:24s} mean cosine {spread([mean_cosine(half, each) for each in made[name]], '.5f')}")
        else:
            print_reference(name, x.wide, centroids, made[name][-1])
    products = iterations * product_seconds_on_device(half, k, device)
    share = products / statistics.median(seconds[OURS])
    print(
        f"  float16 products alone: {products:.4f} s; {OURS}: {share:.1%} of their speed{verdict(share, CUDA_PRODUCTS_GOAL)}"
    )


def flash_on_device(x: Rows, k: int, centroids: Floats | None, device: str) -> Callable[[int], Any]:
    from flash_kmeans import FlashKMeans

    def way(seed: int) -> npt.NDArray[Any]:
        model = FlashKMeans(x.half.shape[1], k, ITERATIONS, tol=0.0, seed=seed, device=torch.device(device))
        if centroids is None:
            return model.fit(torch.from_numpy(x.half)).centroids_b[0].float().cpu().numpy()
        model.centroids_b, model._batch_size = torch.from_numpy(centroids).to(device).half()[None], None
        return model.predict(torch.from_numpy(x.half)).cpu().numpy()

    return way


def cuml_on_device(x: Rows, k: int, centroids: Floats | None, _: str) -> Callable[[int], Any]:
    from cuml.cluster import KMeans

    options = {"n_clusters": k, "n_init": 1, "tol": 0.0, "output_type": "numpy"}
    if centroids is None:
        options |= {"init": "random", "max_iter": ITERATIONS}
        return lambda seed: KMeans(random_state=seed, **options).fit(x.wide).cluster_centers_
    # Each centroid is its own cluster, so that this fit keeps them.
    model = KMeans(init=centroids, max_iter=1, **options).fit(centroids)
    return lambda _: model.predict(x.wide)


def product_seconds_on_device(x: Half, k: int, device: str) -> float:
    """Seconds of the float16 products of all rows and K centroids, on the device: the least of three, after a first."""
    rows, found = torch.from_numpy(x).to(device), []
    columns = rows[:k].T.contiguous()
    for _ in range(4):
        rows[0, 0].item()  # waits for the device
        start = time.perf_counter()
        for chunk in rows.split(CEILING_ROWS):
            products = torch.mm(chunk, columns)
        products[0, 0].item()
        found.append(time.perf_counter() - start)
    return min(found[1:])


# --- near-duplicates ----------------------------------------------------------------------------------------------------


def made_up_members(random: np.random.Generator, direction: Floats, members: int) -> Half:
    """Rows about one direction; a tenth are near-copies of others."""
    dimension = len(direction)
    x = random.standard_normal((members, dimension), np.float32)
    x += direction
    copies = random.permutation(members)[: int(COPIES * members)]
    noise = random.standard_normal((len(copies), dimension), np.float32)
    x[copies] = x[random.integers(0, members, len(copies))] + np.float32(0.05) * noise
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x.astype(np.float16)


def plain(x: Half) -> tuple[Floats, npt.NDArray[np.int64]]:
    """The published way: all similarities of a cluster in float32, the maxima of the upper triangle."""
    rows = torch.nn.functional.normalize(torch.from_numpy(x).float())
    best, at = torch.triu(rows @ rows.T, diagonal=1).max(dim=0)
    return best.numpy(), at.numpy()


def compare_duplicates(members: int, dimension: int, rounds: int) -> None:
    random = np.random.default_rng(0)
    count = max(2, 40_000 // members)
    sizes = [members + int(random.integers(-members // 10, members // 10 + 1)) for _ in range(count)]
    directions = random.standard_normal((count, dimension), np.float32)
    clusters = [made_up_members(random, *each) for each in zip(directions, sizes, strict=True)]

    def ours(_: int) -> list[Any]:  # as the stage does
        return list(
            map_in_order(
                lambda x, threads: most_similar_earlier(x, device="cpu", threads=threads),
                clusters,
                torch.get_num_threads(),
                lambda x: len(x) > SMALL,
            )
        )

    ours(0)  # compiles, and meets the shapes
    seconds, made = take_turns({OURS: ours, "plain": lambda _: [plain(x) for x in clusters]}, rounds)
    for (best, _), (other, _) in zip(made[OURS][-1], made["plain"][-1], strict=True):
        # The zeros below the diagonal win over negatives.
        np.testing.assert_allclose(np.maximum(best, 0), other, atol=1e-5)
    equal = [
        (mine == theirs)[best > 0].mean()
        for (best, mine), (_, theirs) in zip(made[OURS][-1], made["plain"][-1], strict=True)
    ]
    times = ratios(seconds, "plain", OURS)
    print(
        f"\nduplicates: {count} clusters of {members:,} ± 10 % members × {dimension}: ours {spread(seconds[OURS], '.3f')} s, plain "
        f"{spread(seconds['plain'], '.3f')} s: {spread(times, '.2f')} times as fast{verdict(statistics.median(times), DUPLICATES_GOAL)}; "
        f"{sum(sizes) / statistics.median(seconds[OURS]):,.0f} members/s; {np.mean(equal):.4%} found the same member",
        flush=True,
    )


def one_cluster(members: int, dimension: int) -> None:
    """One large cluster in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds, before, peak = pool.apply(judge_one_cluster, (members, dimension))
    print(
        f"\nduplicates: one cluster of {members:,} × {dimension}: {seconds:.1f} s, peak RSS {peak / 1e9:.2f} GB, of which "
        f"{before / 1e9:.2f} GB were there before (libraries and rows){verdict(peak, ONE_CLUSTER_GOAL_BYTES, most=True)}"
    )


def judge_one_cluster(members: int, dimension: int) -> tuple[float, int, int]:
    """Seconds, bytes of memory before, and the peak."""
    random = np.random.default_rng(0)
    direction = random.standard_normal(dimension, np.float32)
    x = np.empty((members, dimension), np.float16)
    for start in range(0, members, SMALL):
        x[start : start + SMALL] = made_up_members(random, direction, min(SMALL, members - start))
    before, start_seconds = status_bytes("VmRSS"), time.perf_counter()
    most_similar_earlier(x, device="cpu")
    return time.perf_counter() - start_seconds, before, status_bytes("VmHWM")


def status_bytes(field: str, process: int | str = "self") -> int:
    """A figure of /proc/PID/status; 0 once the process has ended.

    VmHWM, unlike ru_maxrss, knows nothing of the process that this one was forked from.
    """
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


if __name__ == "__main__":
    main()
