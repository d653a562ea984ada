"""What benchmarks share: the header with machine and versions, and catalogs of shards that are not there."""

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from tailwise.catalog.catalog import Catalog, Snapshot
from tailwise.catalog.schema import SHARD_SCHEMA


def print_header(title: str, *packages: str) -> None:
    model = "unknown processor"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("tailwise", "numpy", *packages))
    print(f"{title}\n{model}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}")


def made_up_pool(about: str | None) -> tuple[argparse.Namespace, str]:
    """Return rows, dimension and part_rows as given on the command line, and a line that says so."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--part-rows", type=int, default=50_000)
    asked = parser.parse_args()
    return asked, f"{asked.rows:,} made-up rows of {asked.dimension} dimensions, parts of {asked.part_rows:,} rows"


def append_shards(
    catalog: Catalog, rows: Sequence[int], per_part: int = 1, paths: Sequence[str] | None = None
) -> Snapshot:
    """Adds a snapshot of shards that are not there, of so many samples each; `per_part` of them make up a part."""
    numbers = np.arange(len(rows))
    columns = {
        "shard": numbers,
        "path": paths or [f"/data/pool/{number:05d}.tar" for number in numbers],
        "part": numbers // per_part,
        "rows": rows,
        "size_bytes": np.full(len(rows), 1 << 28),
        "index_checksum": [f"{number:032x}" for number in numbers],
    }
    columns |= {name: [None] * len(rows) for name in SHARD_SCHEMA.names if name not in columns}
    return catalog.append_snapshot(pa.table(columns, SHARD_SCHEMA), -(-len(rows) // per_part))
