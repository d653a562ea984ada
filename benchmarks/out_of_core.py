"""Cluster, dedup, plan and draw of pools that do not fit into memory: peak of memory, and seconds per million rows, as the pool grows.

One made-up pool grows: rows of kernels.py in float16, each of COPIES rows of a chunk a near-copy of the row before it, and samples of tars
that are not there. Each command is a process of its own. Peaks are VmHWM of /proc/PID/status: all resident pages, mapped files included.
usage: out_of_core.py FOLDER [--rows 5000000 10000000 20000000] [--dimension 256] [--clusters 2000] [--plot FILE]
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from common import append_shards, print_header
from kernels import CHUNK_ROWS, made_up_chunks
from kmeans_memory import Run, run

import tailwise
from tailwise.catalog import layout
from tailwise.catalog.catalog import Part
from tailwise.catalog.embeddings import open_column, write_part
from tailwise.catalog.files import known_digest, write_record, write_table
from tailwise.catalog.schema import SAMPLE_SCHEMA

SHARD_ROWS, PART_SHARDS = 10_000, 100
PART_ROWS = SHARD_ROWS * PART_SHARDS
PART_CHUNKS = -(-PART_ROWS // CHUNK_ROWS)
COPIES, COPY_NOISE = 20, 0.1  # one row of so many is a copy; noise of norm COPY_NOISE: a cosine of about 0.995
LIMIT = 4e9
Results = dict[int, dict[str, Run]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder in it holds the pool, and is deleted")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[5_000_000, 10_000_000, 20_000_000], help=f"multiples of {PART_ROWS:,}"
    )
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--clusters", type=int, default=2000)
    parser.add_argument("--iterations", type=int, default=5, help="of k-means")
    parser.add_argument("--max-memory", default="3GB", help="of cluster and dedup")
    parser.add_argument("--plot", type=Path, help="draws seconds and memory by rows, as .svg or .png")
    asked = parser.parse_args()
    sizes = sorted(asked.rows)
    if any(rows % PART_ROWS for rows in sizes):
        parser.error(f"--rows: give multiples of {PART_ROWS:,}")
    need, free = sizes[-1] * (6 * asked.dimension + 100), shutil.disk_usage(asked.folder).free
    if need > free:
        raise SystemExit(
            f"this takes about {need / 1e9:.3g} GB of disk, and {free / 1e9:.3g} GB are free in {asked.folder}"
        )
    print_header(
        f"out of core: {asked.dimension} dimensions, float16, K = {asked.clusters:,}, --iterations {asked.iterations}, "
        f"--max-memory {asked.max_memory}",
        *("torch", "numba", "pyarrow"),
    )
    results: Results = {}
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        catalog = tailwise.Catalog.create(Path(folder) / "catalog")
        open_column(catalog, "image", asked.dimension, "made up")
        for rows in sizes:
            grow(catalog, rows, asked.dimension)
            results[rows] = run_steps(catalog, rows, asked)
    print_table(results)
    if asked.plot:
        draw(results, asked.plot)


def grow(catalog: tailwise.Catalog, rows: int, dimension: int) -> None:
    """Append parts until the pool has so many rows. Rows are made and written chunk by chunk."""
    old = catalog.snapshots()[-1].parts if catalog.snapshots() else 0
    snapshot = append_shards(catalog, [SHARD_ROWS] * (rows // SHARD_ROWS), PART_SHARDS)
    for part in catalog.parts(snapshot)[old:]:
        write_samples(catalog, part)
        write_part(catalog, "image", part, dimension, rows_of(part.rows, dimension, part.number * PART_CHUNKS))


def rows_of(rows: int, dimension: int, first_chunk: int) -> Iterator[npt.NDArray[np.float16]]:
    for number, x in enumerate(made_up_chunks(rows, dimension, first_chunk=first_chunk), first_chunk):
        noise = np.random.default_rng([2, number]).standard_normal((len(x[1::COPIES]), dimension), np.float32)
        copies = x[:-1:COPIES][: len(noise)] + noise * np.float32(COPY_NOISE / dimension**0.5)
        x[1::COPIES] = copies / np.linalg.norm(copies, axis=1, keepdims=True)
        yield x.astype(np.float16)


def write_samples(catalog: tailwise.Catalog, part: Part) -> None:
    place = np.arange(part.first_row, part.first_row + part.rows)
    offsets = np.arange(part.rows) % SHARD_ROWS * 10_240
    uids = np.zeros((part.rows, 2), ">u8")
    uids[:, 1] = place
    columns: dict[str, Any] = {
        "shard": place // SHARD_ROWS,
        "key": [f"{row:012d}" for row in place.tolist()],
        "uid": pa.Array.from_buffers(pa.binary(16), part.rows, [None, pa.py_buffer(uids.tobytes())]),
        "caption": [f"caption {row % 1000} of a made-up sample" for row in place.tolist()],
        "image_extension": ["jpg"] * part.rows,
        "image_offset": offsets + 512,
        "image_bytes": np.full(part.rows, 8000),
        "caption_offset": offsets + 9216,
        "caption_bytes": np.full(part.rows, 30),
    }
    nothing = {field.name: pa.nulls(part.rows, field.type) for field in SAMPLE_SCHEMA if field.nullable}
    path = catalog.samples_path(part.number)
    write_table(path, pa.table({**columns, **nothing}).select(SAMPLE_SCHEMA.names).cast(SAMPLE_SCHEMA))
    write_record(layout.marker(path), {"digest": known_digest(path)})


def run_steps(catalog: tailwise.Catalog, rows: int, asked: argparse.Namespace) -> dict[str, Run]:
    """Run the commands on the newest snapshot."""
    name, output = f"of-{rows}", catalog.folder.parent / "drawn.parquet"
    memory, device = ("--max-memory", asked.max_memory), ("--device", "cpu")
    commands = {
        "cluster": (
            *("cluster", catalog.folder, "--name", name, "--k", asked.clusters, "--iterations", asked.iterations),
            *(*memory, *device),
        ),
        "dedup": ("dedup", catalog.folder, "--name", name, "--clustering", name, "--epsilon", 0.05, *memory, *device),
        "plan": (
            *("plan", catalog.folder, name, "--method", "dynamics", "--keep", 0.5),
            *("--clustering", name, "--without", name),
        ),
        "draw": ("draw", catalog.folder, name, "--epoch", 1, "--output", output),
    }
    found = {}
    for step, words in commands.items():
        made = found[step] = run(*words)
        if made.code:
            raise SystemExit(made.said)
        print(
            f"  {rows:,} rows, {step}: {made.seconds:.1f} s, {made.processor_seconds:.1f} s of CPU, "
            f"peak {made.peak_bytes / 1e9:.2f} GB ({made.peak_own_bytes / 1e9:.2f} GB without mapped files); "
            f"load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
    output.unlink()
    return found


def print_table(results: Results) -> None:
    print("\n| step | " + " | ".join(f"{rows / 1e6:g}M rows" for rows in results) + " |")
    print("| --- |" + " --- |" * len(results))
    for step in next(iter(results.values())):
        cells = [
            f"{made.processor_seconds / (rows / 1e6):.1f} CPU s, {made.seconds / (rows / 1e6):.1f} s, {made.peak_bytes / 1e9:.2f} GB"
            for rows, made in ((rows, found[step]) for rows, found in results.items())
        ]
        print(f"| {step} | " + " | ".join(cells) + " |")
    peak = max(made.peak_bytes for found in results.values() for made in found.values())
    print(f"\nhighest peak {peak / 1e9:.2f} GB: {'within' if peak <= LIMIT else 'NOT within'} {LIMIT / 1e9:g} GB")


def draw(results: Results, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams.update({"svg.hashsalt": "tailwise", "svg.fonttype": "none"})  # the same small file each time
    from matplotlib import pyplot as plt

    figure, (seconds, memory) = plt.subplots(1, 2, figsize=(7.5, 3.2), layout="constrained")
    millions = [rows / 1e6 for rows in results]
    for step in next(iter(results.values())):
        runs = [found[step] for found in results.values()]
        seconds.plot(
            millions, [made.processor_seconds / at for made, at in zip(runs, millions, strict=True)], "o-", label=step
        )
        memory.plot(millions, [made.peak_bytes / 1e9 for made in runs], "o-", label=step)
    memory.axhline(LIMIT / 1e9, linestyle=":", color="0.4", linewidth=0.8, label="limit")
    seconds.set(xlabel="million rows", ylabel="CPU seconds per million rows", xlim=(0, None), ylim=(0, None))
    memory.set(xlabel="million rows", ylabel="peak of memory, GB", xlim=(0, None), ylim=(0, 1.1 * LIMIT / 1e9))
    memory.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)


if __name__ == "__main__":
    main()
