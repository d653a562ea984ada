"""Shards of a plan before they are read: they must have bytes; and the cache folder for remote ones."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from tailwise.plan.plan import Plan
from tailwise.shards.containers import IMAGES, no_bytes, without_bytes
from tailwise.shards.packed import packed_shards, refuse_packed
from tailwise.storage.store_path import private_folder
from tailwise.text import command_line

DEFAULT_CACHE_BYTES = 32_000_000_000  # of ranges of shards, on this machine's disk


def require_bytes(plan: Plan) -> None:
    """Refuse a plan that draws samples without bytes, or of compressed tars."""
    shards = plan.catalog.shards(plan.snapshot)
    refuse_packed(plan.catalog.folder, [*_drawn(plan, packed_shards(shards))])
    if drawn := _drawn(plan, without_bytes(shards)):
        listing = command_line("export", plan.catalog.folder, plan.name, to="urls", output="SUBSET.parquet")
        raise no_bytes(list(drawn), sum(drawn.values()), f" ({listing} lists them for img2dataset)")


def _drawn(plan: Plan, shards: pa.Table) -> dict[str, int]:
    """Return the number of rows that a plan may draw of each of some shards (SHARD_SCHEMA), by path, where there are some."""
    pairs = zip(shards["shard"].to_pylist(), shards["path"].to_pylist(), strict=True)
    rows = {path: int((plan.rate(plan.rows_of(shard)) > 0).sum()) for shard, path in pairs}
    return {path: count for path, count in rows.items() if count}


def own_cache_folder(paths: Sequence[str]) -> Path:
    """Return this user's cache folder, made if any shard is remote or a Parquet file; a UserError if others can write to it."""
    if any("://" in path or path.endswith(IMAGES.suffix) for path in paths):
        return private_folder("tailwise-cache", "`cache_folder`")
    return Path(tempfile.gettempdir())  # not used
