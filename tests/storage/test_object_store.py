"""An object store beyond the contract of all stores: lost responses, the cache, forks, and what errors show."""

import multiprocessing
import os

import pytest

from tailwise.errors import UnsupportedError
from tailwise.storage.http import Patience


@pytest.fixture
def behind(faults, object_store):
    """A store whose puts meet faults."""
    return object_store


@pytest.mark.parametrize("met", [["lose"], ["refuse"], ["refuse", "lose"], ["lose", "lose"]])
def test_a_write_whose_response_was_lost_has_won_once(behind, faults, met):
    faults[:] = met
    assert behind.put_if_absent("a", b"1")
    assert behind.get("a") == b"1"
    assert not behind.put_if_absent("a", b"1")  # another request with the same bytes
    faults[:] = met
    assert behind.replace_if("a", (etag := behind.head("a").etag), b"2")
    assert behind.get("a") == b"2"
    assert not behind.replace_if("a", etag, b"2")
    assert not faults


def test_another_writer_wins_while_responses_are_lost(behind, faults):
    behind.put("a", b"theirs")
    faults[:] = ["refuse", "lose"]
    assert not behind.put_if_absent("a", b"mine")
    faults[:] = ["refuse", "lose"]
    assert not behind.replace_if("a", '"other"', b"mine")
    assert behind.get("a") == b"theirs"


def test_a_server_that_does_not_answer_is_one_line_without_secrets(behind, faults, monkeypatch):
    from tailwise.storage import object_store

    monkeypatch.setattr(object_store, "PATIENCE", Patience(seconds=1.0, attempts=2))
    faults[:] = ["refuse"] * 1000
    for write in (behind.put, behind.put_if_absent):
        with pytest.raises(OSError, match=r"^s3://pool/catalog/a: ") as caught:
            write("a", b"1")
        assert "\n" not in str(caught.value)
        assert "secret" not in str(caught.value)


def test_a_large_object_comes_back(object_store):
    content = bytes(range(256)) * 50_000  # several parts
    object_store.put("a", content)
    assert object_store.get("a") == content
    assert object_store.get_ranges("a", [(12_799_990, 12_800_010), (5, 6), (6_000_000, 6_000_004)]) == [
        content[12_799_990:],
        content[5:6],
        content[6_000_000:6_000_004],
    ]


def test_the_cache_is_bounded_and_notices_changes(object_store):
    for number in range(4):
        object_store.put(f"{number}.npy", bytes([number]) * 3_000_000)
    first = object_store.local_path("0.npy")
    assert first.suffix == ".npy"
    stamp = first.stat().st_ino
    with first.open("rb") as held:
        assert object_store.local_path("1.npy") != first
        assert object_store.local_path("0.npy").stat().st_ino == stamp  # no second download
        object_store.local_path("2.npy")
        object_store.local_path("3.npy")  # in place of 1, which was not used since
        assert object_store.local_path("0.npy").stat().st_ino == stamp
        object_store.local_path("1.npy")
        object_store.local_path("2.npy")
        object_store.local_path("3.npy")
        assert not first.exists()
        assert held.read(2) == b"\0\0"
    assert sum(path.stat().st_size for path in object_store.cache.iterdir()) <= object_store.cache_bytes
    object_store.put("0.npy", b"other")
    assert object_store.local_path("0.npy").read_bytes() == b"other"
    object_store.put("large", bytes(object_store.cache_bytes + 1))
    with pytest.raises(UnsupportedError, match=r"large has 10,000,001 bytes, and .*cache keeps 10,000,000"):
        object_store.local_path("large")
    with pytest.raises(FileNotFoundError):
        object_store.local_path("gone")


def test_files_of_killed_processes_leave_the_cache(object_store):
    ended = multiprocessing.get_context("spawn").Process()
    ended.start()
    ended.join()
    object_store.cache.mkdir()
    names = {(process, old): f"{process}-x{old}.copying" for process in (ended.pid, os.getpid()) for old in (0, 1)}
    for (_, old), name in names.items():
        (object_store.cache / name).write_bytes(b"1")
        (object_store.cache / f"{name}-work").mkdir()
        for path in (object_store.cache / name, object_store.cache / f"{name}-work"):
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - old * 90_000))
    object_store.put("a", b"1")
    object_store.local_path("a")
    left = {path.name.removesuffix("-work") for path in object_store.cache.iterdir() if "copying" in path.name}
    assert left == {*names.values()} - {names[ended.pid, 1]}


def test_a_forked_process_is_refused_and_does_not_wait_for_ever(object_store):
    def read():
        try:
            told.put(object_store.get("a"))
        except UnsupportedError as error:
            told.put(str(error))

    object_store.put("a", b"1")
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    process = context.Process(target=read)
    process.start()
    assert "start it by spawn or forkserver" in told.get(timeout=60)
    process.join()


def test_wrong_addresses_are_one_line(tmp_path, server):
    from tailwise.storage.object_store import ObjectStore

    for url in ("nonsense://x/y", "s3://nobody-has-this/x"):
        with pytest.raises(OSError, match=url.split("/x")[0]) as caught:
            ObjectStore(url, tmp_path, 10).put("a", b"1")
        assert "\n" not in str(caught.value)
