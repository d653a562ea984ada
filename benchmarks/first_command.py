"""The first commands of a fresh install: numba compiles the kernels once per machine and keeps them on disk.

Two passes of import, cluster, dedup, plan and export over a small made-up pool: the first with an empty NUMBA_CACHE_DIR, the second with
the cache that the first left. Seconds are the processor's in user mode, children included, and of the wall; on a busy machine, compare
the former. The wall seconds of the first pass include reading the libraries, where these are not in the page cache.
usage: first_command.py [--rows 3000] [--dimension 64] [--k 50]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from common import print_header
from pipeline import ALPHA, KEEP, write_metadata

EPSILON = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--dimension", type=int, default=64)
    parser.add_argument("--k", type=int, default=50)
    arguments = parser.parse_args()
    print_header("first command: with an empty cache of compiled kernels, and with a full one", "torch", "numba")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_metadata(folder / "metadata", arguments.rows, arguments.dimension, compressed=False)
        first, second = (one_pass(folder, folder / f"catalog-{number}", arguments.k) for number in range(2))
        print("             user CPU, s        wall, s\n             first  second   first  second")
        for step in first:
            (cpu, wall), (cpu_again, wall_again) = first[step], second[step]
            print(f"  {step:10s} {cpu:5.1f}  {cpu_again:5.1f}    {wall:5.1f}  {wall_again:5.1f}")
        made = Counter(path.name.split("-")[0] for path in (folder / "compiled").rglob("*.nbc"))
        print(f"  {len(made)} functions; compiled for several types: {[each for each, n in made.items() if n > 1]}")


def one_pass(folder: Path, catalog: Path, k: int) -> dict[str, tuple[float, float]]:
    """User CPU seconds and wall seconds of each command."""
    steps = {
        "import": ["import", folder / "metadata", catalog],
        "cluster": ["cluster", catalog, "--k", k],
        "dedup": ["dedup", catalog, "--epsilon", EPSILON],
        "plan": ["plan", catalog, "epochs", "--method", "dynamics", "--alpha", ALPHA, "--keep", KEEP],
        "export": ["export", catalog, "epochs", "--to", "rates-json", "--output", catalog.with_suffix(".json")],
    }
    return {name: run(list(map(str, step)), folder / "compiled") for name, step in steps.items()}


def run(command: list[str], cache: Path) -> tuple[float, float]:
    start = time.perf_counter()
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache)}
    process = subprocess.Popen([sys.executable, "-m", "tailwise", *command], env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    return usage.ru_utime, time.perf_counter() - start


if __name__ == "__main__":
    main()
