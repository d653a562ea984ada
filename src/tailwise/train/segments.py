"""Segments of a training. A segment is an "epoch" of open_clip's trainer, not an epoch of the plan."""

from __future__ import annotations

from dataclasses import dataclass

CHECKPOINTS = 20  # by default
MOST_STEPS = 1000  # between checkpoints, by default


@dataclass(frozen=True)
class Segments:
    """A training, cut into segments."""

    count: int  # number of segments; a checkpoint follows each
    length: int  # batches of each segment but the last, a multiple of the accumulation
    last: int  # batches of the last segment, 1 … length, a multiple of the accumulation
    left_out: int  # batches at the end that fill no step, fewer than the accumulation

    @property
    def batches(self) -> int:
        """Batches that are trained on."""
        return (self.count - 1) * self.length + self.last

    def bounds(self, segment: int) -> tuple[int, int]:
        """Return the first batch of a segment, and the one after its last."""
        first = segment * self.length
        return first, first + (self.last if segment == self.count - 1 else self.length)

    def __str__(self) -> str:
        """Describe the segments: "3 segments of 10 batches, the last of 4"."""
        segments = "1 segment" if self.count == 1 else f"{self.count} segments"
        batches = "1 batch" if self.length == 1 else f"{self.length:,} batches"
        return f"{segments} of {batches}" + (f", the last of {self.last:,}" if self.last < self.length else "")


def cut(batches: int, accumulation: int = 1, checkpoint_every: int | None = None) -> Segments:
    """Cut a training of `batches` batches into segments that hold every whole optimizer step (`accumulation` batches).

    Segments are at most `checkpoint_every` batches long; None stands for a twentieth of the training, and at most 1,000 steps. They are
    equal if some number of segments divides the steps and makes at most a quarter more checkpoints than needed. Otherwise the last
    segment is shorter. Raise a ValueError if `batches` or `checkpoint_every` is less than one step.
    """
    steps = batches // accumulation
    if steps < 1:
        raise ValueError(f"{batches} batches are less than one step of {accumulation}")
    usual = min(-(-steps // CHECKPOINTS), MOST_STEPS)
    longest = usual if checkpoint_every is None else checkpoint_every // accumulation
    if longest < 1:
        raise ValueError(f"a segment of {checkpoint_every} batches is less than one step of {accumulation}")
    fewest = -(-steps // longest)
    most = min(steps, fewest + fewest // 4)
    even = next((count for count in range(fewest, most + 1) if steps % count == 0), fewest)
    length = -(-steps // even)
    count = -(-steps // length)
    last = steps - (count - 1) * length
    return Segments(count, length * accumulation, last * accumulation, batches - steps * accumulation)
