"""What a user can choose about a training, apart from open_clip's own arguments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tailwise.loader.loader import DEFAULT_CACHE_BYTES


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
