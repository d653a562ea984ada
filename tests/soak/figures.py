# ruff: noqa: T201
"""Prints the table of docs/reliability/index.md from the log of `make soak`."""

import json
import sys
from collections import defaultdict
from pathlib import Path

# kind: how many hits `make soak` has to show, what a hit is, and what came of it
KINDS = {
    "kills": (400, "killed while it ran", None, "run again, it gave the same bytes"),
    "disks": (150, "disk full before it ended", None, "one line, and the same bytes with room"),
    "flips": (400, "bits flipped", "refused", "the same result, or refused by name"),
    "fuzz": (20_000, "damaged inputs", "errors", "a result, or an error of one line"),
}


def main() -> int:
    """Prints a line for each kind and, below it, one for each command or reader; returns 1 if there were too few hits."""
    found = defaultdict(list)
    for line in Path(sys.argv[1]).read_text().splitlines():
        record = json.loads(line)
        found[record.pop("kind")].append(record)
    short = False
    for kind, (wanted, hit, came, words) in KINDS.items():
        records = found[kind]
        trials, hits = (sum(record[name] for record in records) for name in ("trials", "hits"))
        short |= hits < wanted
        print(f"\n{kind}: {trials:,} trials, {hits:,} hits ({hit}; at least {wanted:,}): {words}")
        for record in records:
            told = f" {record[came]:>7,} {came}" if came else ""
            print(f"  {record['name']:<40} {record['trials']:>7,} trials {record['hits']:>7,} hits{told}")
    print("\nmemory: peak of hostile inputs, in MB, and seconds")
    for record in found["memory"]:
        print(f"  {record['name']:<40} {record['peak_bytes'] / 1e6:>7,.0f} {record['seconds']:>7.1f}")
    return int(short)


sys.exit(main())
