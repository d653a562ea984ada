"""How long a training is: batches, cut into segments of equal length. open_clip's "epoch" is a segment; a plan's epoch is not."""

from __future__ import annotations

from dataclasses import dataclass

MOST_LANES = 64
CHECKPOINTS = 20  # by default
MOST_STEPS = 1000  # between checkpoints, by default


@dataclass(frozen=True)
class Segments:
    """A training, cut.

    Attributes:
        count: segments; a checkpoint follows each.
        length: batches of each, a multiple of the accumulation.
        left_out: batches at the end that fill no segment.
    """

    count: int
    length: int
    left_out: int


def cut(batches: int, accumulation: int = 1, checkpoint_every: int | None = None) -> Segments:
    """Cuts a training into segments of equal length, leaving out as few batches as it can.

    There are as many segments as keep each within `checkpoint_every`, or up to a quarter more if that leaves out fewer batches.

    Args:
        batches: of the whole training.
        accumulation: batches per optimizer step, at least 1.
        checkpoint_every: longest segment, in batches; None for a twentieth of the training, and at most 1,000 steps.

    Returns:
        Segments with count · length + left_out == batches.

    Raises:
        ValueError: there are fewer batches than one step takes, or `checkpoint_every` is shorter than a step.
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
    count = min(range(fewest, most + 1), key=lambda segments: (steps % segments, segments))
    length = steps // count * accumulation
    return Segments(count, length, batches - count * length)


def choose_lanes(global_batch: int, ranks: int) -> int:
    """The number of lanes when none is given: divides the global batch, is a multiple of the ranks, at most 64 unless ranks are more.

    Of those it is the one that shares the largest power of two with 64, so that other numbers of ranks fit as well.
    """
    share = global_batch // ranks
    fitting = [ranks * part for part in range(1, share + 1) if share % part == 0 and ranks * part <= MOST_LANES]
    return max(fitting, key=lambda lanes: (lanes & -lanes, lanes), default=ranks)
