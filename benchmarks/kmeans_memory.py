"""`tailwise cluster` of pools of growing size within --max-memory: peak of memory, and seconds, which should grow as N does.

One made-up pool grows (rows of kernels.py); each clustering is a command of its own, in a process of its own, and k-means is fitted on all
rows. Peaks are those of /proc/PID/status: all resident pages (VmHWM), and those of them that are no file's (RssAnon, asked 50 times a
second). Pages of mapped files can be taken back at any time, and the kernel decides how many stay.
usage: kmeans_memory.py [--rows 1000000 2000000 4000000] [--clusters 1000] [--iterations 10] [--max-memory 2GB] [--plot FILE]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import append_shards, print_header
from kernels import CHUNK_ROWS, made_up_chunks, status_bytes

import tailwise
from tailwise.catalog.embeddings import open_column, write_part
from tailwise.requests import bytes_of

PART_CHUNKS = 61  # about a million rows
POLL_SECONDS = 0.02
TOO_MANY = 200_000  # clusters


class Run(NamedTuple):
    """What one command took."""

    seconds: float
    processor_seconds: float
    peak_bytes: int
    peak_own_bytes: int
    code: int
    said: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 2_000_000, 4_000_000])
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--max-memory", default="2GB")
    parser.add_argument("--folder", type=Path, help="for the pool; the system's temporary one by default")
    parser.add_argument("--plot", type=Path, help="draws seconds by rows, as .svg or .png")
    arguments = parser.parse_args()
    print_header(
        f"cluster --k {arguments.clusters} --iterations {arguments.iterations} --max-memory {arguments.max_memory}, "
        f"all rows of {arguments.dimension} dimensions, float16",
        *("torch", "numba"),
    )
    limit = bytes_of("max_memory", arguments.max_memory)
    sizes = sorted(arguments.rows)
    need, free = (
        sizes[-1] * (2 * arguments.dimension + 32),
        shutil.disk_usage(arguments.folder or tempfile.gettempdir()).free,
    )
    if need * 1.1 > free:
        raise SystemExit(f"the pool takes {need / 1e9:.3g} GB of disk, and {free / 1e9:.3g} GB are free: see --folder")
    runs = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        catalog = tailwise.Catalog.create(Path(folder) / "catalog")
        open_column(catalog, "image", arguments.dimension, "made up")
        for rows in sizes:
            grow(catalog, rows, arguments.dimension)
            points = -(-rows // arguments.clusters)
            options = ("--k", arguments.clusters, "--iterations", arguments.iterations)
            made = run(
                *("cluster", catalog.folder, "--name", f"of-{rows}", *options, "--points-per-centroid", points),
                *("--max-memory", arguments.max_memory, "--device", "cpu", "--json"),
            )
            if made.code:
                raise SystemExit(made.said)
            runs.append(made)
            print_run(rows, made, limit)
        print_growth(sizes, runs)
        if sizes[-1] >= TOO_MANY:
            refused = run(
                *("cluster", catalog.folder, "--name", "refused", "--k", TOO_MANY),
                *("--max-memory", arguments.max_memory),
            )
            print(f"{TOO_MANY:,} clusters: exit code {refused.code}, {refused.said.strip()}")
    if arguments.plot:
        draw(sizes, runs, limit, arguments.plot)


def grow(catalog: tailwise.Catalog, rows: int, dimension: int) -> None:
    """Appends parts of PART_CHUNKS chunks until the pool has so many rows; the last part may be smaller."""
    snapshots = catalog.snapshots()
    sizes: list[int] = [] if not snapshots else catalog.shards().column("rows").to_pylist()
    old = len(sizes)
    while (left := rows - sum(sizes)) > 0:
        sizes.append(min(left, PART_CHUNKS * CHUNK_ROWS))
    snapshot = append_shards(catalog, sizes)
    for part in catalog.parts(snapshot)[old:]:
        chunks = made_up_chunks(part.rows, dimension, first_chunk=part.number * PART_CHUNKS)
        write_part(catalog, "image", part, dimension, (chunk.astype(np.float16) for chunk in chunks))


def run(*arguments: object) -> Run:
    """One tailwise command, its memory watched."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "tailwise", *map(str, arguments)], stdout=out, stderr=subprocess.STDOUT
        )
        peak = peak_own = 0
        ended, state, usage = 0, 0, None
        while not ended:
            peak, peak_own = (
                max(peak, status_bytes("VmHWM", process.pid)),
                max(peak_own, status_bytes("RssAnon", process.pid)),
            )
            time.sleep(POLL_SECONDS)
            ended, state, usage = os.wait4(process.pid, os.WNOHANG)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(state)
        out.seek(0)
        said = out.read()
    assert usage is not None
    return Run(seconds, usage.ru_utime + usage.ru_stime, peak, peak_own, process.returncode, said)


def print_run(rows: int, made: Run, limit: int) -> None:
    summary = json.loads(made.said[made.said.index("{") :])
    verdict = "within" if made.peak_bytes <= limit else "NOT within"
    print(
        f"  {rows:,} rows: {made.seconds:.1f} s ({made.processor_seconds:.1f} s of processor time), {summary['iterations']} iterations, "
        f"mean cosine {summary['mean_cosine']:.4f}; peak of resident pages {made.peak_bytes / 1e9:.2f} GB, {verdict} {limit / 1e9:g} GB "
        f"({made.peak_own_bytes / 1e9:.2f} GB of them are no file's)",
        flush=True,
    )


def print_growth(sizes: list[int], runs: list[Run]) -> None:
    for (rows, before), (more, after) in pairwise(zip(sizes, runs, strict=True)):
        print(f"  {more / rows:.2f} times the rows: {after.seconds / before.seconds:.2f} times the seconds")


def draw(sizes: list[int], runs: list[Run], limit: int, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams.update({"svg.hashsalt": "tailwise", "svg.fonttype": "none"})  # the same small file each time
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(4.5, 3.6), layout="constrained")
    millions = [rows / 1e6 for rows in sizes]
    axes.plot(millions, [made.seconds for made in runs], "o-", label="seconds")
    axes.plot([0, millions[-1]], [0, runs[-1].seconds], "--", color="0.6", linewidth=0.8, label="in proportion")
    memory = axes.twinx()
    memory.plot(millions, [made.peak_bytes / 1e9 for made in runs], "s-", color="tab:red", label="peak of memory")
    memory.axhline(limit / 1e9, linestyle=":", color="tab:red", linewidth=0.8, label="its limit")
    memory.set(ylabel="GB", ylim=(0, 1.25 * limit / 1e9))
    axes.set(xlabel="million rows", ylabel="seconds", xlim=(0, None), ylim=(0, None))
    handles = [line for each in (axes, memory) for line in each.get_lines()]
    axes.legend(handles=handles, fontsize=8, loc="lower right")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)


if __name__ == "__main__":
    main()
