"""Fingerprints: which bytes they cover, and when a shard passes."""

import numpy as np
import pytest

from tailwise.shards.fingerprint import (
    BLOCK_BYTES,
    BLOCKS,
    EVERY,
    FIRST,
    SOME,
    ChangedShardError,
    _without,
    block_ranges,
    check_fingerprint,
    read_fingerprint,
    shard_blocks,
)

SIZES = [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, BLOCKS * BLOCK_BYTES, BLOCKS * BLOCK_BYTES + 1, 10**9]


def reader(content):
    return lambda ranges: [content[start:stop] for start, stop in ranges]


@pytest.mark.parametrize("size", SIZES)
def test_blocks_lie_in_the_shard_and_cover_a_small_one(size):
    ranges = block_ranges(size)
    assert len(ranges) <= BLOCKS
    assert all(0 <= start < stop <= size and stop - start <= BLOCK_BYTES for start, stop in ranges)
    assert ranges == sorted(ranges)
    covered = sum(stop - start for start, stop in ranges)
    assert covered == min(size, BLOCKS * BLOCK_BYTES)
    if size:
        assert (ranges[0][0], ranges[-1][1]) == (0, size)


@pytest.mark.parametrize("size", [1, 1000, BLOCK_BYTES + 1, 3 * BLOCKS * BLOCK_BYTES])
def test_a_changed_byte_of_a_block_is_seen(size):
    content = np.random.default_rng(0).bytes(size)
    noted = read_fingerprint("x", size, reader(content))
    check_fingerprint("x", size, reader(content), noted)
    for at, (start, stop) in enumerate(block_ranges(size)):
        for place in (start, stop - 1):
            changed = bytearray(content)
            changed[place] ^= 1
            with pytest.raises(ChangedShardError, match="other content"):
                check_fingerprint("x", size, reader(bytes(changed)), noted, EVERY)
            if at == 0:
                with pytest.raises(ChangedShardError):
                    check_fingerprint("x", size, reader(bytes(changed)), noted, FIRST)


def test_skipped_blocks_are_not_compared():
    size = 20 * BLOCK_BYTES
    content = np.random.default_rng(0).bytes(size)
    ranges = block_ranges(size)
    whole = read_fingerprint("x", size, reader(content))
    at, other = ranges[3][0], ranges[7]
    noted = _without(whole, size, np.array([0, at, other[0], ranges[9][1]]), np.array([1, 5, BLOCK_BYTES, 0]))
    wiped = bytearray(content)
    for start, stop in (ranges[0], ranges[3], other):
        wiped[start:stop] = bytes(stop - start)
    for step in (EVERY, SOME, FIRST):
        check_fingerprint("x", size, reader(bytes(wiped)), noted, step)
        with pytest.raises(ChangedShardError):
            check_fingerprint("x", size, reader(bytes(size)), noted, step)
    for number, (start, _) in enumerate(ranges):
        changed = bytearray(content)
        changed[start] ^= 1
        if number in {0, 3, 7}:
            check_fingerprint("x", size, reader(bytes(changed)), noted)
        else:
            with pytest.raises(ChangedShardError):
                check_fingerprint("x", size, reader(bytes(changed)), noted)
    check_fingerprint("x", size, reader(bytes(size)), _without(whole, size, np.array([0]), np.array([size])))


def test_steps_choose_blocks():
    ranges = block_ranges(10**9)
    assert len(ranges[::FIRST]) == 1
    assert ranges[::SOME] == [ranges[0], ranges[5], ranges[10], ranges[15]]


def test_another_number_of_blocks_is_another_shard():
    noted = read_fingerprint("x", 10, reader(bytes(10)))
    with pytest.raises(ChangedShardError):
        check_fingerprint("x", BLOCK_BYTES + 1, reader(bytes(BLOCK_BYTES + 1)), noted)


def test_a_shard_without_a_noted_fingerprint_passes():
    for noted in (None, ""):
        check_fingerprint("x", 10, reader(bytes(10)), noted)


def test_a_shard_that_is_shorter_than_it_was_is_told(tmp_path):
    (tmp_path / "x").write_bytes(bytes(100))
    with shard_blocks(str(tmp_path / "x")) as (size, read):
        assert size == 100
        with pytest.raises(OSError, match="ended while it was read"):
            read_fingerprint("x", 200, read)
