import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tailwise.train.segments import MOST_LANES, MOST_STEPS, choose_lanes, cut


@given(batches=st.integers(1, 200_000), accumulation=st.integers(1, 9), every=st.none() | st.integers(1, 5000))
@example(batches=19, accumulation=1, every=None)
def test_segments_are_equal_whole_steps_and_leave_out_little(batches, accumulation, every):
    if batches < accumulation or (every is not None and every < accumulation):
        with pytest.raises(ValueError, match="less than one step"):
            cut(batches, accumulation, every)
        return
    segments = cut(batches, accumulation, every)
    steps = batches // accumulation
    longest = every // accumulation if every is not None else min(-(-steps // 20), MOST_STEPS)
    assert segments.count * segments.length + segments.left_out == batches
    assert segments.length % accumulation == 0
    assert 1 <= segments.length // accumulation <= longest
    assert segments.left_out < (segments.count + 1) * accumulation
    fewest = -(-steps // longest)
    assert fewest <= segments.count <= fewest + fewest // 4
    for other in range(fewest, min(steps, fewest + fewest // 4) + 1):  # no other allowed number leaves out less
        assert segments.left_out <= batches - other * (steps // other) * accumulation


def test_nothing_is_left_out_where_a_divisor_is_near():
    assert cut(1000) == cut(1000, 1, 50)
    assert (cut(1000).count, cut(1000).length, cut(1000).left_out) == (20, 50, 0)
    assert (cut(1050, 1, 49).count, cut(1050, 1, 49).left_out) == (
        25,
        0,
    )  # 22 segments would do, and leave out 16 batches


@given(share=st.integers(1, 4000), ranks=st.integers(1, 128))
def test_lanes_fit_batch_and_ranks(share, ranks):
    lanes = choose_lanes(share * ranks, ranks)
    assert share * ranks % lanes == 0
    assert lanes % ranks == 0
    assert lanes <= max(MOST_LANES, ranks)


@pytest.mark.parametrize(
    ("batch", "ranks", "lanes"), [(4096, 8, 64), (28000, 8, 32), (28000, 1, 32), (96, 3, 48), (32, 1, 32)]
)
def test_lanes_are_powers_of_two_where_they_can_be(batch, ranks, lanes):
    assert choose_lanes(batch, ranks) == lanes
