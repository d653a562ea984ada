"""An object store in a forked process, where obstore would wait for ever: its requests go to a process of its own.

The workers of a torch DataLoader are forked.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

from tailwise.storage.object_store import ObjectStore

_LOCK = threading.Lock()
_process: tuple[int, subprocess.Popen[bytes]] | None = None  # by the process that started it
os.register_at_fork(after_in_child=lambda: globals().update(_LOCK=threading.Lock()))


class ForkedStore:
    """The methods of a store, called in another process. It ends with this one."""

    def __init__(self, store: ObjectStore) -> None:
        """Take the store."""
        self._store = store

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  (a method)
        """Return a method."""
        if name.startswith("__"):
            raise AttributeError(name)
        return partial(_ask, self._store, name)


def _ask(store: ObjectStore, name: str, *args: Any) -> Any:  # noqa: ANN401
    global _process  # noqa: PLW0603  (a process has one)
    with _LOCK:
        if _process is None or _process[0] != os.getpid() or _process[1].poll() is not None:
            command = [sys.executable, "-c", "from tailwise.storage.forked_store import serve; serve()"]
            _process = os.getpid(), subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        requests, answers = cast("tuple[Any, Any]", (_process[1].stdin, _process[1].stdout))
        pickle.dump((store, name, args), requests)
        requests.flush()
        failed, answer = pickle.load(answers)
    if failed:
        raise answer
    return answer


def serve() -> None:
    """Answer the requests of the parent until it ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while True:
        try:
            store, name, args = pickle.load(requests)
        except EOFError:
            return
        try:
            found = getattr(store, name)(*args)
            answer = False, list(found) if isinstance(found, Iterator) else found
        except Exception as error:  # noqa: BLE001  (the parent raises it)
            answer = True, error
        pickle.dump(answer, answers)
        answers.flush()
