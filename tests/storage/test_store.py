"""What every store can do. A new store is one more line of STORES."""

import errno
import inspect
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from tailwise.storage.local_store import LocalStore

STORES = {"local": lambda folder, _: LocalStore(folder), "s3": lambda _, bucket: bucket()}
WRITERS = 16


@pytest.fixture(params=STORES.values(), ids=STORES)
def store(request, tmp_path):
    return request.param(tmp_path / "store", lambda: request.getfixturevalue("object_store"))


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
    assert store.get("a") == b"2"
    store.put("a", b"3")
    assert store.head("a").etag not in (first.etag, second.etag)


def test_a_local_etag_changes_with_the_same_bytes(tmp_path):
    store = LocalStore(tmp_path)
    store.put("a", b"2")
    first = store.head("a")
    store.put("a", b"2")
    assert store.head("a").etag != first.etag


@pytest.mark.parametrize("key", ["../a", "a/../../b", "/etc/passwd", ""])
def test_keys_do_not_lead_out(store, key):
    with pytest.raises(ValueError, match="is no key"):
        store.put(key, b"x")


ROUNDS = 5


def create(store, start, number, told):
    """Write the same keys as the other processes, one after the other; tell which were written."""
    won = []
    for turn in range(5):  # ROUNDS
        start.wait(60)
        if store.put_if_absent(f"race/{turn}", b"%d" % number):
            won.append(turn)
    told.put((number, won))


def count(store, start, number, told):
    """Add one ten times; tell how often another process was first."""
    start.wait(60)
    lost = 0
    for _ in range(10):
        while True:
            head = store.head("count")
            if store.replace_if("count", head.etag, b"%d" % (int(store.get("count")) + 1)):
                break
            lost += 1
    told.put((number, lost))


def write(store, start, number, told):
    """Write for ever."""
    import os

    while True:
        store.put("big", os.urandom(4) * (1 << 20))
        told.put(number)


def begun(work, store, writers):
    """Begin `work` in processes of their own; return them, their barrier, and the queue of what they tell."""
    # Only the source travels: a process that is not forked can't import this module.
    context = multiprocessing.get_context("fork" if isinstance(store, LocalStore) else "spawn")
    start, told = context.Barrier(writers), context.Queue()
    code = f"{inspect.getsource(work)}\n{work.__name__}(store, start, number, told)"
    processes = [
        context.Process(target=exec, args=(code, {"store": store, "start": start, "number": number, "told": told}))
        for number in range(writers)
    ]
    for process in processes:
        process.start()
    return processes, start, told


def at_once(work, store, writers=WRITERS):
    processes, _start, told = begun(work, store, writers)
    answers = dict(told.get(timeout=100) for _ in processes)
    for process in processes:
        process.join()
    return answers


@pytest.mark.slow
def test_one_of_several_writers_wins(store):
    store.put("other", b"x")
    answers = at_once(create, store)
    winners = {turn: [number for number, won in answers.items() if turn in won] for turn in range(ROUNDS)}
    assert [len(numbers) for numbers in winners.values()] == [1] * ROUNDS
    assert {turn: store.get(f"race/{turn}") for turn in range(ROUNDS)} == {
        turn: b"%d" % numbers[0] for turn, numbers in winners.items()
    }
    assert list(store.keys("")) == ["other", *(f"race/{turn}" for turn in range(ROUNDS))]


def test_one_wins_on_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refused)
    store = LocalStore(tmp_path)
    answers = at_once(create, store)
    assert sorted(turn for won in answers.values() for turn in won) == list(range(ROUNDS))
    assert all(store.get(f"race/{turn}") == b"%d" % number for number, won in answers.items() for turn in won)
    assert len(list(store.keys(""))) == ROUNDS


def test_no_change_is_lost(store):
    for _ in range(20):  # until writers met
        store.put("count", b"0")
        lost = at_once(count, store, 4)
        assert store.get("count") == b"40"
        if any(lost.values()):
            return
    pytest.fail("no writer has met another one")


def test_a_killed_writer_leaves_the_old_or_the_new(store):
    store.put("big", bytes(4 << 20))
    for pause in (0.01, 0.03, 0.05, 0.08):
        (process,), _start, told = begun(write, store, 1)
        told.get(timeout=60)
        time.sleep(pause)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        content = store.get("big")
        assert content == content[:4] * (1 << 20)
        assert list(store.keys("")) == ["big"]
