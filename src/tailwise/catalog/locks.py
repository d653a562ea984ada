"""One writer at a time."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tailwise.errors import UserError


@contextmanager
def locked(path: Path, what: str, *, wait: bool = False, shared: bool = False) -> Iterator[None]:
    """Holds the lock file `path`; the operating system frees it when the process ends, however it ends.

    Args:
        path: of the lock file.
        what: what is written under it, for the message.
        wait: until the process that holds it lets go, in place of an error.
        shared: others may hold it at the same time, if they share it too.

    Raises:
        UserError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UserError(
                f"another process is writing {what}: wait for it to end, then repeat this command"
            ) from error
        try:
            yield
        finally:  # closing is not enough: a process forked meanwhile holds the file open, and with it the lock
            fcntl.flock(stream, fcntl.LOCK_UN)
