"""What a user can choose about a training, apart from open_clip's own arguments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tailwise.errors import UserError
from tailwise.loader.loader import DEFAULT_CACHE_BYTES, ON_DAMAGED
from tailwise.loader.shards import CHECKS

MAX_SEED = 2**31 - 1  # the trainer adds the rank to it, and numpy takes 32 bits


@dataclass(frozen=True)
class TrainOptions:
    """Options of `tailwise train`; None leaves it to the recipe, to the run that is resumed, or to the default.

    Attributes:
        epochs: of the plan.
        samples_seen: in place of epochs.
        checkpoint_every: batches between checkpoints, at most.
        resume: go on with the run that is there.
        seed: of order and augmentations; the plan's.
        lanes: see `tailwise.loader.Loader`.
        block: likewise.
        compose: likewise.
        check: likewise.
        damaged: "error" or "replace".
        max_replaced: share of samples that may be replaced before training stops.
        cache: folder for what is fetched from remote stores.
        cache_bytes: its bound.
        record: folder for a record of what was seen.
    """

    epochs: int | None = None
    samples_seen: int | None = None
    checkpoint_every: int | None = None
    resume: bool = False
    seed: int | None = None
    lanes: int | None = None
    block: int | None = None
    compose: str | None = None
    check: str = "size"
    damaged: str = "error"
    max_replaced: float = 0.01
    cache: Path | None = None
    cache_bytes: int = DEFAULT_CACHE_BYTES
    record: Path | None = None

    def check_values(self) -> None:
        """Refuses what can't be, before a run's folder is made.

        Raises:
            UserError: an option is out of bounds.
        """
        for name, value, choices in (("check", self.check, CHECKS), ("damaged", self.damaged, ON_DAMAGED)):
            if value not in choices:
                raise UserError(f"`{name}` {value!r}: must be one of {', '.join(choices)}")
        if not 0 <= self.max_replaced <= 1:
            raise UserError(f"`max_replaced` {self.max_replaced}: must lie between 0 and 1")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"`seed` {self.seed}: must lie between 0 and {MAX_SEED:,}")
