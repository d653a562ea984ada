"""How well lanes and blocks mix shards that are sorted by class, which is the worst case, against a perfect shuffle.

Total-variation distance of a batch: half the sum over classes of |its share in the batch − its share in the epoch|. Printed is the mean
over all whole batches of an epoch, divided by the same of uniformly permuted rows. 1 is perfect; below 1 batches are more alike than by
chance, since each takes from all lanes evenly. Row numbers only; no sample is read.
usage: shuffle_quality.py [--quick] [--plot FILE]
"""

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pools
from common import append_shards, print_header

import tailwise
from tailwise.loader.order import Order, OrderOptions

BATCHES = (256, 1024)
LANES = (1, 4, 16, 64)
BLOCKS = (16, 64, 256, 1024, 8192)
MORE_BLOCKS = (16_384, 65_536)  # which only the large pool has room for
DEFAULT_LANES, DEFAULT_BLOCK = OrderOptions(64).lanes, OrderOptions(64).block
GOAL = 0.05
WEB_SHARDS, WEB_SHARD_ROWS, WEB_CLASSES = 2000, 2000, 1000


class Case(NamedTuple):
    """A pool sorted by class, and the blocks it has room for."""

    name: str
    plan: tailwise.Plan
    classes: np.ndarray  # int64 [rows]
    blocks: tuple[int, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the large pool")
    parser.add_argument("--plot", type=Path, help="draws the table, as .svg or .png")
    arguments = parser.parse_args()
    print_header("shuffle quality: (mean TV of batches) / (the same of a perfect shuffle); 1 is perfect")
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in (real(Path(folder)), web(Path(folder), WEB_SHARDS // 10 if arguments.quick else WEB_SHARDS)):
            figures[case.name] = measure(case)
    if arguments.plot:
        draw(figures, arguments.plot)


def real(folder: Path) -> Case:
    """The source's samples in 200 tars sorted by class."""
    tars = pools.source(folder)
    truth = pools.classes(tars)
    samples = sorted(pools.read_samples(tars), key=lambda sample: (int(truth[sample[0]]), sample[0]))
    pools.write_tars(samples, folder / "sorted", -(-len(samples) // 200))
    catalog = pools.clustered(folder / "sorted", folder / "catalog")
    plan = tailwise.make_plan(catalog, "sorted", tailwise.PlanRequest("dynamics", keep=0.277))
    keys = [key for part in catalog.parts() for key in catalog.samples(part, ["key"]).column(0).to_pylist()]
    classes = np.array([int(truth[key]) for key in keys])
    assert (np.diff(classes) >= 0).all()
    name = f"{len(keys):,} samples of {len(set(classes.tolist()))} classes in {plan.snapshot.shards} shards"
    return Case(name, plan, classes, BLOCKS)


def web(folder: Path, shards: int) -> Case:
    """Row numbers of a large pool whose class sizes follow Zipf's law, sorted by class; shards and classes in no relation to lanes."""
    catalog = tailwise.Catalog.create(folder / "web")
    append_shards(catalog, [WEB_SHARD_ROWS] * shards, shards)
    plan = tailwise.make_plan(catalog, "web", tailwise.PlanRequest("random", keep=0.277))
    shares = 1 / np.arange(1, WEB_CLASSES + 1)
    bounds = np.cumsum(shares / shares.sum()) * plan.rows
    classes = np.minimum(np.searchsorted(bounds, np.arange(plan.rows), side="right"), WEB_CLASSES - 1)
    name = f"{plan.rows:,} samples of {WEB_CLASSES:,} classes in {shards:,} shards"
    return Case(name, plan, classes, BLOCKS + MORE_BLOCKS)


def measure(case: Case) -> dict[tuple[int, int, int], float]:
    """Ratios by (batch, lanes, block)."""
    epochs = {}  # samples an epoch, by batch
    found = {}
    print(f"\n{case.name}, sorted by class; keep 0.277")
    for batch in BATCHES:
        rows = epoch_rows(case, batch, DEFAULT_LANES, DEFAULT_BLOCK)
        epochs[batch] = rows.size
        perfect = distance(case.classes[np.random.default_rng(0).permutation(rows.ravel()).reshape(rows.shape)])
        lane = rows.size // DEFAULT_LANES
        print(
            f"batch {batch}, {rows.size:,} samples an epoch ({lane:,} in each of {DEFAULT_LANES} lanes); perfect: TV {perfect:.4f}"
        )
        print("  lanes " + "".join(f"{f'block {block:,}':>14}" for block in case.blocks))
        for lanes in LANES:
            for block in case.blocks:
                mine = distance(case.classes[epoch_rows(case, batch, lanes, block)])
                found[batch, lanes, block] = mine / perfect
            print(f"  {lanes:5d} " + "".join(f"{found[batch, lanes, block]:14.3f}" for block in case.blocks))
        default = found[batch, DEFAULT_LANES, DEFAULT_BLOCK]
        verdict = "within" if default - 1 <= GOAL else "NOT within"
        print(
            f"  the default ({DEFAULT_LANES}, {DEFAULT_BLOCK:,}): {default:.3f}, {verdict} {GOAL:.0%} of a perfect shuffle"
        )
    return found


def epoch_rows(case: Case, batch: int, lanes: int, block: int) -> np.ndarray:
    """All whole batches of the first epoch: int64 [batches, batch]."""
    order = Order(case.plan, OrderOptions(batch, lanes=lanes, block=block))
    return np.stack([order.batch(number).rows for number in range(order.batches_until(1))])


def distance(classes: np.ndarray) -> float:
    """Mean total-variation distance of the batches' classes, [batches, batch], from those of all."""
    batches, size = classes.shape
    count = int(classes.max()) + 1
    pool = np.bincount(classes.ravel(), minlength=count) / classes.size
    histograms = np.bincount((np.arange(batches)[:, None] * count + classes).ravel(), minlength=batches * count)
    return float(np.abs(histograms.reshape(batches, count) / size - pool).sum(axis=1).mean() / 2)


def draw(figures: dict[str, dict[tuple[int, int, int], float]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams.update({"svg.hashsalt": "tailwise", "svg.fonttype": "none"})  # the same small file each time
    from matplotlib import pyplot as plt

    grid = plt.subplots(len(BATCHES), len(figures), figsize=(9, 6), sharey=True, squeeze=False, layout="constrained")[1]
    for column, (name, ratios) in enumerate(figures.items()):
        for row, batch in enumerate(BATCHES):
            axes = grid[row, column]
            for shade, lanes in zip(np.linspace(0.75, 0, len(LANES)), LANES, strict=True):
                blocks = sorted({block for size, _, block in ratios if size == batch})
                values = [ratios[batch, lanes, block] for block in blocks]
                axes.plot(blocks, values, "o-", markersize=3, color=plt.get_cmap("viridis")(shade), label=f"{lanes}")
            axes.axhspan(1 - GOAL, 1 + GOAL, color="0.9", zorder=0)
            axes.axhline(1, color="0.5", linewidth=0.8, zorder=0)
            default = ratios[batch, DEFAULT_LANES, DEFAULT_BLOCK]
            axes.plot(DEFAULT_BLOCK, default, "s", markersize=9, fillstyle="none", color="black", label="default")
            axes.set(xscale="log", yscale="log", title=f"{name}\nbatch {batch}")
            axes.title.set_fontsize(9)
            axes.set_xticks([16, 256, 8192, 65_536], ["16", "256", "8,192", "65,536"])
            axes.set_yticks([0.8, 1, 1.5, 2, 4], ["0.8", "1", "1.5", "2", "4"])
            axes.minorticks_off()
    for axes in grid[-1]:
        axes.set_xlabel("block (samples of a lane shuffled together)")
    for axes in grid[:, 0]:
        axes.set_ylabel("TV / that of a perfect shuffle")
    grid[0, -1].legend(title="lanes", fontsize=8, title_fontsize=8)
    plt.gcf().savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)


if __name__ == "__main__":
    main()
