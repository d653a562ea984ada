"""CPU seconds of the driver and of the tasks of each step: an executor runs all tasks in one worker process.

A step reads parts in its tasks alone, so that the driver's share is small: this is what lets an executor spread a step over machines.
The pool is made up: `--rows` rows of `--dimension` dimensions in parts of `--part-rows` rows. A small pool goes through all steps first,
so that imports and compiled loops do not count.
usage: driver_share.py [--rows 300000] [--dimension 256] [--part-rows 50000]
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import stages
from common import made_up_pool, print_header

import tailwise
from tailwise.execution.base import Calls, Executor, Needs, Worker
from tailwise.execution.local import begin_process
from tailwise.requests import ClusterRequest, DedupRequest, FilterRequest

WARM_UP_ROWS = 4_000

_kept = [Worker()]  # of the worker process


class OneWorkerExecutor(Executor):
    """Runs all tasks, one item at a time, in one process that is not the driver's."""

    def __init__(self) -> None:
        self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), begin_process)

    def slots(self, needs: Needs) -> int:  # noqa: ARG002
        """Return how many items run at the same time."""
        return 1

    def forget(self) -> None:
        """Let the worker drop what it keeps."""
        self._process.submit(_forget).result()

    def _run(self, calls: Calls[Any, Any], batches: Iterable[Sequence[Any]], needs: Needs) -> Iterator[Any]:  # noqa: ARG002
        for batch in batches:
            yield self._process.submit(_call, calls, batch).result()

    def cpu_seconds(self) -> float:
        """Return the CPU time of the worker process so far."""
        return self._process.submit(time.process_time).result()


def _call(calls: Calls[Any, Any], batch: Sequence[Any]) -> Any:
    return calls(batch, _kept[0])


def _forget() -> None:
    _kept[0] = Worker()


def main() -> None:
    asked, shape = made_up_pool(__doc__)
    print_header(f"driver's share: {shape}", "torch", "numba", "pyarrow")
    executor = OneWorkerExecutor()
    with tempfile.TemporaryDirectory() as folder:
        for rows in (WARM_UP_ROWS, asked.rows):
            figures = measure(Path(folder) / str(rows), rows, asked, executor)
    print(f"    {'':34s} {'driver':>10s} {'tasks':>10s} {'share':>8s}")
    figures["all"] = tuple(map(sum, zip(*figures.values(), strict=True)))
    for name, (driver, tasks) in figures.items():
        print(f"    {name:34s} {driver:8.2f} s {tasks:8.2f} s {driver / (driver + tasks):8.1%}")


def measure(
    folder: Path, rows: int, asked: argparse.Namespace, executor: OneWorkerExecutor
) -> dict[str, tuple[float, float]]:
    """Run all steps over a new pool; return CPU seconds of driver and tasks by step."""
    folder.mkdir()
    part_rows = min(asked.part_rows, rows // 2)
    source = stages.make_metadata(folder / "metadata", rows, asked.dimension, part_rows)
    catalog, context = folder / "catalog", tailwise.Context(executor=executor)
    steps: dict[str, Callable[[], Any]] = {
        "import": lambda: tailwise.import_pool(source, catalog, part_rows=part_rows, context=context),
        f"cluster K={rows // 150:,}": lambda: tailwise.cluster(catalog, ClusterRequest(k=rows // 150), context),
        "dedup ε=0.05, greedy": lambda: tailwise.dedup(catalog, DedupRequest(epsilon=0.05), context),
        "filter clip-score, top half": lambda: tailwise.filter_samples(
            catalog, FilterRequest("clip-score", keep=0.5, name="clip"), context
        ),
        "plan dynamics": lambda: tailwise.make_plan(
            catalog, "epochs", tailwise.PlanRequest("dynamics", keep=0.5, without=["duplicates"]), context
        ),
        "plan dbp": lambda: tailwise.make_plan(catalog, "subset", tailwise.PlanRequest("dbp", keep=0.25), context),
        **{
            f"export {name}, epoch 1": lambda name=name: tailwise.export_plan(
                tailwise.Plan(catalog, "epochs"), name, folder / name, epoch=1, context=context
            )
            for name in ("parquet", "keys", "rates-json", "datacomp")
        },
    }
    return {name: cpu_seconds(step, executor) for name, step in steps.items()}


def cpu_seconds(step: Callable[[], Any], executor: OneWorkerExecutor) -> tuple[float, float]:
    before = time.process_time(), executor.cpu_seconds()
    step()
    return time.process_time() - before[0], executor.cpu_seconds() - before[1]


if __name__ == "__main__":
    main()
