"""The webdataset stage: samples/s that come by, and memory, over a pool of 1M samples in shards that come in random order.

The peer is the plain way: every key of the pool with its copies in one dict, loaded whole. Samples are bare (URL and key): a pipeline
that reads tars does some thousands a second and process.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from common import append_shards, print_header

from tailwise.catalog.catalog import Catalog
from tailwise.catalog.files import write_table
from tailwise.loader.webdataset import select
from tailwise.plan import Plan
from tailwise.requests import PlanRequest
from tailwise.steps.planning.plan import make_plan

SHARDS, SHARD_ROWS = 100, 10_000


def main() -> None:
    print_header(
        f"webdataset stage: {SHARDS} shards of {SHARD_ROWS:,} samples in one part, half of them drawn", "pyarrow"
    )
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(make_catalog(Path(folder) / "catalog"), "half", PlanRequest("random", keep=0.5))
        order = np.random.default_rng(0).permutation(SHARDS)
        samples = [{"__url__": path(shard), "__key__": key} for shard in order for key in keys(shard)]
        stage = select(plan)
        next(iter(stage(samples)))  # opens and compiles
        before = resident_mb()
        ours, passed = timed(lambda: sum(1 for _ in stage(samples)))
        memory = resident_mb() - before
        before = resident_mb()
        loading, table = timed(lambda: whole_table(plan))
        plain_memory = resident_mb() - before
        plain, expected = timed(lambda: sum(1 for sample in samples for _ in range(table[sample["__key__"]])))
    assert passed == expected == SHARDS * SHARD_ROWS // 2
    rate, plain_rate = len(samples) / ours, len(samples) / plain
    print(f"stage: {rate / 1e6:.2f} M samples/s, {1000 * ours / SHARDS:.0f} ms a shard, {memory:.0f} MB")
    print(
        f"one dict of all keys: {plain_rate / 1e6:.2f} M samples/s after {loading:.1f} s to load it, {plain_memory:.0f} MB"
    )
    print(f"ratio of rates {rate / plain_rate:.2f}")


def path(shard: int) -> str:
    return f"/data/pool/{shard:05d}.tar"


def keys(shard: int) -> list[str]:
    return [f"{shard:05d}{sample:04d}" for sample in range(SHARD_ROWS)]


def make_catalog(folder: Path) -> Catalog:
    catalog = Catalog.create(folder)
    append_shards(catalog, [SHARD_ROWS] * SHARDS, SHARDS, [path(shard) for shard in range(SHARDS)])
    write_table(catalog.samples_path(0), pa.table({"key": [key for shard in range(SHARDS) for key in keys(shard)]}))
    return catalog


def whole_table(plan: Plan) -> dict[str, int]:
    part = plan.catalog.parts()[0]
    return dict(zip(plan.catalog.samples(part, ["key"]).column(0).to_pylist(), plan.draw(0).tolist(), strict=True))


def timed(task):
    start = time.perf_counter()
    result = task()
    return time.perf_counter() - start, result


def resident_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1000


if __name__ == "__main__":
    main()
