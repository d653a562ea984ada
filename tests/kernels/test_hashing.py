import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.kernels.keyed import GOLDEN, hash_at, hash_range, mix, random_below, stream_key

FIXED = settings(derandomize=True, deadline=None, max_examples=100)
MASK = 2**64 - 1

SPLITMIX64_OF_1234567 = [  # the published first outputs
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]


def splitmix64_finaliser(value):
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


def test_a_stream_is_splitmix64():
    np.testing.assert_array_equal(hash_range(np.uint64(1234567), 0, 5), np.array(SPLITMIX64_OF_1234567, np.uint64))


@FIXED
@given(st.integers(0, MASK), st.integers(0, MASK))
def test_mix_and_hash_at_equal_plain_integers(key, counter):
    assert int(mix(np.uint64(key))) == splitmix64_finaliser(key)
    expected = splitmix64_finaliser((key + (counter + 1) * int(GOLDEN)) & MASK)
    assert int(hash_at(np.uint64(key), np.uint64(counter))) == expected


@FIXED
@given(st.integers(0, MASK), st.integers(0, 2**40), st.integers(0, 20))
def test_a_range_is_its_single_numbers(key, first, count):
    numbers = hash_range(np.uint64(key), first, count)
    assert numbers.dtype == np.uint64
    assert numbers.tolist() == [int(hash_at(np.uint64(key), np.uint64(first + at))) for at in range(count)]


def test_golden_keys():
    """Every draw hangs on these: they must not change from release to release."""
    keys = [stream_key(0, "stream"), stream_key(2026, "bernoulli", 7), stream_key(-1, "x", 1, 2)]
    assert [int(key) for key in keys] == [13504107466921775187, 3948275957478125024, 4114299213713363261]
    assert hash_range(keys[0], 10**12, 2).tolist() == [1403553331199746629, 711517334766767196]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((0, "stream"), (1, "stream")),
        ((0, "stream"), (0, "bernoulli")),
        ((0, "stream", 1), (0, "stream", 2)),
        ((0, "stream"), (0, "stream", 0)),
        ((0, "stream", 1, 12), (0, "stream", 11, 2)),
        ((1, "1"), (11, "")),
        ((0, "stream", 1, 2), (0, "stream", 2, 1)),
        ((0, "stream"), (2**64, "stream")),
        ((1, "stream"), (-1, "stream")),
    ],
)
def test_keys_of_different_streams_differ(one, other):
    assert stream_key(*one) != stream_key(*other)
    assert stream_key(*one) == stream_key(*one)


def test_bits_are_fair_and_independent():
    numbers = hash_range(stream_key(0, "test"), 0, 100_000)
    bits = (numbers[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    signs = 2.0 * bits - 1
    sums = signs.T @ signs / np.sqrt(len(numbers))  # of each pair of bits: about standard normal
    assert np.abs(sums[~np.eye(64, dtype=bool)]).max() < 5
    assert np.abs(signs.sum(axis=0)).max() / np.sqrt(len(numbers)) < 4.5
    assert np.abs((signs[1:] * signs[:-1]).sum(axis=0)).max() / np.sqrt(len(numbers)) < 4.5


@FIXED
@given(st.lists(st.integers(1, 2**62), min_size=1, max_size=20), st.integers(0, 1000))
def test_random_below_is_below_each_bound(bounds, first):
    key = stream_key(3, "test")
    drawn = random_below(key, first, np.array(bounds))
    assert drawn.dtype == np.int64
    expected = [int(number) % bound for number, bound in zip(hash_range(key, first, len(bounds)), bounds, strict=True)]
    assert drawn.tolist() == expected


def test_random_below_is_uniform():
    counts = np.bincount(random_below(stream_key(0, "test"), 0, np.full(70_000, 7)), minlength=7)
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 22  # χ² of 6 degrees of freedom: 1 in 1000
