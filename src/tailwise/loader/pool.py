"""The samples of a plan as they are read: shards that are as they were imported, their byte ranges, and what was removed."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tailwise.catalog.removals import Removals
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.loader.damaged import check_damaged, find_damaged
from tailwise.loader.ranks import Group
from tailwise.loader.shards import own_cache_folder, require_bytes
from tailwise.plan.plan import Plan
from tailwise.shards.fingerprint import comparable_shards
from tailwise.shards.locations import Locations, ensure_locations
from tailwise.shards.ranges import ShardStore, open_shards

ON_DAMAGED = ("error", "replace")


class Pool(NamedTuple):
    """The parts of a plan's pool that are read."""

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
