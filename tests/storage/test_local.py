"""Files that are whole or absent, whatever ends their writers, and however many write at once."""

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from tailwise.storage.local import put_if_absent, replacing

WRITERS = 8


def create(path, start, number, told):
    start.wait()
    told.put((number, put_if_absent(path, b"%d" % number)))


def winners(path):
    context = multiprocessing.get_context("fork")
    start, told = context.Barrier(WRITERS), context.Queue()
    processes = [context.Process(target=create, args=(path, start, number, told)) for number in range(WRITERS)]
    for process in processes:
        process.start()
    answers = dict(told.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    return [number for number, first in answers.items() if first]


@pytest.mark.slow
def test_one_of_several_writers_wins(tmp_path):
    path = tmp_path / "folder" / "race"
    for _ in range(5):
        (won,) = winners(path)
        assert path.read_bytes() == b"%d" % won
        assert list(path.parent.iterdir()) == [path]
        path.unlink()


def test_one_wins_on_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refused)
    path = tmp_path / "race"
    (won,) = winners(path)
    assert path.read_bytes() == b"%d" % won
    assert list(tmp_path.iterdir()) == [path]


def write(path):
    while True:
        with replacing(path, unique=True) as temporary:
            temporary.write_bytes(os.urandom(4) * (1 << 20))


def test_a_killed_writer_leaves_the_old_or_the_new(tmp_path):
    path = tmp_path / "big"
    path.write_bytes(bytes(4 << 20))
    context = multiprocessing.get_context("fork")
    for pause in (0.01, 0.03, 0.05, 0.08):
        process = context.Process(target=write, args=(path,))
        process.start()
        time.sleep(pause)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        content = path.read_bytes()
        assert content == content[:4] * (1 << 20)
