"""Steps on a Ray cluster of two nodes on this machine: seconds with one and with two workers, CPU time, and the driver's share of it.

A last row regroups rows by cluster, here and by ray.data (`groupby().map_groups()`): from the same Parquet files to the sum of each
cluster. The pool is made up, as in driver_share.py; a small pool goes through all steps first. Each node has one processor. Needs
`pip install 'ray[data]'`.
usage: ray_nodes.py [--rows 300000] [--dimension 256] [--part-rows 50000]
"""

import argparse
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import stages
from common import made_up_pool, print_header
from ray.cluster_utils import Cluster

import tailwise
from tailwise.execution.base import Apply, Executor
from tailwise.execution.ray import RayExecutor
from tailwise.execution.shuffle import Shuffle
from tailwise.requests import ClusterRequest, DedupRequest, FilterRequest

WARM_UP_ROWS = 4_000
NODE = {"num_cpus": 1, "object_store_memory": 500 << 20}
CLUSTERS, BUCKETS = 2_000, 16
TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    asked, shape = made_up_pool(__doc__)
    print_header(f"two Ray nodes, one processor each: {shape}", "ray", "torch", "numba", "pyarrow")
    nodes = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    nodes.add_node(**NODE)
    try:
        with tempfile.TemporaryDirectory() as folder:
            measure_steps(Path(folder), asked, nodes)
            measure_regroup(Path(folder) / "regroup", asked)
    finally:
        ray.shutdown()
        nodes.shutdown()


def measure_steps(folder: Path, asked: argparse.Namespace, nodes: Cluster) -> None:
    sources = {rows: make_source(folder, rows, asked) for rows in (WARM_UP_ROWS, asked.rows)}
    found: dict[int, dict[str, tuple[float, float, float]]] = {}
    for workers in (1, 2):
        with RayExecutor(nodes.address, cpus=1, workers=workers) as executor:
            for rows, source in sources.items():
                found[workers] = run_steps(folder / f"{rows}-{workers}", source, rows, asked, executor, nodes)
    print(f"    load of the machine: {os.getloadavg()[1]:.1f}")
    print(
        f"    {'':22s} {'1 worker':>10s} {'2 workers':>10s} {'speed-up':>9s} {'CPU, 1':>9s} {'CPU, 2':>9s} {'driver':>8s}"
    )
    totals = np.array([[found[workers][name] for workers in (1, 2)] for name in found[1]])
    for name, (one, two) in zip([*found[1], "all"], [*totals, totals.sum(axis=0)], strict=True):
        cpu = [max(each[1] + each[2], 1e-9) for each in (one, two)]
        print(
            f"    {name:22s} {one[0]:8.2f} s {two[0]:8.2f} s {one[0] / two[0]:8.2f}x {cpu[0]:7.2f} s {cpu[1]:7.2f} s {two[1] / cpu[1]:7.1%}"
        )


