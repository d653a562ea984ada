import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.kernels.keyed import (
    MAX_PERMUTED,
    SMALL,
    hash_range,
    next_prime,
    permutation,
    permute,
    permute_range,
    stream_key,
)

FIXED = settings(derandomize=True, deadline=None, max_examples=60)
KEY = stream_key(0, "test of permute")
LARGE = sorted(
    {2**power + step for power in range(9, 18) for step in (-1, 0, 1)}
    | {509, 521, 1009, 4099, 7919, 65_537, 104_729, 131_071}
    | {720, 5040, 10_000, 30_030, 100_000}
)


def test_every_size_up_to_300_is_permuted():
    for size in range(1, 301):
        for key in hash_range(KEY, size, 5):
            np.testing.assert_array_equal(np.sort(permutation(key, size)), np.arange(size))


@pytest.mark.parametrize("size", LARGE)
def test_larger_sizes_are_permuted(size):
    for key in hash_range(KEY, size, 2):
        order = permutation(key, size)
        assert order.dtype == np.int64
        np.testing.assert_array_equal(np.sort(order), np.arange(size))


@FIXED
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1), st.data())
def test_single_points_are_those_of_the_whole(size, key, data):
    index = data.draw(st.integers(0, size - 1))
    prime = next_prime(size) if size > SMALL else 0  # callers pass no prime for small sizes
    assert permute(np.uint64(key), size, prime, index) == permutation(np.uint64(key), size)[index]


