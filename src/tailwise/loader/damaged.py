"""Shards that are not as they were imported: found before the first batch, by all ranks together; refused, or replaced."""

from __future__ import annotations

import logging

import torch.distributed as dist

from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.loader.ranks import Group, ranks_of
from tailwise.plan.plan import Plan
from tailwise.shards.verify import check_shards

logger = logging.getLogger(__name__)


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
