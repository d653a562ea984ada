"""Five billion samples on paper: bytes, CPU and GPU hours and dollars by step, and everything that grows with the pool or with K.

All figures follow from the constants below. Each names the benchmark that measured it, or says that it is assumed. Nothing is run, except
that CATALOG's bytes a sample are counted, to compare them with the constants.
usage: five_billion.py [CATALOG] [--samples 5e9] [--clusters 50000] [--dimension 768] …
"""

import argparse
from pathlib import Path
from typing import NamedTuple

HOUR = 3600.0

# --- measured constants; one core is a virtual core of the benchmarks' AMD EPYC -----------------------------------------------

OPS = (
    3.29e11  # products of numbers · 2, a second and core: kernels.py, assign 100,000 × 768, K 20,000: 4.67 s on 2 cores
)
DUPLICATES = (
    35 * 2 / (200_000 * 200_000 * 512)
)  # core seconds by squared members and by dimension: kernels.py, one cluster of 200,000 at d = 512
DECODE_MS = 1.0  # to decode and prepare an image: embed.py, 64-pixel JPEGs (larger ones cost more)
CLIP_SCORES = 299_000 / 2  # samples a second and core: filters.py, d = 512
DRAWS = 2.7e6  # rows a second and core, epoch 20 without stored slots: draws.py
TAR_BYTES = 25_900 * 266e6 / 16_000  # bytes a second and worker of new shards: export_shards.py, 256-pixel images
DEDUP_ROW = (
    31e-6 / 256
)  # core seconds a row and dimension beside the comparisons: out_of_core.py, 5M rows (43 less 9 and 3 for products)
PLAN_US = 0.46  # a row: out_of_core.py, 5M rows
DRAW_TABLE_US = 1.1  # a row: out_of_core.py, 5M rows
INDEX = 37_310.0  # samples a second and core: index_tars.py, 40,000 small samples
SAMPLES_BYTES = 29.4  # a row of samples/ with captions of 4 words: the real pool of filters.py
SEEDING_BYTES = 96  # a number of the K centroids, at most: what `cluster` reserves of --max-memory
RUN_OPEN_MS, GROUP_COPIES, RUN_COPIES = 0.4, 1 << 18, 1 << 20  # export_shards.py; export/shards.py; export/shuffled.py
DEDUP_MEMBER_BYTES = 12  # a member of the largest cluster and dimension: docs/guides/near-duplicates.md

# --- assumed ------------------------------------------------------------------------------------------------------------------

CAPTION_BYTES = 50  # compressed, of a longer caption than that pool's
GPU_SHARE = 0.4  # of the peak that an encoder reaches; not measured
GPU_FLOPS = 989e12  # dense bfloat16 of an H100 or H200
ENCODERS = {"ViT-B/32": 8.8e9, "ViT-L/14": 162e9}  # operations an image, forward
KMEANS_ITERATIONS = 30


class Step(NamedTuple):
    """What one step takes."""

    name: str
    cpu_hours: float
    gpu_hours: float
    read_tb: float  # from shards and catalog
    write_tb: float  # to the catalog or the output
    temporary_tb: float  # at most, deleted in the end
    note: str


class Structure(NamedTuple):
    """Something in the memory of one process that grows."""

    name: str
    grows: str
    bytes: float
    where: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("catalog", type=Path, nargs="?", help="a catalog whose bytes a sample are counted")
    parser.add_argument("--samples", type=float, default=5e9)
    parser.add_argument("--clusters", type=int, default=50_000)
    parser.add_argument("--dimension", type=int, default=768)
    parser.add_argument("--image-bytes", type=float, default=30_000)
    parser.add_argument("--shard-samples", type=float, default=10_000)
    parser.add_argument("--keep", type=float, default=0.3, help="of an epoch")
    parser.add_argument("--cpu-price", type=float, default=0.05, help="dollars a core and hour")
    parser.add_argument("--gpu-price", type=float, default=3.0, help="dollars a GPU and hour")
    asked = parser.parse_args()
    steps, structures = make_steps(asked), make_structures(asked)
    print("| step | CPU hours | GPU hours | dollars | reads | writes | temporary | |\n" + "| --- " * 8 + "|")
    for step in steps:
        print(
            f"| {step.name} | {step.cpu_hours:,.0f} | {step.gpu_hours:,.0f} | {dollars(step, asked):,.0f} | {step.read_tb:,.1f} TB | "
            f"{step.write_tb:,.2f} TB | {step.temporary_tb:,.1f} TB | {step.note} |"
        )
    print("\n| in memory | grows with | size | where |\n" + "| --- " * 4 + "|")
    for item in sorted(structures, key=lambda item: -item.bytes):
        print(f"| {item.name} | {item.grows} | {item.bytes / 1e9:.3g} GB | {item.where} |")
    if asked.catalog:
        print_bytes(asked.catalog)


def dollars(step: Step, asked: argparse.Namespace) -> float:
    return step.cpu_hours * asked.cpu_price + step.gpu_hours * asked.gpu_price


