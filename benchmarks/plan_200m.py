"""A plan of 200M samples: bytes on disk, time to open, memory, rows/s of both draws on one core, seconds to count an epoch.

The pool is made up (no tars, no embeddings), its plans are made by `make_plan` and have their real format. Each figure of memory or time
comes from a fresh process. Needs 5 GB of disk while it runs. `--samples N` makes it smaller.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from common import append_shards, print_header

from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Catalog
from tailwise.catalog.files import write_array, write_table
from tailwise.kernels.ranks import appearance_ranks
from tailwise.plan import Plan
from tailwise.requests import PlanRequest
from tailwise.steps.planning.plan import make_plan

SHARD_ROWS, PART_SHARDS, CLUSTERS = 10_000, 100, 50_000
DRAWS = ("stream", "bernoulli")
DRAWN_ROWS, CHUNK_ROWS, EPOCHS = 20_000_000, 1 << 20, (0, 1, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=200_000_000, help=f"rounded to whole shards of {SHARD_ROWS:,}")
    parser.add_argument("--measure", nargs=2, metavar=("CATALOG", "PLAN"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    shards = max(1, arguments.samples // SHARD_ROWS)
    rows = shards * SHARD_ROWS
    print_header(
        f"a plan of {rows:,} samples in {shards:,} shards and {CLUSTERS:,} clusters of Pareto sizes, α 0.2, half of the pool",
        "numba",
    )
    with tempfile.TemporaryDirectory() as folder:
        catalog = make_catalog(Path(folder) / "catalog", shards)
        for draw in DRAWS:
            report(catalog, draw, rows)


def make_catalog(folder: Path, shards: int) -> Catalog:
    """A catalog of shards that aren't there, and a clustering of them."""
    catalog = Catalog.create(folder)
    snapshot = append_shards(catalog, [SHARD_ROWS] * shards, PART_SHARDS)
    random = np.random.default_rng(0)
    sizes = random.pareto(1.0, CLUSTERS) + 0.05
    bounds = np.cumsum(sizes / sizes.sum())
    seen = np.zeros(CLUSTERS, np.int64)
    config = {"snapshot": snapshot.number}
    with Artifact(catalog.clusters_folder("main"), "clusters", config, {"snapshot": snapshot.id}) as artifact:
        for part in catalog.parts(snapshot):
            labels = np.minimum(np.searchsorted(bounds, random.random(part.rows)), CLUSTERS - 1).astype(np.int32)
            write_array(artifact.path(f"label-{part.name}.npy"), labels)
            write_array(artifact.path(f"rank-{part.name}.npy"), appearance_ranks(labels, seen))
        nothing = np.zeros(CLUSTERS)
        table = {"cluster": np.arange(CLUSTERS), "size": seen, "d_intra": nothing, "d_inter": nothing}
        write_table(artifact.path("clusters.parquet"), pa.table(table))
        artifact.finish({})
    return catalog


def report(catalog: Catalog, draw: str, rows: int) -> None:
    start = time.perf_counter()
    plan = make_plan(catalog, draw, PlanRequest("dynamics", keep=0.5, draw=draw))
    made = time.perf_counter() - start
    size = sum(path.stat().st_size for path in plan.folder.rglob("*"))
    print(
        f"{draw}: made in {made:.1f} s; {size / 1e9:.2f} GB on disk, {size / rows:.3f} bytes a sample (goal ≤ 8, the small tables apart)"
    )
    command = [sys.executable, __file__, "--measure", str(catalog.folder), draw]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(
        f"  opens in {found['open_seconds']:.3f} s (goal < 1), the first shard is drawn {found['shard_seconds']:.3f} s later"
    )
    for moment in ("imported", "opened", "drawn"):
        kinds = ", ".join(f"{name} {found[moment][name]:.0f} MB" for name in ("RssAnon", "RssFile"))
        print(
            f"  resident when {moment}: {found[moment]['VmRSS']:.0f} MB ({kinds})"
            + " (goal < 300)" * (moment == "drawn")
        )
    for epoch, seconds in found["count_seconds"].items():
        print(f"  counts of epoch {epoch}, from those before: {seconds:.3f} s")
    goal = {"stream": "goal ≥ 20", "bernoulli": "goal ≥ 100"}[draw]
    for epoch, rate in found["rates"].items():
        print(f"  {epoch}: {rate / 1e6:.1f} M rows/s ({goal})")
    if "keep_seconds" in found:
        print(f"  keeping the slots before epoch {EPOCHS[-1]}, once, for all rows: {found['keep_seconds']:.1f} s")


def measure(folder: str, name: str) -> dict[str, Any]:
    """One plan in a fresh process."""
    found: dict[str, Any] = {"imported": memory_mb()}
    start = time.perf_counter()
    plan = Plan(Catalog.open(folder), name)
    found["open_seconds"] = time.perf_counter() - start
    found["opened"] = memory_mb()
    start = time.perf_counter()
    plan.draw(0, slice(0, SHARD_ROWS))
    found["shard_seconds"] = time.perf_counter() - start
    found["drawn"] = memory_mb()
    found["count_seconds"] = {epoch: seconds_to_count(plan, epoch) for epoch in EPOCHS if plan.exact}
    found["rates"] = {f"epoch {epoch}": rows_per_second(plan, epoch) for epoch in EPOCHS}
    if plan.exact:
        start = time.perf_counter()
        plan.keep_slots(EPOCHS[-1])
        found["keep_seconds"] = time.perf_counter() - start
        found["rates"][f"epoch {EPOCHS[-1]}, from kept slots"] = rows_per_second(plan, EPOCHS[-1])
    return found


def memory_mb() -> dict[str, float]:
    """Resident memory of this process, and its shares: its own, and mapped files (which the system may take back)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return {name: int(values[name].split()[0]) / 1000 for name in ("VmRSS", "RssAnon", "RssFile")}


def seconds_to_count(plan: Plan, epoch: int) -> float:
    fresh = Plan(plan.catalog, plan.name)  # which has counted nothing yet
    if epoch:
        fresh.counts(epoch - 1)
    start = time.perf_counter()
    fresh.counts(epoch)
    return time.perf_counter() - start


def rows_per_second(plan: Plan, epoch: int) -> float:
    """Of the first rows, whose pages are in memory; a cold disk adds the time to read 8 bytes a row."""
    rows = min(DRAWN_ROWS, plan.rows)
    spans = [slice(start, min(start + CHUNK_ROWS, rows)) for start in range(0, rows, CHUNK_ROWS)]
    plan.draw(epoch, spans[0])
    for span in spans:
        plan.groups[span].sum()
        plan.ranks[span].sum()
    start = time.perf_counter()
    for span in spans:
        plan.draw(epoch, span)
    return rows / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
