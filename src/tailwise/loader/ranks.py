"""Which of the processes that share the batches this one is."""

from __future__ import annotations

import os

import torch.distributed as dist

from tailwise.errors import UserError

Group = dist.ProcessGroup | None  # of torch.distributed; None for the default one


def find_ranks(rank: int | None, world_size: int | None, group: Group = None) -> tuple[int, int]:
    """Return the rank and the number of ranks: of the process group, else as given, else of torchrun's environment, else (0, 1)."""
    found = ranks_of(group)
    if found is not None and found != (
        found[0] if rank is None else rank,
        found[1] if world_size is None else world_size,
    ):
        raise UserError(
            f"rank {rank} and world_size {world_size}: this process is rank {found[0]} of a process group of {found[1]}; leave both out, "
            "or give group=, the process group whose ranks share the batches"
        )
    if found is None and (rank is None or world_size is None):
        found = _launched()
    rank, world_size = (
        at if given is None else given for given, at in zip((rank, world_size), found or (None, None), strict=True)
    )
    world_size = 1 if world_size is None else world_size
    if world_size < 1:
        raise UserError(f"world_size {world_size}: must be at least 1")
    if rank is None and world_size > 1:
        raise UserError(f"world_size {world_size} without rank: give both, or make the loader in the process group")
    rank = rank or 0
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank}: must lie between 0 and {world_size - 1}")
    return rank, world_size


def ranks_of(group: Group = None) -> tuple[int, int] | None:
    """Return the rank of this process in a process group, and the size of the group; None if there is no group."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise UserError("this process does not belong to the group: give the process group that it belongs to")
    return rank, size


def _launched() -> tuple[int, int] | None:
    """Return RANK and WORLD_SIZE, as torchrun sets them; None for a process that was launched alone."""
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return None
    if rank is None or not rank.isdecimal() or not size.isdecimal():
        raise UserError(
            f"WORLD_SIZE is {size} and RANK is {rank}: set both as torchrun does, or give rank and world_size"
        )
    return int(rank), int(size)