def make_source(folder: Path, rows: int, asked: argparse.Namespace) -> Path:
    return stages.make_metadata(folder / f"metadata-{rows}", rows, asked.dimension, min(asked.part_rows, rows // 2))


def run_steps(
    folder: Path, source: Path, rows: int, asked: argparse.Namespace, executor: Executor, nodes: Cluster
) -> dict[str, tuple[float, float, float]]:
    """Run all steps over a new catalog; return wall seconds, and CPU seconds of driver and actors, by step."""
    folder.mkdir()
    context, place, part_rows = tailwise.Context(executor=executor), folder / "catalog", min(asked.part_rows, rows // 2)
    catalog = partial(tailwise.Catalog.open, place)
    request = tailwise.PlanRequest("dynamics", keep=0.5, without=["duplicates"])
    work: dict[str, Callable[[], Any]] = {
        "import": lambda: tailwise.import_pool(source, place, part_rows=part_rows, context=context),
        f"cluster K={rows // 150:,}": lambda: tailwise.cluster(catalog(), ClusterRequest(k=rows // 150), context),
        "dedup ε=0.05": lambda: tailwise.dedup(catalog(), DedupRequest(epsilon=0.05), context),
        "filter clip-score": lambda: tailwise.filter_samples(
            catalog(), FilterRequest("clip-score", keep=0.5, name="clip"), context
        ),
        "plan dynamics": lambda: tailwise.make_plan(catalog(), "epochs", request, context),
        **{
            f"export {name}": lambda name=name: tailwise.export_plan(
                tailwise.Plan(catalog(), "epochs"), name, folder / name, epoch=1, context=context
            )
            for name in ("parquet", "keys", "rates-json", "datacomp")
        },
    }
    return {name: timed(step, nodes) for name, step in work.items()}


def timed(step: Callable[[], Any], nodes: Cluster) -> tuple[float, float, float]:
    before = time.perf_counter(), time.process_time(), actor_seconds(nodes)
    step()
    return time.perf_counter() - before[0], time.process_time() - before[1], actor_seconds(nodes) - before[2]


def actor_seconds(nodes: Cluster) -> float:
    """Return the CPU time of all actors so far, and of their processes that have ended."""
    total = 0
    for node in nodes.list_all_nodes():
        raylet = node.all_processes["raylet"][0].process.pid
        for pid in Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split():
            title, _, fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
            total += sum(map(int, fields.split()[11:15])) if "ray::_Actor" in title else 0
    return total / TICKS


# --- one regroup, here and by ray.data --------------------------------------------------------------------------------


def measure_regroup(folder: Path, asked: argparse.Namespace) -> None:
    paths = make_tables(folder / "tables", asked)
    seconds, found = {}, {}
    for name in ("tailwise", "ray.data"):
        with RayExecutor(cpus=1) as executor:
            for _ in range(2):  # the second time counts
                before = time.perf_counter()
                if name == "tailwise":
                    found[name] = regroup_here(paths, folder / "spill", asked.dimension, executor)
                else:
                    found[name] = regroup_by_ray_data(paths)
                seconds[name] = time.perf_counter() - before
    same = all(np.array_equal(found["tailwise"][each], found["ray.data"][each]) for each in found["tailwise"])
    assert same and found["tailwise"].keys() == found["ray.data"].keys()
    print(f"    regroup of {asked.rows:,} rows by {CLUSTERS:,} clusters, 2 workers, the same sums:")
    for name, each in seconds.items():
        print(f"    {name:30s} {each:8.2f} s {each / seconds['tailwise']:8.2f}x")


def make_tables(folder: Path, asked: argparse.Namespace) -> list[str]:
    folder.mkdir(parents=True)
    random, paths = np.random.default_rng(0), []
    for number, first in enumerate(range(0, asked.rows, asked.part_rows)):
        count = min(asked.part_rows, asked.rows - first)
        x = random.integers(-9, 9, (count, asked.dimension)).astype(np.float32)  # sums are exact
        rows = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), asked.dimension)
        clusters = pa.array(random.integers(0, CLUSTERS, count).astype(np.int32))
        paths.append(str(folder / f"{number:04d}.parquet"))
        pq.write_table(pa.table({"cluster": clusters, "x": rows}), paths[-1])
    return paths


def regroup_here(paths: list[str], folder: Path, dimension: int, executor: Executor) -> dict[int, Any]:
    shuffle = Shuffle(folder, np.dtype([("cluster", "<i4"), ("x", "<f4", (dimension,))]), BUCKETS)
    names = [Path(path).stem for path in paths]
    list(executor.map(Apply(_Spill(shuffle)), paths))
    found = dict(pair for pairs in executor.map(Apply(_Sum(shuffle, names)), range(BUCKETS)) for pair in pairs)
    shutil.rmtree(folder)
    return found


class _Spill:
    def __init__(self, shuffle: Shuffle) -> None:
        self.shuffle = shuffle

    def __call__(self, path: str) -> None:
        table = pq.read_table(path)
        records = np.empty(table.num_rows, self.shuffle.dtype)
        records["cluster"] = table.column("cluster").to_numpy()
        records["x"] = table.column("x").combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
        self.shuffle.write(Path(path).stem, [(records["cluster"] % BUCKETS, records)])


class _Sum:
    def __init__(self, shuffle: Shuffle, names: list[str]) -> None:
        self.shuffle, self.names = shuffle, names

    def __call__(self, bucket: int) -> list[tuple[int, Any]]:
        records = self.shuffle.read(self.names, bucket)
        order = np.argsort(records["cluster"], kind="stable")
        clusters, first = np.unique(records["cluster"][order], return_index=True)
        return [
            (int(cluster), x.sum(axis=0))
            for cluster, x in zip(clusters, np.split(records["x"][order], first[1:]), strict=True)
        ]


def regroup_by_ray_data(paths: list[str]) -> dict[int, Any]:
    def total(group: dict[str, Any]) -> dict[str, Any]:
        return {"cluster": group["cluster"][:1], "sum": np.stack(list(group["x"])).sum(axis=0)[None]}

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # Two partitions and NumPy batches: the fastest of 2 and 16 partitions, and NumPy and Arrow batches.
    found = ray.data.read_parquet(paths).groupby("cluster", num_partitions=2).map_groups(total)
    return {int(row["cluster"]): np.asarray(row["sum"]) for row in found.iter_rows()}


if __name__ == "__main__":
    main()
