"""Dedup against planted near-duplicates: precision, recall and F1 by ε, rule, keep-order and K, on the real pool.

The pool has 3,103 planted near-duplicates (re-encoded, cropped by up to 2 pixels, brightness ±10 %); truth.tsv, read here alone, tells of
what. A dropped sample is *right* if the sample it is dropped for has the same origin; precision = right / dropped, recall = right /
planted. The pool's own duplicates, which nobody planted, count as wrong. Samples are compared inside their own clusters (probe = 1;
more in dedup_borders.py). K = 1 compares all with all: what it finds more is what clusters hide.
"""

import argparse
import csv
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import print_header
from pools import REAL

import tailwise
from tailwise.requests import ClusterRequest, DedupRequest

EPSILONS = (0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.11, 0.12, 0.14, 0.17, 0.2, 0.25)
CLUSTERS = (1, 25, 100, 400, 1600)
TWICE = (400, 1600)
RULES = ("greedy", "any-earlier")
KEEPS = ("farthest", "nearest", "random")
PLOT = Path(__file__).resolve().parents[1] / "docs" / "dedup-precision-recall.svg"


@dataclass(frozen=True)
class Score:
    """How right one drop list is."""

    dropped: int
    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return 2 * self.precision * self.recall / max(self.precision + self.recall, 1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path, default=PLOT, help="SVG or PNG to write")
    arguments = parser.parse_args()
    if not REAL.is_dir():
        raise SystemExit(f"no real pool at {REAL}")
    print_header("dedup against planted near-duplicates", "torch")
    found: dict[tuple[int, str, str, float], Score] = {}
    with tempfile.TemporaryDirectory() as folder:
        catalog = tailwise.import_pool([REAL / "train", REAL / "embeddings"], Path(folder) / "catalog").catalog
        origin, planted = truth(catalog)
        print(f"{len(origin):,} samples, {planted:,} planted")
        for clusters in CLUSTERS:
            tailwise.cluster(catalog, ClusterRequest(k=clusters, name=f"k{clusters}", force=clusters == 1))
            for keep in KEEPS if clusters == 100 else KEEPS[:1]:
                for rule in RULES:
                    for epsilon in EPSILONS:
                        found[clusters, keep, rule, epsilon] = measure(
                            catalog, origin, planted, clusters, keep, rule, epsilon
                        )
        report(found)
        twice(catalog, origin, planted)
    draw(found, arguments.plot)


def truth(catalog: tailwise.Catalog, path: Path = REAL / "truth.tsv") -> tuple[np.ndarray, int]:
    """The origin of each row, by the column duplicate_of of a table, and how many rows have another."""
    with path.open() as stream:
        source = {row["key"]: row["duplicate_of"] for row in csv.DictReader(stream, delimiter="\t")}
    origins = []
    for key in (key for part in catalog.parts() for key in catalog.samples(part, ["key"])["key"].to_pylist()):
        root = key
        while source[root]:
            root = source[root]
        origins.append(root)
    return np.array(origins), sum(map(bool, source.values()))


def measure(
    catalog: tailwise.Catalog, origin: np.ndarray, planted: int, clusters: int, keep: str, rule: str, epsilon: float
) -> Score:
    name = f"k{clusters}-{keep}-{rule}-{epsilon}"
    request = DedupRequest(epsilon=epsilon, rule=rule, order=keep, clustering=f"k{clusters}", probe=1, name=name)
    tailwise.dedup(catalog, request)
    return judge(catalog, origin, planted, name)


def judge(catalog: tailwise.Catalog, origin: np.ndarray, planted: int, *names: str) -> Score:
    """Of several lists together, each made without those before it."""
    tables = [
        pq.read_table(catalog.drops_folder(name) / "dropped.parquet", columns=["row", "kept_row"]) for name in names
    ]
    row, kept_row = (pa.concat_tables(tables).column(column).to_numpy() for column in ("row", "kept_row"))
    right = int((origin[row] == origin[kept_row]).sum())
    return Score(len(row), right / max(len(row), 1), right / planted)


