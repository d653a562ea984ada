"""Stores give exactly the bytes of the files, in the order asked, and an error in the place of what can't be read."""

import itertools
import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.shards.locations import LOCATION
from tailwise.shards.ranges import LocalShards, MixedShards, open_store, read_samples, sample_ranges
from tailwise.storage.spans import Spans, coalesce

SIZE = 40_000


@pytest.fixture
def files(tmp_path):
    generator = np.random.default_rng(1)
    contents = [generator.bytes(SIZE) for _ in range(4)]
    paths = [tmp_path / f"{number}.tar" for number in range(4)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return [str(path) for path in paths], contents


def test_reads(files):
    paths, contents = files
    store = LocalShards(paths)
    assert store.read(2, 100, 3000) == contents[2][100:3000]
    assert store.read(0, SIZE, SIZE) == b""
    ranges = np.array([[3, 0, 5], [0, 7, 9], [3, 39_999, SIZE]])
    assert list(store.read_many(ranges)) == [contents[3][:5], contents[0][7:9], contents[3][-1:]]


def test_errors_name_the_bound(files, tmp_path):
    paths, contents = files
    store = LocalShards([*paths, str(tmp_path / "absent.tar")])
    with pytest.raises(OSError, match=r"0\.tar ends at byte 40,000; bytes 39,990 … 40,010"):
        store.read(0, 39_990, 40_010)
    with pytest.raises(FileNotFoundError):
        store.read(4, 0, 1)
    short, good, absent = store.read_many(np.array([[0, 39_990, 40_010], [0, 0, 3], [4, 0, 1]]))
    assert isinstance(short, OSError)
    assert good == contents[0][:3]
    assert isinstance(absent, FileNotFoundError)


def open_descriptors():
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None  # noqa: PTH112, PTH208


@pytest.mark.skipif(open_descriptors() is None, reason="counts descriptors in /proc")
def test_open_files_are_bounded_and_closed(files):
    paths, contents = files
    before = open_descriptors()
    store = LocalShards(paths)
    store._files.most = 2
    for number in (0, 1, 2, 3, 0, 1, 2, 3):
        assert store.read(number, 5, 10) == contents[number][5:10]
        assert open_descriptors() <= before + 2
    store.close()
    assert open_descriptors() == before
    assert store.read(1, 0, 4) == contents[1][:4]


def test_threads_never_get_another_files_bytes(files):
    paths, contents = files
    store = LocalShards(paths)
    store._files.most = 1
    wrong = []

    def work(seed):
        numbers = np.random.default_rng(seed).integers(0, 4, 3000).tolist()
        wrong.extend(number for number in numbers if store.read(number, 10, 60) != contents[number][10:60])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))  # raises what they raise
    assert wrong == []
    assert len(store._files.values()) == 1


def test_pickled_and_forked(files):
    paths, contents = files
    store = LocalShards(paths)
    store.read(0, 0, 1)
    assert pickle.loads(pickle.dumps(store)).read(0, 5, 9) == contents[0][5:9]
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(store.read(0, 5, 9) + store.read(1, 0, 2)))
    process.start()
    assert receiver.recv() == contents[0][5:9] + contents[1][:2]
    process.join()
    assert store.read(0, 5, 9) == contents[0][5:9]


@st.composite
def places(draw):
    """Locations of up to 12 samples anywhere in a file: image first or caption first, close or far, empty, overlapping."""
    count = draw(st.integers(0, 12))
    found = np.zeros(count, LOCATION)
    for at in range(count):
        sizes = [draw(st.integers(0, 3000)) for _ in range(2)]
        found[at] = tuple(draw(st.integers(0, SIZE - size)) for size in sizes) + tuple(sizes)
    return np.array([draw(st.integers(0, 3)) for _ in range(count)], np.int32), found


@settings(max_examples=100, deadline=None)
@given(places())
def test_samples_are_sliced_from_the_right_places(_contents, samples):
    shards, locations = samples
    contents, store = _contents
    expected = [
        (
            contents[shard][place["image_offset"] :][: place["image_bytes"]],
            contents[shard][place["caption_offset"] :][: place["caption_bytes"]],
        )
        for shard, place in zip(shards.tolist(), locations, strict=True)
    ]
    assert read_samples(store, shards, locations) == expected


@pytest.fixture(scope="module")
def _contents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contents")
    contents = [np.random.default_rng(number).bytes(SIZE) for number in range(4)]
    for number, content in enumerate(contents):
        (folder / f"{number}.tar").write_bytes(content)
    return contents, LocalShards([str(folder / f"{number}.tar") for number in range(4)])


