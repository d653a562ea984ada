"""Locks in an object store: an object that names its holder, renewed while the lock is held, and taken over when the holder is gone.

The holder is gone when its time has passed, by the clock of the process that asks, or when its process on this very machine has ended.
Clocks of nodes may differ by less than LEASE_SECONDS - RENEW_SECONDS. A lease excludes other writers that are alive. It cannot stop one
that was suspended for longer than its time: artifacts are therefore published under a condition of the store, not under the lease alone.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tailwise.errors import ConflictError
from tailwise.storage.errors import RemoteError
from tailwise.storage.object_store import is_running
from tailwise.storage.store_path import StorePath

LEASE_SECONDS = 60.0
RENEW_SECONDS = 15.0
LONGEST_PAUSE_SECONDS = 1.0  # between two looks at the lease of another process


@contextmanager
def leased(path: StorePath, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lease of an object.

    If another process holds it, wait, or raise a ConflictError that says what is locked (`what`) and by whom.
    """
    lease = _Lease(path, what)
    lease.take(wait=wait)
    thread = threading.Thread(target=lease.keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        lease.ended.set()
        thread.join()
        lease.give_back()


class _Lease:
    def __init__(self, path: StorePath, what: str) -> None:
        self._path, self._what, self.ended = path, what, threading.Event()
        self._holder = {
            "owner": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": _machine(),
        }
        self._etag, self._until = "", 0.0  # of what this process has written last; by its monotonic clock

    def _written(self, over: str | None = None) -> bool:
        """Write this process's name, where nothing is, or over an etag; return False where others are there."""
        began = time.monotonic()
        content = json.dumps({**self._holder, "until": time.time() + LEASE_SECONDS}).encode()
        etag = self._path.store.put_if(self._path.key, content, over)
        if etag is not None:
            self._etag, self._until = etag, began + LEASE_SECONDS
        return etag is not None

    def take(self, *, wait: bool) -> None:
        pause = 0.05
        while not self._written():
            try:
                content, head = self._path.store.read(self._path.key)
            except FileNotFoundError:
                continue  # given back at this moment
            holder = _parsed(content)
            left = holder["until"] - time.time()
            if left <= 0 or _ended(holder):
                if self._written(head.etag):
                    return
                continue  # another process was faster
            if not wait:
                who = (
                    f"process {holder['pid']} on {holder['host']}, whose lock ends in {left:.0f} s unless it is renewed"
                )
                raise ConflictError(
                    f"another process is writing {self._what} ({who}): wait for it to end, then repeat this command"
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def keep(self) -> None:
        """Renew the lease until it ends, or another process has taken it."""
        while not self.ended.wait(RENEW_SECONDS):
            with suppress(RemoteError):  # the next try may succeed
                if not self._written(self._etag):
                    self._until = 0.0
                    return

    def give_back(self) -> None:
        """Remove the lease, unless another process may hold it."""
        if time.monotonic() < self._until - RENEW_SECONDS:
            self._path.store.delete(self._path.key)


def _parsed(content: bytes) -> dict[str, Any]:
    """Return the holder of a lease; one that is damaged has ended."""
    with suppress(ValueError):
        found = json.loads(content)
        if isinstance(found, dict) and isinstance(found.get("until"), float):
            return {"host": "?", "pid": 0, "machine": "", **found}
    return {"until": 0.0}


def _machine() -> str:
    """Return what names the processes that see each other's numbers; "" where that is unknown."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115  (no file)
    return ""


def _ended(holder: dict[str, Any]) -> bool:
    """Return True if the holder was a process of this machine that has ended."""
    if not _machine() or holder["machine"] != _machine():
        return False
    return not is_running(int(holder["pid"]))
