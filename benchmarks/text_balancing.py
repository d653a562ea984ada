"""Text balancing and grouping: captions/s, and what balancing over class names does to head and tail classes of the real pool.

Made-up captions are 12 words of a Zipf vocabulary of 60,000; entries are 1 to 3 of its words. Peers match caption by caption: pyahocorasick
as MetaCLIP's code does, and Python's `in` on few captions. `--samples N` makes the made-up pool smaller.
"""

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ahocorasick
import numpy as np
import pyarrow as pa
from common import append_shards, print_header
from pools import REAL

from tailwise.catalog.catalog import Catalog
from tailwise.catalog.files import write_table
from tailwise.catalog.layout import part_name
from tailwise.catalog.schema import SAMPLE_SCHEMA
from tailwise.kernels.matching import EntryMatcher, space_out
from tailwise.plan.plan import Plan
from tailwise.requests import GroupRequest, PlanRequest
from tailwise.steps.grouping.group import group
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan

WORDS, CAPTION_WORDS, ROUNDS, PART_ROWS = 60_000, 12, 3, 1_000_000
MATCHED, PLAIN = 50_000, 20  # captions


class Text:
    """Made-up captions and entries."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.words = np.array(
            sorted({"".join(map(chr, random.integers(97, 123, random.integers(3, 10)))) for _ in range(WORDS)})
        )
        random.shuffle(self.words)
        weights = 1 / np.arange(1, len(self.words) + 1)
        self.bounds = np.cumsum(weights / weights.sum())

    def captions(self, count: int, seed: int = 1) -> list[str]:
        """Texts of CAPTION_WORDS words."""
        places = np.searchsorted(self.bounds, np.random.default_rng(seed).random((count, CAPTION_WORDS)))
        return [" ".join(row) for row in self.words[np.minimum(places, len(self.words) - 1)]]

    def entries(self, count: int) -> list[str]:
        """About so many different ones."""
        random = np.random.default_rng(2)
        return list(dict.fromkeys(" ".join(random.choice(self.words, size)) for size in random.integers(1, 4, count)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2_000_000)
    samples = parser.parse_args().samples
    print_header("text balancing and grouping", "ahocorasick-rs", "pyahocorasick", "pyarrow")
    text = Text()
    for count in (50_000, 500_000):
        compare(text, count)
    with tempfile.TemporaryDirectory() as folder:
        measure_stages(text, Path(folder), samples)
        if REAL.is_dir():
            tell_classes(Path(folder))


def compare(text: Text, count: int) -> None:
    """One core; processor time, so that other processes don't count; peers turn by turn."""
    entries, captions = text.entries(count), text.captions(MATCHED)
    start = time.thread_time()
    ours = EntryMatcher(entries)
    middle = time.thread_time()
    theirs = ahocorasick.Automaton()
    for number, entry in enumerate(entries):
        theirs.add_word(f" {entry} ", number)
    theirs.make_automaton()
    print(
        f"{len(entries):,} entries: built in {middle - start:.1f} s, pyahocorasick {time.thread_time() - middle:.1f} s"
    )

    def one_by_one() -> list[set[int]]:
        return [{number for _, number in theirs.iter(space_out(item.encode()).decode())} for item in captions]

    counts, _ = ours(captions)
    assert counts.tolist() == [len(found) for found in one_by_one()]
    speeds: dict[str, list[float]] = {"ours": [], "pyahocorasick": []}
    for _ in range(ROUNDS):
        speeds["ours"].append(MATCHED / seconds(lambda: ours(captions)))
        speeds["pyahocorasick"].append(MATCHED / seconds(one_by_one))
    plain = PLAIN / seconds(lambda: [[entry in item for entry in entries] for item in captions[:PLAIN]])
    mine, peer = (statistics.median(speeds[name]) for name in ("ours", "pyahocorasick"))
    print(
        f"  captions/s of one core, {counts.mean():.1f} matches a caption: {mine:,.0f}; pyahocorasick {peer:,.0f} (ratio "
        f"{mine / peer:.1f}); Python's `in` {plain:,.0f} (ratio {mine / plain:,.0f})"
    )


def seconds(task: Callable[[], object]) -> float:
    start = time.thread_time()
    task()
    return time.thread_time() - start


