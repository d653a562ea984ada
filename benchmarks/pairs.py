"""Run the benchmarks with two versions of tailwise in turns: how many times as fast AFTER is, by figure.

BEFORE and AFTER are source folders (…/src) with their benchmarks beside them. Scripts run in processes of their own, BEFORE, AFTER,
BEFORE, AFTER, …, so that what else the machine does falls on both. Both run AFTER's script, unless it fails with BEFORE: then each
version runs its own. A first round compiles, and is not counted. The pool and the made-up rows are small (a pair takes 2 to 3 minutes on
two idle cores): figures here are for comparison, those of the docs come from the scripts themselves.
Prints for each figure the median of the rounds' ratios, above 1 where AFTER is better, with the least and the greatest of them, and the
medians of both.
usage: pairs.py BEFORE AFTER [--rounds 5] [--only stages kernels loader draws]
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from common import print_header

from tailwise.demo.pool import make_pool

IMAGES = 1_500  # of the pool
NUMBER = r"([\d,.]+)"
SMALL_MB = 20  # growth of memory below this says nothing


class Script(NamedTuple):
    """A benchmark at a small size.

    Attributes:
        arguments: of its command line.
        sizes: statements about its module that make it smaller.
        sections: pattern of the lines that the figures below belong to.
        figures: unit → pattern of lines whose groups are the figure's name, or nothing, and its value.
    """

    arguments: str
    sizes: str
    sections: str
    figures: dict[str, str]


SCRIPTS = {
    "stages": Script(
        "--rows 60000",
        "",
        r"^(pool of tars|made-up)$",
        {
            "samples/s": rf"^    (.+?) +[\d.]+ s +{NUMBER} samples/s",
            "MB": rf"^    (.+?) +[\d.]+ s .*memory \+{NUMBER} MB",
        },
    ),
    "kernels": Script(
        "assign --rounds 3 --assign 60000x256x500",
        "",
        r"^(assign: .+?) \(",
        {"s": rf"^  (ours\S*.*?) {{2,}}{NUMBER} \(\S+ s, "},
    ),
    "loader": Script(
        "--quick --side 64",
        "COPIES = 2; MODES = {name: MODES[name] for name in ('bytes', 'decoded')}",
        r"^  (keep [\d.]+):",
        {
            "samples/s": rf"^    (\w+ +\d workers): +[\d,]+ : +{NUMBER} ",
            "us of CPU": rf"^    (\w+ +\d workers):.*by CPU time .* : {NUMBER} us",
        },
    ),
    "draws": Script(
        "",
        "ROWS, CLUSTERS = 1_000_000, 5_000",
        r"^(draws): ",
        {
            "M rows/s": rf"^(stream, epoch +\d+|bernoulli): +{NUMBER} M rows/s",
            "M rows/s, slots given": rf"^(stream, epoch +\d+):.*scratch, +{NUMBER} M rows/s",
        },
    ),
}
RATES = {"samples/s", "M rows/s", "M rows/s, slots given"}  # more is better; of all others, less


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="BEFORE", help="source folder of the one version")
    parser.add_argument("after", type=Path, metavar="AFTER", help="source folder of the other")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of each script")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=[*SCRIPTS], help="scripts; all by default")
    options = parser.parse_args()
    sources = (options.before.resolve(), options.after.resolve())
    print_header(f"pairs: {sources[0]}, {sources[1]}; {options.rounds} rounds", "torch", "numba")
    with tempfile.TemporaryDirectory() as folder:
        make_pool(Path(folder) / "train", images=IMAGES, concepts=50, shards=4)
        for name in options.only:
            compare(name, sources, Path(folder), options.rounds)


def compare(name: str, sources: tuple[Path, Path], pool: Path, rounds: int) -> None:
    after = sources[1].parent / "benchmarks"
    try:
        run(name, sources[0], after, pool)
        scripts = (after, after)
    except subprocess.CalledProcessError:
        scripts = (sources[0].parent / "benchmarks", after)
        run(name, sources[0], scripts[0], pool)
    run(name, sources[1], after, pool)
    print(f"\n{name} {SCRIPTS[name].arguments}".rstrip() + "; each its own script" * (scripts[0] != after))
    start = time.perf_counter()
    found = [[run(name, *pair, pool) for pair in zip(sources, scripts, strict=True)] for _ in range(rounds)]
    print(f"  {(time.perf_counter() - start) / rounds:.0f} s a pair")
    for figure in {**found[0][0], **found[0][1]}:
        print_figure(figure, [(before.get(figure), after.get(figure)) for before, after in found])


def print_figure(figure: tuple[str, str], pairs: list[tuple[float | None, float | None]]) -> None:
    name, unit = figure
    known = [(before, after) for before, after in pairs if before is not None and after is not None]
    if unit == "MB" and (not known or min(min(known)) < SMALL_MB):
        return
    if not known:
        print(f"  {name:62s} only {'BEFORE' if pairs[0][1] is None else 'AFTER'} prints it")
        return
    ratios = [after / before if unit in RATES else before / after for before, after in known]
    medians = " → ".join(f"{statistics.median(values):,.4g}" for values in zip(*known, strict=True))
    print(
        f"  {name:62s} {statistics.median(ratios):5.2f} ({min(ratios):.2f}–{max(ratios):.2f})   {medians} {unit}",
        flush=True,
    )


def run(name: str, source: Path, scripts: Path, pool: Path) -> dict[tuple[str, str], float]:
    """The figures of one run, by name and unit."""
    script = SCRIPTS[name]
    code = (
        f"import pathlib, pools, {name}; pools.REAL = pathlib.Path({str(pool)!r}); "
        f"exec({script.sizes!r}, vars({name})); {name}.main()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (source, scripts)))}
    result = subprocess.run(
        [sys.executable, "-c", code, *script.arguments.split()],
        env=environment,
        cwd=pool,
        capture_output=True,
        text=True,
        check=False,
    )
    figures = dict(read_figures(name, result.stdout))
    if result.returncode or not figures:
        print(f"{scripts / name}.py with {source}: {result.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        raise subprocess.CalledProcessError(result.returncode, result.args)
    return figures


def read_figures(name: str, text: str) -> Iterator[tuple[tuple[str, str], float]]:
    script, section = SCRIPTS[name], ""
    for line in text.splitlines():
        if found := re.search(script.sections, line):
            section = found[1]
        for unit, pattern in script.figures.items():
            if found := re.search(pattern, line):
                yield (f"{section}: {found[1]}", unit), float(found[2].replace(",", ""))


if __name__ == "__main__":
    main()