def locations_of(*places):
    return np.array(list(places), LOCATION)


def test_near_members_come_in_one_read():
    near, far = (1000, 512, 200, 50), (1000, 30_000, 200, 50)
    ranges, apart = sample_ranges(np.array([1, 2], np.int32), locations_of(near, far))
    assert ranges.tolist() == [[1, 512, 1200], [2, 1000, 1200], [2, 30_000, 30_050]]
    assert apart.tolist() == [False, True]


@pytest.mark.parametrize("advised", [False, True])
def test_a_sample_that_cannot_be_read_spoils_no_other(files, tmp_path, monkeypatch, advised):
    paths, contents = files
    store = LocalShards([*paths, str(tmp_path / "absent.tar")])
    if advised:  # as if nothing ever were in memory
        monkeypatch.setattr("tailwise.shards.ranges._CACHED_SECONDS", -1.0)
        assert read_samples(store, np.array([0], np.int32), locations_of((0, 600, 100, 20)))
        assert store._waits
    good = (0, 600, 100, 20)
    caption_lost, image_lost = (0, SIZE - 10, 100, 20), (SIZE - 10, 0, 100, 20)
    found = read_samples(
        store, np.array([0, 4, 1, 2, 3], np.int32), locations_of(good, good, caption_lost, image_lost, good)
    )
    assert found[0] == (contents[0][:100], contents[0][600:620])
    assert found[4] == (contents[3][:100], contents[3][600:620])
    assert [type(item) for item in found[1:4]] == [FileNotFoundError, OSError, OSError]


def test_the_store_that_fits(files, tmp_path):
    paths, contents = files
    local = open_store([f"file://{paths[0]}", paths[1]], tmp_path / "cache", 10**6)
    assert type(local) is LocalShards
    assert not local.remote
    assert local.read(0, 1, 5) == contents[0][1:5]
    assert not (tmp_path / "cache").exists()
    fsspec.filesystem("memory").pipe("/stores/1.tar", contents[1])
    mixed = open_store([paths[0], "memory://stores/1.tar", paths[2]], tmp_path / "cache", 10**6)
    assert type(mixed) is MixedShards
    assert mixed.remote
    assert mixed.read(1, 3, 9) == contents[1][3:9]
    ranges = np.array([[1, 10, 20], [0, 0, 5], [1, SIZE - 3, SIZE + 1], [2, 7, 8]])
    mixed.want(ranges)
    found = list(mixed.read_many(ranges))
    assert found[:2] + found[3:] == [contents[1][10:20], contents[0][:5], contents[2][7:8]]
    assert "ends at byte 40,000" in str(found[2])
    mixed.close()
    assert open_store(["memory://stores/1.tar"], tmp_path / "cache", 10**6).read(0, 0, 4) == contents[1][:4]


spans = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)).map(lambda pair: (pair[0], sum(pair))), max_size=12)


@given(spans, spans, st.integers(0, 60), st.integers(1, 120))
def test_pieces_hold_all_that_is_wanted_and_bridge_nothing_held(held, wanted, gap_bytes, piece_bytes):
    there = Spans(held)
    missing = [span for span in wanted if there.find(*span) is None]
    pieces = coalesce(missing, gap_bytes, piece_bytes, there)
    assert pieces == sorted(pieces)
    assert all(any(first <= start and stop <= last for first, last in pieces) for start, stop in missing)
    asked = {byte for start, stop in missing for byte in range(start, stop)}
    has = {byte for start, stop in held for byte in range(start, stop)}
    longest = max((stop - start for start, stop in missing), default=0)
    for first, last in pieces:
        assert {first, last - 1} <= asked
        assert last - first <= max(piece_bytes, longest)
        assert not (set(range(first, last)) - asked) & has
    for (first, last), (start, stop) in itertools.pairwise(pieces):
        assert start - last > gap_bytes or stop - first > piece_bytes or set(range(last, start)) & has


@given(spans, spans)
def test_spans_against_a_plain_search(spans, asked):
    found = Spans(spans)
    for start, stop in asked:
        holding = [span for span in spans if span[0] <= start and stop <= span[1]]
        assert (found.find(start, stop) in holding) if holding else found.find(start, stop) is None
        assert found.meets(start, stop) == any(first < stop and start < last for first, last in spans)
