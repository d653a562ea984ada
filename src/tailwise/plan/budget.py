"""Budgets as shares of the pool. The pool is all imported samples that are not removed."""

from __future__ import annotations

import math

from tailwise.errors import UserError


def samples_of_share(share: float, pool: int, most: int, limit: str, option: str = "`keep`") -> int:
    """Return the number of samples in a share of the pool.

    Args:
        share: share above 0.
        pool: number of samples in the pool (`Survivors.pool`).
        most: greatest possible number.
        limit: reason for `most`, for the error: "53 samples can be drawn".
        option: option that gave the share, for the error.

    Raises:
        UserError: the share is less than one sample, or more than `most`.
    """
    asked = round(share * pool)
    if asked < 1:
        raise UserError(f"{option} {share:g} of the pool of {pool:,} samples is less than one sample: give more")
    if asked > most:
        largest = math.floor(most / pool * 1e6) / 1e6  # rounded down, so that this share is accepted
        bound = f"the largest possible share is {largest:g}, which is {round(largest * pool):,} samples"
        raise UserError(f"{option} {share:g} asks for {asked:,} samples of the pool of {pool:,}, but {limit}: {bound}")
    return asked
