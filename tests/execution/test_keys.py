"""The index from keys to rows, against a dictionary."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.execution import keys as keys_module
from tailwise.execution.keys import ABSENT, AMBIGUOUS, KeyIndex, hash_keys

KEYS = st.one_of(st.text("ab", max_size=4), st.text(max_size=20), st.just("bytes \udcff"))


def expected(keys, asked):
    counts = Counter(keys)
    rows = {key: row for row, key in enumerate(keys)}
    return [ABSENT if key not in rows else AMBIGUOUS if counts[key] > 1 else rows[key] for key in asked]


def build(folder, keys, chunk=None, **options):
    index = KeyIndex(folder, len(keys), **options)
    for start in range(0, len(keys), chunk or max(len(keys), 1)):
        mine = keys[start : start + (chunk or len(keys))]
        index.add(mine, np.arange(start, start + len(mine)))
    return index, index.seal()


@pytest.fixture
def equal_leading_bits(monkeypatch):
    """All hashes agree in their leading 64 bits, or in all but one of these."""

    def colliding(keys):
        hashes = hash_keys(keys).copy()
        hashes["high"] = hashes["low"] & np.uint64(1)
        return hashes

    monkeypatch.setattr(keys_module, "hash_keys", colliding)


def check(keys, asked, chunk, **options):
    with tempfile.TemporaryDirectory() as folder:
        index, clashing = build(Path(folder) / "index", keys, chunk, **options)
        found = index.find(asked)
    assert found.dtype == np.int64
    assert found.tolist() == expected(keys, asked)
    assert clashing == sum(count for count in Counter(keys).values() if count > 1)


@given(keys=st.lists(KEYS, max_size=40), others=st.lists(KEYS, max_size=10), chunk=st.integers(1, 50))
@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("bucket_rows", [1, 3, 4_000_000])
def test_rows_of_keys(bucket_rows, keys, others, chunk):
    check(keys, [*keys, *others, *keys[:3]], chunk, bucket_rows=bucket_rows)


@given(keys=st.lists(KEYS, max_size=40), others=st.lists(KEYS, max_size=10))
@settings(deadline=None, max_examples=60)
@pytest.mark.usefixtures("equal_leading_bits")
def test_rows_of_keys_whose_leading_bits_agree(keys, others):
    check(keys, [*keys, *others], None)


def test_many_buckets(tmp_path):
    keys = [f"{number:09d}" for number in range(3000)]
    index, clashing = build(tmp_path / "index", keys, 700, bucket_rows=100)
    assert clashing == 0
    assert len(list((tmp_path / "index").glob("*.high.npy"))) == 32  # the next power of two over 3000 / 100
    order = np.random.default_rng(0).permutation(3000)
    assert index.find([keys[row] for row in order]).tolist() == order.tolist()
    assert index.find(["absent", "0"]).tolist() == [ABSENT, ABSENT]


def test_empty_index(tmp_path):
    index, clashing = build(tmp_path / "index", [])
    assert clashing == 0
    assert index.find(["a"]).tolist() == [ABSENT]
    assert index.find([]).tolist() == []


def test_hashes_are_pinned():
    hashes = hash_keys(["000000123", "grün"])
    assert [f"{int(high):016x}{int(low):016x}" for high, low in hashes] == [
        "fffd83d4acabfb9928f49b6d59418221",
        "e45314d5388aa7ac86fb69fe315a7197",
    ]