def measure_stages(text: Text, folder: Path, samples: int) -> None:
    """Wall clock, with all processors."""
    catalog = made_up(text, folder / "made-up", samples)
    path = folder / "entries.txt"
    path.write_text("\n".join(text.entries(50_000)))
    for name, options in (("first", {"per_entry": 20}), ("again", {"keep": 0.5})):
        start = time.perf_counter()
        plan = make_plan(catalog, name, PlanRequest("text-balance", entries=path, **options))
        took = time.perf_counter() - start
        print(
            f"a balanced plan of {samples:,} samples, 50,000 entries, {options}, {name}: {took:.1f} s, {samples / took:,.0f} samples/s; "
            f"{plan.manifest['summary']['expected']:,.0f} samples expected"
        )
    size = sum(item.stat().st_size for item in (catalog.folder / "matches").rglob("*"))
    print(f"  the matches: {size / samples:.1f} bytes a sample on disk")
    start = time.perf_counter()
    made = group(catalog, GroupRequest("width"))
    took = time.perf_counter() - start
    print(f"group by a column with {made.summary['clusters']:,} values: {samples / took:,.0f} samples/s")
    column = {
        "key": [f"{row:09d}" for row in range(samples)],
        "domain": np.random.default_rng(3).integers(0, 100_000, samples),
    }
    write_table(folder / "domains.parquet", pa.table(column))
    start = time.perf_counter()
    made = group(catalog, GroupRequest("domain", file=folder / "domains.parquet"))
    took = time.perf_counter() - start
    print(f"group by a file joined by key, {made.summary['clusters']:,} values: {samples / took:,.0f} samples/s")


def made_up(text: Text, folder: Path, samples: int) -> Catalog:
    catalog = Catalog.create(folder)
    sizes = [min(PART_ROWS, samples - start) for start in range(0, samples, PART_ROWS)]
    for part, size in enumerate(sizes):
        rows = np.arange(part * PART_ROWS, part * PART_ROWS + size)
        columns = {field.name: pa.nulls(size, field.type) for field in SAMPLE_SCHEMA}
        columns |= {
            "shard": pa.array(np.full(size, part), pa.int32()),
            "key": pa.array([f"{row:09d}" for row in rows], pa.string()),
            "caption": pa.array(text.captions(size, part + 10), pa.string()),
            "width": pa.array(rows * 7 % 4096, pa.int32()),
        }
        table = pa.table(list(columns.values()), pa.schema([field.with_nullable(True) for field in SAMPLE_SCHEMA]))
        write_table(catalog.folder / "samples" / f"{part_name(part)}.parquet", table)
    append_shards(catalog, sizes)
    return catalog


def tell_classes(folder: Path) -> None:
    """Mean rates of samples of frequent, medium and rare classes: the truth serves for this table alone."""
    catalog = import_pool([REAL / "train"], folder / "real").catalog
    with (REAL / "classes.tsv").open() as stream:
        classes = list(csv.DictReader(stream, delimiter="\t"))
    path = folder / "names.txt"
    path.write_text("\n".join(name for row in classes for name in row["name"].split(", ")))
    with (REAL / "truth.tsv").open() as stream:
        truth = {row["key"]: int(row["class_index"]) for row in csv.DictReader(stream, delimiter="\t")}
    keys = [key for part in catalog.parts() for key in catalog.samples(part, ["key"]).column(0).to_pylist()]
    of_row = np.array([truth[key] for key in keys])
    order = np.argsort([-int(row["train_count"]) for row in classes], kind="stable")
    third = np.empty(len(classes), np.int64)
    third[order] = np.arange(len(classes)) * 3 // len(classes)
    print(f"{len(keys):,} photographs of {len(classes)} classes, entries: the classes' names")
    print("plan                        samples    rate of head / medium / few classes' samples")
    for limit in (20, 50, 100, 200):
        plan = make_plan(catalog, f"t{limit}", PlanRequest("text-balance", entries=path, per_entry=limit))
        print_rates(f"MetaCLIP, t = {limit}", plan, third[of_row])
    plan = make_plan(catalog, "half", PlanRequest("text-balance", entries=path, keep=0.5))
    print_rates(f"MetaCLIP, half (t = {plan.manifest['summary']['per_entry']:.1f})", plan, third[of_row])
    summary = plan.manifest["summary"]
    print(
        f"  {summary['matched']:,} captions hold an entry; {summary['entries_without_match']} of {summary['entries']} are in none"
    )
    group(catalog, GroupRequest("class_index", file=REAL / "truth.tsv", name="truth"))
    for method in ("dynamics", "flat"):
        plan = make_plan(catalog, method, PlanRequest(method, keep=0.5, clustering="truth"))
        print_rates(f"{method} over true classes", plan, third[of_row])


def print_rates(name: str, plan: Plan, third: np.ndarray) -> None:
    rates = plan.rate(slice(0, plan.rows))
    means = " / ".join(f"{rates[third == number].mean():.2f}" for number in range(3))
    print(f"{name:<27} {rates.sum():>8,.0f}    {means}")


if __name__ == "__main__":
    main()