@pytest.mark.parametrize("size", [2**31 + 11, 2**32 - 5])
def test_huge_sizes_stay_in_range_and_apart(size):
    prime = next_prime(size)
    values = {permute(KEY, size, prime, index) for index in range(0, size, size // 1000)}
    assert len(values) == len(range(0, size, size // 1000))
    assert min(values) >= 0
    assert max(values) < size


WIDE = [2**32 - 4, 2**32, 2**32 + 1, 5 * 10**9, 2**33 - 1, 10**12, MAX_PERMUTED]
WORD = 2**64 - 1


def hash_of(key, counter):
    value = (key + (counter + 1) * 0x9E3779B97F4A7C15) & WORD
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & WORD
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & WORD
    return value ^ value >> 31


def wide_permute(key, n, prime, index):
    """The permutation of more than 2³² elements, in Python's whole numbers."""
    factor, bits = hash_of(key, 0), (n - 1).bit_length()
    half, mask = (bits + 1) // 2, (1 << bits) - 1
    multiplier, offset = 1 + hash_of(key, 1) % (prime - 1), hash_of(key, 2) % prime
    while True:
        index = (index * (factor | 1) + (factor >> 32)) & mask
        index ^= index >> half
        index = (index * (factor | 1)) & mask
        index ^= index >> half
        if index < n:
            break
    while True:
        index = (index * multiplier + offset) % prime
        if index < n:
            return index


def is_prime(n):
    return all(pow(base, n - 1, n) == 1 for base in (2, 3, 5, 7, 11, 13, 17))


@pytest.mark.parametrize("size", WIDE)
def test_sizes_above_32_bits_are_those_of_whole_numbers(size):
    prime = next_prime(size)
    assert prime == next(number for number in range(size, size + 1000) if is_prime(number))
    assert prime <= MAX_PERMUTED
    random = np.random.default_rng(size)
    for key in hash_range(KEY, size, 20).tolist():
        for index in [0, 1, size - 1, *random.integers(0, size, 20).tolist()]:
            assert permute(np.uint64(key), size, prime, index) == wide_permute(key, size, prime, index)


def test_five_billion_elements_are_apart_and_evenly_spread():
    size, count = 5 * 10**9, 1 << 20
    places = np.concatenate([permute_range(KEY, size, first, count) for first in (0, size // 3, size - count)])
    assert len(np.unique(places)) == 3 * count  # of a function that is no permutation, about 1,000 would meet
    counts = np.bincount(places * 1000 // size, minlength=1000)
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


def test_next_prime():
    sieve = np.ones(20_000, bool)
    sieve[:2] = False
    for factor in range(2, 142):
        sieve[factor * factor :: factor] &= not sieve[factor]
    primes = np.flatnonzero(sieve)
    for number in range(2, 19_000):
        assert next_prime(number) == primes[np.searchsorted(primes, number)]
    assert next_prime(4_294_967_280) == 4_294_967_291


def many_permutations(size, count):
    """Of `count` keys: int64 [count, size]."""
    return np.stack([permutation(key, size) for key in hash_range(KEY, 10**9 * size, count)])


SIZES = [2, 3, 5, 8, 16, 17, 18, 24, 31, 32, 33, 48, 64, 96, 100]


@pytest.mark.parametrize("size", SIZES)
def test_every_index_goes_everywhere_alike(size):
    count = 200 * size
    orders = many_permutations(size, count)
    seen = np.zeros((size, size), np.int64)
    for index in range(size):
        seen[index] = np.bincount(orders[:, index], minlength=size)
    expected = count / size
    assert np.abs(seen - expected).max() < 6 * np.sqrt(expected)
    # Rows and columns of counts have fixed sums: (size − 1)² degrees of freedom, as a permutation's variance is size/(size − 1).
    chi_square = ((seen - expected) ** 2 / expected).sum() * (size - 1) / size
    tail = scipy.stats.chi2.cdf(chi_square, (size - 1) ** 2)
    assert 1e-4 < tail < 1 - 1e-4


@pytest.mark.parametrize("size", [size for size in SIZES if size >= 8])
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_every_pair_meets_as_often_as_in_random_sets(size, share):
    """Epochs take slots [0, h): any two members must be taken together with probability h (h − 1) / (n (n − 1))."""
    count, head = 20_000, int(share * size)
    taken = (many_permutations(size, count) < head).astype(np.float32)
    together = (taken.T @ taken)[np.triu_indices(size, 1)]
    expected = head * (head - 1) / (size * (size - 1))
    score = (together / count - expected) / np.sqrt(expected * (1 - expected) / count)
    assert np.abs(score).max() < 5
    assert np.mean(score**2) == pytest.approx(1, abs=0.55)  # affine maps modulo n itself give 100 and more


def test_orders_of_four_are_all_alike():
    codes = many_permutations(4, 24_000) @ [64, 16, 4, 1]
    _, counts = np.unique(codes, return_counts=True)
    assert len(counts) == 24
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("size", [20, 64, 101])
def test_neighbours_do_not_stay_at_one_distance(size):
    """A bare affine map would keep π(k + 1) − π(k) nearly constant."""
    steps = np.diff(many_permutations(size, 300), axis=1) % size
    distinct = np.array([len(np.unique(row)) for row in steps])
    assert np.median(distinct) > 0.45 * size  # of a uniform permutation: about 0.63 · size


def test_golden_permutations():
    """Draws hang on these: they must not change from release to release."""
    key = np.uint64(0x0123456789ABCDEF)
    assert permutation(key, 10).tolist() == [2, 8, 4, 6, 0, 1, 7, 5, 9, 3]
    order = [8, 14, 17, 16, 4, 3, 10, 0, 18, 12, 15, 19, 7, 9, 13, 11, 2, 1, 6, 5]
    assert permutation(key, 20).tolist() == order
    million = [permute(key, 10**6, 1_000_003, index) for index in (0, 1, 2, 999_999)]
    assert million == [156_835, 230_462, 321_452, 650_972]
    billion = [permute(key, 10**9, 1_000_000_007, index) for index in (0, 1, 10**9 - 1)]
    assert billion == [484_409_532, 11_368_284, 963_212_676]


@pytest.mark.parametrize("size", [1, 2, 300, SMALL, SMALL + 1, 65_537, 2**32 - 5])
def test_an_index_out_of_bounds_gives_zero_and_ends(size):
    prime = next_prime(size) if size > SMALL else 0
    for index in (-1, -size, -(2**62), size, size + 1, 2 * size, 2**62):
        assert permute(KEY, size, prime, index) == 0
