"""The samples of a plan as they are read: shards that are as they were imported, their byte ranges, and what was removed."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from tailwise.catalog.removals import Removals
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.plan.plan import Plan
from tailwise.shards.containers import IMAGES, no_bytes, without_bytes
from tailwise.shards.fingerprint import comparable_shards
from tailwise.shards.locations import Locations, ensure_locations
from tailwise.shards.packed import packed_shards, refuse_packed
from tailwise.shards.ranges import ShardStore, open_shards
from tailwise.shards.verify import check_shards
from tailwise.storage.store_path import private_folder
from tailwise.text import command_line

if TYPE_CHECKING:
    from tailwise.loader.ranks import Group

logger = logging.getLogger(__name__)
ON_DAMAGED = ("error", "replace")
DEFAULT_CACHE_BYTES = 32_000_000_000  # of ranges of shards, on this machine's disk


def check_damaged(plan: Plan, damaged: dict[int, str], on_damaged: str, max_replaced: float) -> None:
    """Refuse damaged shards if their samples are not to be replaced, or are too many; else log them."""
    if damaged and on_damaged == "error":
        raise UserError(
            f"{len(damaged):,} of {plan.snapshot.shards:,} shards can't be read as they were imported, the first is "
            f"{next(iter(damaged.values()))}; restore them, give their new place (`tailwise relocate`), or let other samples stand in "
            "(`on_damaged` replace)"
        )
    for reason in damaged.values():
        logger.warning("samples of this shard are replaced: %s", reason)
    lost = sum(rows.stop - rows.start for rows in map(plan.rows_of, damaged))
    if lost > max_replaced * plan.rows:
        raise UserError(
            f"{lost:,} of {plan.rows:,} samples lie in {len(damaged):,} shards that can't be read, more than the share {max_replaced} "
            "that may be replaced; restore them, or raise `max_replaced`"
        )


def find_damaged(plan: Plan, check: str, ranks: tuple[int, int], group: Group, context: Context) -> dict[int, str]:
    """Return the reasons of damaged shards, by id; ranks of a process group share the work.

    Of shards whose files were replaced, those count whose samples the plan may draw: plans that are made afterwards draw none.
    """
    import torch.distributed as dist  # noqa: PLC0415  (commands that make plans do not wait for torch)

    from tailwise.loader.ranks import ranks_of  # noqa: PLC0415

    together = ranks[1] > 1 and ranks_of(group) is not None
    share = ranks if together else (0, 1)
    found = {
        item.shard: f"{item.path}: {item.reason}"
        for item in check_shards(plan.catalog, plan.snapshot, check, share=share, context=context)
    }
    if together:
        shares: list[dict[int, str]] = [{}] * ranks[1]
        dist.all_gather_object(shares, found, group)
        found = {shard: reason for items in shares for shard, reason in items.items()}
    for shard in plan.catalog.replaced().keys() & found.keys():
        if not plan.drawable(plan.rows_of(shard)).any():
            del found[shard]
    return dict(sorted(found.items()))


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
