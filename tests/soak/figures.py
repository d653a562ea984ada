# ruff: noqa: T201
"""Prints the table of docs/reliability.md from the log of `make soak`."""

import json
import sys
from collections import defaultdict
from pathlib import Path

# kind: what was tried, what came of it
KINDS = {
    "kills": ("trials", "killed", "kills of a command; run again, it gave the same bytes"),
    "disks": ("trials", "full", "full disks; one line, and the same bytes with room"),
    "flips": ("trials", "refused", "flipped bits; the same result, or refused by name"),
    "fuzz": ("trials", "errors", "damaged inputs; a result, or an error of one line"),
}


def main() -> None:
    """Prints a line for each kind and, below it, one for each command or reader."""
    found = defaultdict(list)
    for line in Path(sys.argv[1]).read_text().splitlines():
        record = json.loads(line)
        found[record.pop("kind")].append(record)
    for kind, (tried, came, words) in KINDS.items():
        records = found[kind]
        total, hit = sum(record[tried] for record in records), sum(record[came] for record in records)
        print(f"\n{kind}: {total:,} trials, {hit:,} {came}: {words}")
        for record in records:
            print(f"  {record['name']:<40} {record[tried]:>7,} {record[came]:>7,} {came}")
    print("\nmemory: peak of hostile inputs, in MB, and seconds")
    for record in found["memory"]:
        print(f"  {record['name']:<40} {record['peak_bytes'] / 1e6:>7,.0f} {record['seconds']:>7.1f}")


main()
