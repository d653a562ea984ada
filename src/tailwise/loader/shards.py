"""Shards of a plan before they are read: they must have bytes; and the cache folder for remote ones."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from tailwise.plan.plan import Plan
from tailwise.shards.containers import no_bytes, without_bytes
from tailwise.storage.store_path import private_folder
from tailwise.text import command_line


def require_bytes(plan: Plan) -> None:
    """Refuse a plan that draws samples without bytes."""
    tables = without_bytes(plan.catalog.shards(plan.snapshot))
    drawn = {}
    for shard, path in zip(tables["shard"].to_pylist(), tables["path"].to_pylist(), strict=True):
        if rows := int((plan.rate(plan.rows_of(shard)) > 0).sum()):
            drawn[path] = rows
    if drawn:
        listing = command_line("export", plan.catalog.folder, plan.name, to="urls", output="SUBSET.parquet")
        raise no_bytes(list(drawn), sum(drawn.values()), f" ({listing} lists them for img2dataset)")


def own_cache_folder(paths: Sequence[str]) -> Path:
    """Return this user's cache folder, made if any shard is remote; a UserError if other users can write to it."""
    if any("://" in path for path in paths):
        return private_folder("tailwise-cache", "`cache_folder`")
    return Path(tempfile.gettempdir())  # not used
