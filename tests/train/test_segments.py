from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tailwise.train.segments import MOST_STEPS, cut


@settings(deadline=None)
@given(batches=st.integers(1, 200_000), accumulation=st.integers(1, 9), every=st.none() | st.integers(1, 5000))
@example(batches=21, accumulation=1, every=None)  # 13 of 21 were trained once
@example(batches=19, accumulation=1, every=None)
def test_every_whole_step_is_trained(batches, accumulation, every):
    if batches < accumulation or (every is not None and every < accumulation):
        with pytest.raises(ValueError, match="less than one step"):
            cut(batches, accumulation, every)
        return
    segments = cut(batches, accumulation, every)
    steps = batches // accumulation
    assert segments.batches == steps * accumulation == batches - segments.left_out
    assert segments.length % accumulation == segments.last % accumulation == 0
    assert 1 <= segments.last <= segments.length
    longest = every // accumulation if every is not None else min(-(-steps // 20), MOST_STEPS)
    assert segments.length // accumulation <= longest
    fewest = -(-steps // longest)
    assert segments.count <= fewest + fewest // 4  # not many more checkpoints than asked for
    if every is None and steps <= 20 * MOST_STEPS:
        assert segments.count <= 25
    bounds = [segments.bounds(number) for number in range(segments.count)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == segments.batches
    assert all(before[1] == after[0] for before, after in pairwise(bounds))


def test_every_short_training_is_trained_to_its_end():
    for batches in range(1, 500):
        for accumulation in range(1, min(batches, 5) + 1):
            for every in (None, *range(accumulation, 30)):
                segments = cut(batches, accumulation, every)
                assert batches - segments.batches == batches % accumulation
                assert segments.count <= 25 or every is not None


def test_segments_are_equal_where_a_divisor_is_near():
    assert cut(1000) == cut(1000, 1, 50)
    assert (cut(1000).count, cut(1000).length, cut(1000).last) == (20, 50, 50)
    segments = cut(1050, 1, 49)
    assert (segments.count, segments.length, segments.last) == (25, 42, 42)  # 22 would do, with a shorter last one


@pytest.mark.parametrize(
    ("batches", "accumulation", "every", "said"),
    [
        (37, 1, None, "19 segments of 2 batches, the last of 1"),
        (40, 1, None, "20 segments of 2 batches"),
        (33, 2, 12, "3 segments of 12 batches, the last of 8"),
        (1, 1, None, "1 segment of 1 batch"),
    ],
)
def test_segments_are_described(batches, accumulation, every, said):
    assert str(cut(batches, accumulation, every)) == said
