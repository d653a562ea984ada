"""Locks between processes."""

import errno
import os
import time
from pathlib import Path

import pytest

from tailwise.errors import UnsupportedError, UserError
from tailwise.storage.local import locked, put_if_absent


def test_a_process_forked_under_a_lock_does_not_keep_it(tmp_path):
    """As workers that some library forks, and keeps, while another thread holds a lock."""
    with locked(tmp_path / "lock", "a file"):
        child = os.fork()
        if not child:
            time.sleep(30)
            os._exit(0)
    try:
        with locked(tmp_path / "lock", "a file"):
            pass
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_the_second_is_refused_or_waits(tmp_path):
    with (
        locked(tmp_path / "lock", "a file"),
        pytest.raises(UserError, match="another process is writing a file"),
        locked(tmp_path / "lock", "a file"),
    ):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with (
        pytest.raises(UnsupportedError, match=r"\.lock has no locks \(flock: .*\): mount it with them"),
        locked(tmp_path / ".lock", "x"),
    ):
        pytest.fail("it has no lock")


def test_a_link_that_is_made_twice_counts_once(tmp_path, monkeypatch):
    """NFS repeats a request whose answer was lost: the second one finds the name taken, by the file itself."""
    link = Path.hardlink_to

    def twice(path, target):
        link(path, target)
        link(path, target)

    monkeypatch.setattr(Path, "hardlink_to", twice)
    assert put_if_absent(tmp_path / "name", b"ours")
    assert not put_if_absent(tmp_path / "name", b"theirs")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("name", b"ours")]
