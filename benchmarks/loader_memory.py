"""Memory of the loader and its workers over 20 epochs: it must not grow.

After each epoch, of the parent and of all workers, from smaps_rollup: RSS, PSS (shared pages by their share), USS (own pages), and `heap`:
PSS without mapped files. PSS and USS change whenever another process of the machine maps the same libraries; `heap` doesn't. Growth is
from the end of the second epoch (all is compiled and mapped then) to the end of the last one.
usage: loader_memory.py [--quick]
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pools
from common import print_header
from open_clip.transform import image_transform

import tailwise
from tailwise.loader.loader import Loader

EPOCHS, WORKERS, BATCH, GOAL = 20, 2, 256, 0.02
FROM_EPOCH = 1
SETTLE_SECONDS = 1.0


class Memory(NamedTuple):
    """Megabytes of a process."""

    rss: float
    pss: float
    uss: float
    heap: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without decoding")
    quick = parser.parse_args().quick
    # bytes() keeps an encoded image as it is; without any transform the loader would have threads in place of workers.
    images = {"decode": bytes, "transform": bytes} if quick else {"transform": image_transform(64, is_train=True)}
    print_header(
        f"loader memory: {pools.pool_name()}, keep 0.277, {'not ' * quick}decoded, {WORKERS} workers",
        "torch",
    )
    with tempfile.TemporaryDirectory() as folder:
        tars = pools.source(Path(folder))
        catalog = pools.clustered(tars, Path(folder) / "catalog")
        plan = tailwise.make_plan(catalog, "epochs", tailwise.PlanRequest("dynamics", keep=0.277))
        loader = Loader(plan, batch_size=BATCH, workers=WORKERS, **images)
        found: list[dict[str, Memory]] = []
        for epoch in range(EPOCHS):
            samples = sum(len(batch.rows) for batch in loader.epoch(epoch))
            time.sleep(SETTLE_SECONDS)  # so that the same batches lie ready
            found.append(memories())
            print(
                f"epoch {epoch:2d}, {samples:,} samples: "
                + "; ".join(f"{name} {show(found[-1][name])}" for name in found[-1])
            )
        loader.close()
    print_growth(found)


def memories() -> dict[str, Memory]:
    """Of the parent, and the sum of the workers."""
    workers = [memory(child.pid) for child in multiprocessing.active_children()]
    if len(workers) != WORKERS:
        raise SystemExit(f"{len(workers)} workers are alive, not {WORKERS}")
    return {"parent": memory(os.getpid()), "workers": Memory(*(sum(values) for values in zip(*workers, strict=True)))}


def memory(process: int) -> Memory:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {name: int(rest.split()[0]) for name, rest in (line.split(":", 1) for line in lines)}
    own = kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]
    heap = kilobytes["Pss_Anon"] + kilobytes["Pss_Shmem"]
    return Memory(*(value * 1024 / 1e6 for value in (kilobytes["Rss"], kilobytes["Pss"], own, heap)))


def show(item: Memory) -> str:
    return f"RSS {item.rss:.0f} PSS {item.pss:.0f} USS {item.uss:.0f} heap {item.heap:.1f} MB"


def print_growth(found: list[dict[str, Memory]]) -> None:
    first, last = found[FROM_EPOCH], found[-1]
    totals = [sum(item.heap for item in moment.values()) for moment in (first, last)]
    for name in first:
        changes = [
            f"{kind.upper()} {after / before - 1:+.1%}"
            for kind, before, after in zip(Memory._fields, first[name], last[name], strict=True)
        ]
        print(f"growth, epoch {FROM_EPOCH} to {EPOCHS - 1}: {name} {', '.join(changes)}")
    growth = totals[1] / totals[0] - 1
    verdict = "within" if growth < GOAL else "NOT within"
    print(f"growth of the heap of all: {growth:+.2%}, {verdict} the goal of {GOAL:.0%}")


if __name__ == "__main__":
    main()