def make_steps(asked: argparse.Namespace) -> list[Step]:
    n, k, d = asked.samples, asked.clusters, asked.dimension
    row = 2.0 * d / 1e12  # TB of an embedding
    tb = n / 1e12  # TB of one byte a sample
    training = min(1000.0 * k, n)
    drawn, members = asked.keep * n, 2 * n / k  # --probe 2: a sample is compared in two clusters
    images = n * asked.image_bytes / 1e12
    runs = drawn / RUN_COPIES
    return [
        Step("import", n / INDEX / HOUR, 0, images, tb * (SAMPLES_BYTES + CAPTION_BYTES), 0, "reads the shards once"),
        *(
            Step(
                f"embed, {name}",
                n * DECODE_MS / 1000 / HOUR,
                n * flops / (GPU_FLOPS * GPU_SHARE) / HOUR,
                *(images, n * row, n * row),
                "GPU hours assumed, not measured",
            )
            for name, flops in ENCODERS.items()
        ),
        Step("filter, CLIP score", n / CLIP_SCORES * d / 512 / HOUR, 0, 2 * n * row, tb * (4 + 1), 0, ""),
        Step(
            "cluster: fit",
            training * k * d * 2 * KMEANS_ITERATIONS / OPS / HOUR,
            *(0, n * row, 0, training * row),
            "an upper bound: carried lists save later iterations",
        ),
        Step("cluster: assign", n * k * d * 2 / OPS / HOUR, 0, n * row, tb * 12, 0, ""),
        Step(
            "dedup",
            (k * members**2 * d * DUPLICATES + n * d * DEDUP_ROW + n * k * d * 2 / OPS) / HOUR,
            *(0, 3 * n * row, tb * 21, 2 * n * row),
            f"{k * members**2 * d * DUPLICATES / HOUR:,.0f} CPU hours of them compare: these fall as 1/K",
        ),
        Step("plan", n * PLAN_US / 1e6 / HOUR, 0, tb * 12, tb * 8, 0, ""),
        Step("draw to Parquet, an epoch", n * DRAW_TABLE_US / 1e6 / HOUR, 0, tb * 40, drawn * 40 / 1e12, 0, ""),
        Step("draw alone, epoch 20", n / DRAWS / HOUR, 0, tb * 8, 0, 0, "12 times faster with stored slots"),
        Step("export to datacomp", n * DRAW_TABLE_US / 1e6 / HOUR, 0, tb * 30, drawn * 16 / 1e12, tb * 25, ""),
        Step(
            "export to shards, an epoch",
            (drawn * asked.image_bytes / TAR_BYTES + drawn / GROUP_COPIES * runs * RUN_OPEN_MS / 1000) / HOUR,
            0,
            *(drawn * asked.image_bytes / 1e12, drawn * asked.image_bytes / 1e12, drawn * 110 / 1e12),
            "",
        ),
    ]


def make_structures(asked: argparse.Namespace) -> list[Structure]:
    n, k, d = asked.samples, asked.clusters, asked.dimension
    shards, parts, members = n / asked.shard_samples, n / 1e6, 2 * n / k
    return [
        Structure("centroids, sums and codes while seeding", "K · d", SEEDING_BYTES * k * d, "cluster: one worker"),
        Structure("rows of the seeding", "K · d", 8 * k * (4 * d + 220), "cluster: one worker"),
        Structure(
            "sums of an iteration (two, and their total), centroids",
            "K · d",
            (3 * 8 + 2 * 4) * k * d,
            "cluster: worker",
        ),
        Structure("centroids and their codes", "K · d", 9 * k * d, "assign, dedup: worker"),
        Structure(
            "the largest cluster, at the mean size", "N / K · d", DEDUP_MEMBER_BYTES * members * d, "dedup: worker"
        ),
        Structure(
            "index of the dedup's buckets, one part at a time", "buckets", 8 * (n * 4 * d / 2e9), "dedup: worker"
        ),
        Structure("table of shards", "shards", 200 * shards, "every command"),
        Structure("shards of an import", "shards", 1000 * shards, "import: driver"),
        Structure("list of the items of an embedding", "N", 200 * n / 4096, "embed: driver"),
        Structure(
            "copies by shard and number", "shards", 256 * 8 * shards, "loader: one node, while it counts an epoch"
        ),
        Structure("positions of the streams over 30 epochs", "K", 30 * 16 * k, "plan, draw, loader"),
        Structure("transitions of the streams over 30 epochs", "K", 30 * 50 * k, "plan, draw, loader"),
        Structure("sizes before each part, one at a time", "K", 8 * k, "ranks: worker"),
        Structure(
            "neighbours of centroids, 1,024 rows at a time", "K", 1024 * 8 * k * 3 + 8 * k * d, "cluster: driver"
        ),
        Structure("uids of a bucket", "no more", 4e6 * 100, "export to datacomp: driver"),
        Structure("keys of a bucket", "no more", 4e6 * 100, "import, exports by key: worker"),
        Structure("one part: samples with captions", "no more", 1e6 * 1000, "import: driver"),
        Structure("names of runs and parts", "N", 100 * (parts + asked.keep * n / RUN_COPIES), "exports"),
    ]


def print_bytes(folder: Path) -> None:
    """Print the bytes a sample of each folder of a catalog."""
    from tailwise.catalog import Catalog

    rows = Catalog.open(folder).snapshot().rows
    print(f"\n{folder}: {rows:,} samples")
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        print(f"  {place.name}: {size / rows:.1f} bytes a sample")


if __name__ == "__main__":
    main()