def twice(catalog: tailwise.Catalog, origin: np.ndarray, planted: int) -> None:
    """What one clustering hides another may show: the survivors of one dedup are compared inside other clusters."""
    print("twice, the second time among the survivors, inside the clusters of another seed:")
    for clusters in TWICE:
        tailwise.cluster(catalog, ClusterRequest(k=clusters, name=f"other{clusters}", seed=1))
        for epsilon in (0.08, 0.09, 0.1):
            first, second = f"k{clusters}-farthest-greedy-{epsilon}", f"other{clusters}-{epsilon}"
            tailwise.dedup(
                catalog,
                DedupRequest(epsilon=epsilon, clustering=f"other{clusters}", probe=1, without=[first], name=second),
            )
            score = judge(catalog, origin, planted, first, second)
            print(
                f"  K {clusters:4}, ε {epsilon:g}: F1 {score.f1:.3f} (precision {score.precision:.3f}, recall {score.recall:.3f})"
            )


def report(found: dict[tuple[int, str, str, float], Score]) -> None:
    for clusters in CLUSTERS:
        print(f"K = {clusters}, farthest first: ε, then dropped, precision, recall, F1 of greedy; of any-earlier")
        for epsilon in EPSILONS:
            cells = [
                f"{score.dropped:6,} {score.precision:.3f} {score.recall:.3f} {score.f1:.3f}"
                for score in (found[clusters, "farthest", rule, epsilon] for rule in RULES)
            ]
            print(f"  {epsilon:<6g} {' | '.join(cells)}")
    print("best F1:")
    for clusters, keep in dict.fromkeys((clusters, keep) for clusters, keep, _, _ in found):
        for rule in RULES:
            epsilon = max(EPSILONS, key=lambda epsilon: found[clusters, keep, rule, epsilon].f1)
            score = found[clusters, keep, rule, epsilon]
            print(
                f"  K {clusters:4}, {keep:8}, {rule:11}: {score.f1:.3f} at ε {epsilon:g} "
                f"(precision {score.precision:.3f}, recall {score.recall:.3f})"
            )


def draw(found: dict[tuple[int, str, str, float], Score], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams.update({"svg.hashsalt": "tailwise", "svg.fonttype": "none"})  # the same small file each time
    from matplotlib import pyplot as plt

    figure, (curve, f1) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for shade, clusters in zip(np.linspace(0.85, 0, len(CLUSTERS)), CLUSTERS, strict=True):
        colour = plt.get_cmap("viridis")(shade)
        for rule, style in zip(RULES, ("-", ":"), strict=True):
            scores = [found[clusters, "farthest", rule, epsilon] for epsilon in EPSILONS]
            label = f"K = {clusters:,}" if rule == "greedy" else None
            curve.plot([s.recall for s in scores], [s.precision for s in scores], style, color=colour)
            f1.plot(EPSILONS, [s.f1 for s in scores], style, color=colour, label=label)
    marked = (0.05, 0.07, 0.1, 0.14, 0.2)
    for epsilon in marked:
        score = found[100, "farthest", "greedy", epsilon]
        curve.plot(score.recall, score.precision, "o", markersize=3, color="black")
        curve.annotate(
            f"ε {epsilon:g}",
            (score.recall, score.precision),
            textcoords="offset points",
            xytext=(-6, -3),
            fontsize=7,
            ha="right",
            va="top",
        )
    f1.plot([], [], "-", color="0.4", label="greedy")
    f1.plot([], [], ":", color="0.4", label="any-earlier")
    curve.set(
        xlabel="recall", ylabel="precision", xlim=(0.65, 1.01), ylim=(0.3, 1.02), title="by ε; dots: K = 100, greedy"
    )
    f1.set(xlabel="ε", ylabel="F1", xscale="log", ylim=(0, 1.02), title="F1 by ε")
    f1.set_xticks([0.005, 0.01, 0.02, 0.05, 0.1, 0.2], ["0.005", "0.01", "0.02", "0.05", "0.1", "0.2"])
    f1.minorticks_off()
    f1.legend(fontsize=8, loc="lower right")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)


if __name__ == "__main__":
    main()
