"""Budgets: the number of samples that a share of the pool stands for. The pool is all imported samples that are not removed."""

from __future__ import annotations

import math

from tailwise.errors import UserError


def samples_of_share(share: float, pool: int, most: int, limit: str, option: str = "`keep`") -> int:
    """Return the number of samples that a share of the pool stands for.

    Args:
        share: above 0.
        pool: its samples (`Survivors.pool`).
        most: the greatest number that is possible.
        limit: why, for the error: "53 samples can be drawn".
        option: that gave the share, for errors.

    Raises:
        UserError: the share is less than one sample, or more than is possible.
    """
    asked = round(share * pool)
    if asked < 1:
        raise UserError(f"{option} {share:g} of the pool of {pool:,} samples is less than one sample: give more")
    if asked > most:
        largest = math.floor(most / pool * 1e6) / 1e6  # rounded down, so that it is possible itself
        raise UserError(
            f"{option} {share:g} asks for {asked:,} samples of the pool of {pool:,}, but {limit}: the largest possible share is "
            f"{largest:g}, which is {round(largest * pool):,} samples"
        )
    return asked
