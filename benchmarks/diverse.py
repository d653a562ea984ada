"""compose="diverse" against CABS's way, which reads and decodes a super-batch of five batches and then keeps a fifth.

The peer is a webdataset pipeline over the same tars with the same transform, shuffled, batched five times as large, from which the same
greedy picks. Trained samples/s, bytes read for each, and how many clusters a batch holds; that of plain shuffled batches beside it. Then
the greedy alone at the size of a large run, and CABS-DM and CABS-FM over several concepts a sample, in seconds of one core, which other
programs on the machine change little. Without workers; turns alternate.
usage: diverse.py [--quick]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pools
import torch
import webdataset as wds
from common import print_header
from open_clip.transform import image_transform

import tailwise
from tailwise.kernels.compose import pick_covering, pick_diverse, pick_richest
from tailwise.loader.loader import Loader
from tailwise.loader.order import SUPER_BATCH, Order
from tailwise.shards.locations import Locations
from tailwise.shards.ranges import sample_ranges

BATCH, CROP_PX = 256, 64
GREEDY_BATCH, GREEDY_CLUSTERS, GREEDY_GOAL_SECONDS = 32_768, 50_000, 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    print_header(
        f"diverse: {pools.pool_name()}, {BATCH} of {SUPER_BATCH * BATCH}", "torch", "webdataset", "open_clip_torch"
    )
    with tempfile.TemporaryDirectory() as folder:
        tars = pools.source(Path(folder))
        catalog = pools.clustered(tars, Path(folder) / "catalog")
        plan = tailwise.make_plan(catalog, "all", tailwise.PlanRequest("dynamics", keep=1.0))
        compare(plan, sorted(tars.glob("*.tar")), rounds=1 if quick else 3, batches=4 if quick else 16)
    greedy(rounds=3 if quick else 11)
    for size, concepts in ((4096, 5_000), (8192, 12_000), (32_768, 12_000), (32_768, 500_000), (32_768, 200)):
        by_concepts(size, concepts, rounds=1 if quick else 5)


def compare(plan: tailwise.Plan, tars: list[Path], rounds: int, batches: int) -> None:
    clusters = plan.groups[:]
    transform = image_transform(CROP_PX, is_train=True)
    loaders = {
        compose: Loader(plan, batch_size=BATCH, transform=transform, compose=compose)
        for compose in ("diverse", "shuffle")
    }
    ours = (batch.rows.numpy() for batch in loaders["diverse"])
    theirs = super_batches(plan, tars, transform)
    rates: dict[str, list[float]] = {"CABS's way": [], "tailwise": []}
    held: dict[str, list[int]] = {name: [] for name in rates}
    next(ours), next(theirs)
    for _ in range(rounds):
        for name, given in (("CABS's way", theirs), ("tailwise", ours)):
            start = time.perf_counter()
            rows = list(islice(given, batches))
            rates[name].append(batches * BATCH / (time.perf_counter() - start))
            held[name] += [len(np.unique(clusters[batch])) for batch in rows]
    theirs_rate, ours_rate = (statistics.median(values) for values in rates.values())
    plain = loaders["shuffle"].order
    held["plain shuffle"] = [len(np.unique(clusters[plain.batch(number).rows])) for number in range(rounds * batches)]
    read = SUPER_BATCH * sum(path.stat().st_size for path in tars) / plan.rows
    mine = range_bytes(plan, loaders["diverse"].order, batches)
    print(
        f"trained samples/s: CABS's way {theirs_rate:,.0f}, tailwise {ours_rate:,.0f}, ratio {ours_rate / theirs_rate:.2f}"
    )
    print(f"bytes read a trained sample: CABS's way {read:,.0f}, tailwise {mine:,.0f}, ratio {read / mine:.2f}")
    total = len(np.unique(clusters[clusters >= 0]))
    for name, counts in held.items():
        print(
            f"clusters in a batch of {BATCH}, of {total}: {name} {np.mean(counts):.1f} ({min(counts)} … {max(counts)})"
        )


def super_batches(plan: tailwise.Plan, tars: list[Path], transform) -> Iterator[np.ndarray]:
    """Rows of the batches that the peer picks: the whole super-batch is decoded first."""
    clusters = plan.groups[:]
    keys = [key for part in plan.catalog.parts() for key in plan.catalog.samples(part, ["key"]).column(0).to_pylist()]
    row_of = {key: row for row, key in enumerate(keys)}
    pipeline = wds.DataPipeline(
        wds.SimpleShardList([str(path) for path in tars]),
        wds.tarfile_to_samples(),
        wds.shuffle(5000, initial=1000),
        wds.decode("pilrgb"),
        wds.map_dict(jpg=transform),
        wds.to_tuple("__key__", "jpg", "txt"),
        wds.batched(SUPER_BATCH * BATCH, partial=False),
    ).repeat()
    for number, (names, images, _) in enumerate(pipeline):
        rows = np.array([row_of[name] for name in names])
        labels = clusters[rows]
        picked = pick_diverse(labels, np.bincount(labels).astype(float), count=BATCH, key=np.uint64(number))
        assert len(images[torch.from_numpy(picked)]) == BATCH
        yield rows[picked]


def range_bytes(plan: tailwise.Plan, order: Order, batches: int) -> float:
    rows = np.concatenate([order.batch(number).rows for number in range(batches)])
    shards = (np.searchsorted(plan.shard_offsets, rows, side="right") - 1).astype(np.int32)
    return float(np.diff(sample_ranges(shards, Locations(plan.catalog, plan.snapshot).of(rows))[0][:, 1:]).mean())


def greedy(rounds: int) -> None:
    """Clusters of Pareto sizes, as of a pool's long tail."""
    random = np.random.default_rng(0)
    shares = random.pareto(1.0, GREEDY_CLUSTERS) + 0.05
    seconds = []
    for number in range(rounds + 1):
        labels = random.choice(GREEDY_CLUSTERS, SUPER_BATCH * GREEDY_BATCH, p=shares / shares.sum()).astype(np.int32)
        start = time.process_time()
        frequencies = np.bincount(labels).astype(np.float64)
        picked = pick_diverse(labels, frequencies, count=GREEDY_BATCH, key=np.uint64(number))
        seconds.append(time.process_time() - start)
        held = len(np.unique(labels[picked])), len(np.unique(labels[:GREEDY_BATCH]))
    median = statistics.median(seconds[1:])  # the first compiles
    print(
        f"the greedy: {GREEDY_BATCH:,} of {SUPER_BATCH * GREEDY_BATCH:,} samples, {GREEDY_CLUSTERS:,} clusters: {median * 1000:.1f} ms "
        f"({min(seconds[1:]) * 1000:.1f} … {max(seconds[1:]) * 1000:.1f}; goal < {GREEDY_GOAL_SECONDS * 1000:.0f}), "
        f"holds {held[0]:,} clusters, a random batch {held[1]:,}"
    )


