"""What every store can do. A new store is one more line of STORES."""

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from tailwise.storage.store import LocalStore

STORES = {"local": LocalStore}
WRITERS = 8


@pytest.fixture(params=STORES.values(), ids=STORES)
def store(request, tmp_path):
    return request.param(tmp_path / "store")


def test_bytes_come_back_whole_and_by_ranges(store):
    store.put("a/b.bin", b"0123456789")
    assert store.get("a/b.bin") == b"0123456789"
    assert store.get_ranges("a/b.bin", [(2, 5), (0, 1), (8, 20), (4, 4)]) == [b"234", b"0", b"89", b""]
    assert store.local_path("a/b.bin").read_bytes() == b"0123456789"
    store.put("a/b.bin", b"other")
    assert store.get("a/b.bin") == b"other"


def test_what_is_not_there(store):
    assert store.head("a/b") is None
    assert not store.replace_if("a/b", "some etag", b"x")
    store.delete("a/b")
    assert list(store.keys("")) == list(store.keys("a/")) == []
    for read in (store.get, lambda key: store.get_ranges(key, [(0, 1)])):
        with pytest.raises(FileNotFoundError):
            read("a/b")


def test_keys_are_listed_in_order_and_by_folder(store):
    for key in ("b/2", "a/10", "b/1", "a/c/d", "ab/x"):
        store.put(key, b"x")
    assert list(store.keys("")) == sorted(("b/2", "a/10", "b/1", "a/c/d", "ab/x"))
    assert list(store.keys("a/")) == ["a/10", "a/c/d"]
    store.delete("a/10")
    assert list(store.keys("a/")) == ["a/c/d"]


def test_an_etag_changes_with_the_content(store):
    assert store.put_if_absent("a", b"1")
    first = store.head("a")
    assert first.size == 1
    assert store.head("a") == first
    assert store.replace_if("a", first.etag, b"2")
    second = store.head("a")
    assert second.etag != first.etag
    assert not store.replace_if("a", first.etag, b"3")
    store.put("a", b"2")  # the same bytes, written again
    assert store.head("a").etag != second.etag
    assert store.get("a") == b"2"


@pytest.mark.parametrize("key", ["../a", "a/../../b", "/etc/passwd", ""])
def test_keys_do_not_lead_out(store, key):
    with pytest.raises(ValueError, match="is no key"):
        store.put(key, b"x")


def create(store, start, number, told):
    start.wait()
    told.put((number, store.put_if_absent("race", b"%d" % number)))


def count(store, start, number, told):
    start.wait()
    lost = 0
    for _ in range(10):
        while True:
            head = store.head("count")
            if store.replace_if("count", head.etag, b"%d" % (int(store.get("count")) + 1)):
                break
            lost += 1
    told.put((number, lost))


def at_once(work, store):
    context = multiprocessing.get_context("fork")
    start, told = context.Barrier(WRITERS), context.Queue()
    processes = [context.Process(target=work, args=(store, start, number, told)) for number in range(WRITERS)]
    for process in processes:
        process.start()
    answers = dict(told.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    return answers


@pytest.mark.slow
def test_one_of_several_writers_wins(store):
    store.put("other", b"x")
    for _ in range(5):
        won = [number for number, first in at_once(create, store).items() if first]
        assert len(won) == 1
        assert store.get("race") == b"%d" % won[0]
        assert list(store.keys("")) == ["other", "race"]
        store.delete("race")


def test_one_wins_on_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refused)
    store = LocalStore(tmp_path)
    won = [number for number, first in at_once(create, store).items() if first]
    assert len(won) == 1
    assert store.get("race") == b"%d" % won[0]
    assert list(store.keys("")) == ["race"]


def test_no_change_is_lost(store):
    store.put("count", b"0")
    at_once(count, store)
    assert store.get("count") == b"%d" % (10 * WRITERS)


def write(store):
    while True:
        store.put("big", os.urandom(4) * (1 << 20))


def test_a_killed_writer_leaves_the_old_or_the_new(store):
    store.put("big", bytes(4 << 20))
    context = multiprocessing.get_context("fork")
    for pause in (0.01, 0.03, 0.05, 0.08):
        process = context.Process(target=write, args=(store,))
        process.start()
        time.sleep(pause)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        content = store.get("big")
        assert content == content[:4] * (1 << 20)
        assert list(store.keys("")) == ["big"]
