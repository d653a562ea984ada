"""Shards of a plan before they are read: they must have bytes, as they were imported; and the cache folder for remote ones."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tailwise.catalog.removals import Removals
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.loader.damaged import check_damaged, find_damaged
from tailwise.loader.ranks import Group
from tailwise.plan.plan import Plan
from tailwise.shards.containers import no_bytes, without_bytes
from tailwise.shards.fingerprint import comparable_shards
from tailwise.shards.locations import Locations, ensure_locations
from tailwise.shards.ranges import ShardStore, open_shards
from tailwise.text import command_line

DEFAULT_CACHE_BYTES = 32_000_000_000
ON_DAMAGED = ("error", "replace")


class Pool(NamedTuple):
    """What is read of the samples of a plan."""

    locations: Locations
    store: ShardStore
    damaged: dict[int, str]  # shards that are not read, with the reason
    removals: Removals


def open_pool(
    plan: Plan,
    ranks: tuple[int, int],
    group: Group,
    check: str,
    on_damaged: str,
    max_replaced: float,
    cache_folder: str | Path | None,
    cache_bytes: int,
    context: Context,
) -> Pool:
    """Return the shards of a plan, checked; see `tailwise.Loader` for the arguments, and the UserErrors."""
    if on_damaged not in ON_DAMAGED:
        raise UserError(f"on_damaged {on_damaged!r}: must be one of {', '.join(ON_DAMAGED)}")
    if not 0 <= max_replaced <= 1:
        raise UserError(f"max_replaced {max_replaced}: must lie between 0 and 1")
    require_bytes(plan)
    damaged = find_damaged(plan, check, ranks, group, context)
    check_damaged(plan, damaged, on_damaged, max_replaced)
    ensure_locations(plan.catalog, plan.snapshot, context)
    shards = comparable_shards(plan.catalog, plan.snapshot, context)
    folder = cache_folder or own_cache_folder(shards["path"].to_pylist())
    store = open_shards(shards, folder, cache_bytes, compare=check != "none")
    removals = Removals.of(plan.catalog, plan.snapshot, context.progress)
    return Pool(Locations(plan.catalog, plan.snapshot), store, damaged, removals)


def require_bytes(plan: Plan) -> None:
    """Refuse a plan that draws samples without bytes."""
    tables = without_bytes(plan.catalog.shards(plan.snapshot))
    drawn = {}
    for shard, path in zip(tables["shard"].to_pylist(), tables["path"].to_pylist(), strict=True):
        if rows := int((plan.rate(plan.rows_of(shard)) > 0).sum()):
            drawn[path] = rows
    if drawn:
        listing = command_line("export", plan.catalog.folder, plan.name, to="datacomp", output="SUBSET.npy")
        raise no_bytes(list(drawn), sum(drawn.values()), f" ({listing} lists them for DataComp's tools)")


def own_cache_folder(paths: Sequence[str]) -> Path:
    """Return this user's cache folder, made if any shard is remote; a UserError if other users can write to it."""
    folder = Path(tempfile.gettempdir()) / f"tailwise-cache-{os.getuid()}"
    if any("://" in path for path in paths):
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise UserError(f"{folder} can be written to by others: remove it, or name a cache folder (`cache_folder`)")
    return folder