def by_concepts(size: int, concepts: int, rounds: int, mean: float = 8.0) -> None:
    """Lists of concepts whose shares fall as 1 / rank, `mean` a sample at most."""
    random, rows = np.random.default_rng(0), SUPER_BATCH * size
    shares = np.cumsum(1 / np.arange(1, concepts + 1))
    seconds: dict[str, list[float]] = {"diverse": [], "most-concepts": []}
    for _ in range(rounds + 1):
        owners = np.repeat(np.arange(rows), random.poisson(mean, rows))
        codes = np.minimum(np.searchsorted(shares / shares[-1], random.random(len(owners))), concepts - 1)
        pairs = np.unique(owners << 32 | codes)
        counts = np.bincount(pairs >> 32, minlength=rows).astype(np.int32)
        lists = (pairs & 0xFFFFFFFF).astype(np.int32)
        for name, pick in (("diverse", pick_covering), ("most-concepts", pick_richest)):
            start = time.process_time()
            pick(counts, lists, size)
            seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first compiles
    told = ", ".join(
        f"{name} {1000 * value:.1f} ms ({size / value:,.0f} picked samples/s)" for name, value in medians.items()
    )
    print(f"by concepts: {size:,} of {rows:,} samples, {concepts:,} concepts, {len(lists) / rows:.1f} a sample: {told}")


if __name__ == "__main__":
    main()
