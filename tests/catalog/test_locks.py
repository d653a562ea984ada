"""Locks between processes."""

import os
import time

import pytest

from tailwise.errors import UserError
from tailwise.storage.local import locked


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
