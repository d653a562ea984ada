"""Bytes at keys of an object store: S3, Google Cloud Storage, Azure.

Requests are those of obstore: it puts under conditions, joins ranges, and repeats requests that failed. Its threads do not survive a fork,
after which its calls would wait for ever: a process that was forked from one that has used a store is refused (see `forked`), and uses a
`ForkedStore`. The workers of a torch DataLoader are forked.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar, cast

from tailwise.errors import UnsupportedError
from tailwise.extras import require
from tailwise.storage.errors import RemoteError, RemoteNotFoundError, translated
from tailwise.storage.http import Patience
from tailwise.storage.store import Head, check_key

WRITER = "tailwise-writer"  # attribute of an object: the request that has written it

COPYING = ".copying"  # ends the names of files in a cache until they are complete
ABANDONED_SECONDS = 86_400.0  # age of such a file, and of a folder, that is removed if its process has ended
PART_BYTES = 8 << 20  # of an upload
MOST_PARTS = 9_000  # of an upload; S3 takes 10,000
PIECE_BYTES = 64 << 20  # of a download, that a request is for
PIECES = 4  # under way at a time
TRIES = 3  # of an upload or a download that obstore could not complete

PATIENCE = Patience()  # with requests that fail
T = TypeVar("T")
FULL_SHARE = 0.9  # of a cache that was full, which is kept, so that it is seldom listed
SHARED_BY = 16  # processes that may fill a cache before one lists it again
_room: dict[ObjectStore, float] = {}  # bytes that this process may add to a cache before it lists the cache again
_used_by: int | None = None  # process that has made the threads of obstore
_LOCK = threading.Lock()
_process: tuple[int, subprocess.Popen[bytes]] | None = None  # by the process that started it
os.register_at_fork(after_in_child=lambda: globals().update(_LOCK=threading.Lock()))


def forked() -> bool:
    """Return True if this process was forked from one that has used a store."""
    return _used_by not in (None, os.getpid())


@dataclass(frozen=True)
class ObjectStore:
    """The keys below a URL. Credentials come from the environment.

    Of writers that put under a condition, exactly one gets the answer that it has won, also after a lost response: an object names the
    request that has written it. Only a `replace_if` whose response was lost, and whose bytes were replaced since, gets the answer that it
    has lost.
    """

    url: str  # such as s3://bucket/folder
    cache: Path  # folder of this machine, for `local_path`
    cache_bytes: int  # greatest size of that folder

    def get(self, key: str) -> bytes:
        """See `Store`."""
        with self._requests(key) as store:
            return bytes(_obstore().get(store, key).bytes())

    def read(self, key: str) -> tuple[bytes, Head]:
        """Return the bytes at a key and their attributes; a FileNotFoundError says that there are none."""
        with self._requests(key) as store:
            found = _obstore().get(store, key)
            return bytes(found.bytes()), _head(found.meta)

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]], head: Head | None = None) -> list[bytes]:
        """See `Store`. With the attributes of what is there, no request asks for them."""
        with self._requests(key) as store:
            size = (head or _head(_obstore().head(store, key))).size
            spans = [(start, min(stop, size)) for start, stop in ranges]
            wanted = [span for span in spans if span[0] < span[1]]  # others are refused
            starts, ends = [start for start, _ in wanted], [stop for _, stop in wanted]
            found = _obstore().get_ranges(store, key, starts=starts, ends=ends) if wanted else []
            contents = dict(zip(wanted, found, strict=True))
            return [bytes(contents.get(span, b"")) for span in spans]

    def put(self, key: str, content: bytes) -> None:
        """See `Store`."""
        with self._requests(key) as store:
            _obstore().put(store, key, content)

    def put_file(self, key: str, path: Path) -> Head:
        """Write the bytes of a file at a key, over what is there; the file becomes the copy in the cache. Return its attributes."""
        size = path.stat().st_size

        def put() -> str:
            with self._requests(key) as store:
                chunk = max(PART_BYTES, -(-size // MOST_PARTS))
                found: str = _obstore().put(store, key, path, use_multipart=size > PART_BYTES, chunk_size=chunk)[
                    "e_tag"
                ]
                return found

        head = Head(size, _persistently(put))
        if size > self.cache_bytes:
            path.unlink()
        else:
            self._make_room(key, size)
            self._keep(path, self._copy(key, head))
        return head

    def put_if_absent(self, key: str, content: bytes) -> bool:
        """See `Store`."""
        return self.put_if(key, content) is not None

    def replace_if(self, key: str, etag: str, content: bytes) -> bool:
        """See `Store`."""
        return self.head(key) is not None and self.put_if(key, content, etag) is not None

    def put_if(self, key: str, content: bytes, etag: str | None = None) -> str | None:
        """Write the bytes at a key over those of an etag, or where nothing is; return the new etag, None where others are there."""
        mode, refusal = ({"e_tag": etag}, "PreconditionError") if etag else ("create", "AlreadyExistsError")
        writer, began = uuid.uuid4().hex, time.monotonic()
        with self._requests(key) as store:
            errors = _obstore().exceptions
            while True:
                try:
                    options = {"mode": mode, "attributes": {WRITER: writer}, "use_multipart": False}
                    written: str = _obstore().put(store, key, content, **options)["e_tag"]
                    return written
                except (getattr(errors, refusal), FileNotFoundError):
                    # There is one if an earlier request was done, and its response lost.
                    return self._etag_of(writer, store, key)
                except errors.GenericError:  # obstore does not repeat what may have been done
                    if (found := self._etag_of(writer, store, key)) is not None:
                        return found
                    if time.monotonic() - began > PATIENCE.seconds:
                        raise
                time.sleep(PATIENCE.backoff_seconds)

    @staticmethod
    def _etag_of(writer: str, store: Any, key: str) -> str | None:  # noqa: ANN401  (of obstore, which may not be installed)
        """Return the etag of what is at a key if this request has written it."""
        with suppress(FileNotFoundError):
            found = _obstore().get(store, key, options={"head": True})
            return str(found.meta["e_tag"]) if found.attributes.get(WRITER) == writer else None
        return None

    def head(self, key: str) -> Head | None:
        """See `Store`."""
        with suppress(FileNotFoundError), self._requests(key) as store:
            return _head(_obstore().head(store, key))
        return None

    def keys(self, prefix: str) -> Iterator[str]:
        """See `Store`: in the order of the server, which is that of UTF-8."""
        with self._requests(prefix or None) as store:
            for found in _obstore().list(store, prefix or None):
                yield from (item["path"] for item in found)

    def entries(self, folder: str) -> tuple[list[str], dict[str, Head]]:
        """Return what is directly in a folder: the keys of its folders, and those of its files with their attributes, in order."""
        with self._requests(folder or None) as store:
            found = _obstore().list_with_delimiter(store, folder or None)
        return sorted(found["common_prefixes"]), {item["path"]: _head(item) for item in found["objects"]}

    def copy(self, key: str, other: str) -> None:
        """Copy what is at a key to another one, in the store itself."""
        with self._requests(key) as store:
            _obstore().copy(store, key, other)

    def delete(self, key: str) -> None:
        """See `Store`."""
        with suppress(FileNotFoundError), self._requests(key) as store:
            _obstore().delete(store, key)

    def delete_folder(self, folder: str) -> None:
        """Remove all that is in a folder, many keys with each request."""
        if keys := list(self.keys(f"{folder}/")):
            with suppress(FileNotFoundError), self._requests(folder) as store:
                _obstore().delete(store, keys)

    def local_path(self, key: str, head: Head | None = None) -> Path:
        """See `Store`: a copy in the cache. It may be removed when others need room; a map of it stays valid.

        With the attributes of what is there, no request asks for them.

        Raises:
            FileNotFoundError: nothing is at the key.
            UnsupportedError: it is larger than the cache.
        """
        if head is None:
            with self._requests(key) as store:
                head = _head(_obstore().head(store, key))
        if (found := self.kept(key, head)) is not None:
            return found
        self._make_room(key, head.size)
        path, temporary, etag = self._copy(key, head), self.new_copy(), head.etag

        def fetch(start: int, handle: int) -> None:
            options = {"range": (start, min(start + PIECE_BYTES, head.size)), "if_match": etag}
            with self._requests(key) as store:
                os.pwrite(handle, _obstore().get(store, key, options=options).bytes(), start)

        try:
            with temporary.open("wb") as file, ThreadPoolExecutor(PIECES) as pool:
                fetches = [partial(fetch, start, file.fileno()) for start in range(0, head.size, PIECE_BYTES)]
                for _ in pool.map(_persistently, fetches):
                    pass
            return self._keep(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def drop_copy(self, key: str) -> None:
        """Remove the copy of a file that the cache may have."""
        if (head := self.head(key)) is not None:
            self._copy(key, head).unlink(missing_ok=True)

    def kept(self, key: str, head: Head) -> Path | None:
        """Return the copy of a file that the cache has, without a request; None if it has none."""
        path = self._copy(key, head)
        with suppress(FileNotFoundError):
            return self._keep(path, path)
        return None

    @staticmethod
    def _keep(copy: Path, path: Path) -> Path:
        """Give a copy its name, and note that it is used now; its other time is part of its `file_stamp`."""
        os.utime(copy, ns=(time.time_ns(), copy.stat().st_mtime_ns))
        return copy if copy == path else copy.rename(path)

    def new_copy(self) -> Path:
        """Return the path of a new file in the folder of the cache, for `put_file`."""
        self.cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self.cache / f"{os.getpid()}-{uuid.uuid4().hex}{COPYING}"

    def _copy(self, key: str, head: Head) -> Path:
        name = blake2b(f"{self.url}/{key} {head.etag}".encode(), digest_size=16).hexdigest()
        return self.cache / f"{name}{Path(key).suffix}"

    def _make_room(self, key: str, size_bytes: int) -> None:
        """Remove the copies that were not used for the longest time, until another one fits."""
        if size_bytes > self.cache_bytes:
            kept = f"{self.cache} keeps {self.cache_bytes:,}: allow more with TAILWISE_CACHE_BYTES"
            raise UnsupportedError(f"{key} has {size_bytes:,} bytes, and {kept}")
        room = _room.get(self, 0.0) - size_bytes
        if room >= 0:
            _room[self] = room
            return
        copies, abandoned = [], time.time() - ABANDONED_SECONDS
        for path in self.cache.glob("*"):
            with suppress(FileNotFoundError, ValueError):  # another process makes room; the name is not one of ours
                status = path.stat()
                if path.is_file() and path.suffix != COPYING:
                    copies.append((status, path))
                elif status.st_mtime < abandoned and not is_running(int(path.name.split("-")[0])):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        total = sum(status.st_size for status, _ in copies)
        bound = self.cache_bytes if total + size_bytes <= self.cache_bytes else FULL_SHARE * self.cache_bytes
        for status, path in sorted(copies, key=lambda copy: copy[0].st_atime_ns):
            if total + size_bytes <= bound:
                break
            path.unlink(missing_ok=True)
            total -= status.st_size
        _room[self] = (self.cache_bytes - total - size_bytes) / SHARED_BY

    @contextmanager
    def _requests(self, key: str | None) -> Iterator[Any]:
        """Yield the store of obstore; raise a ValueError for a wrong key, and a RemoteError for any error of a request."""
        global _used_by  # noqa: PLW0603  (as obstore has one pool of threads)
        url = self.url if key is None else f"{self.url}/{check_key(key)}"
        if forked():
            raise UnsupportedError(f"{self.url} can't be used by a forked process: start it by spawn or forkserver")
        _used_by = os.getpid()
        store = _opened(self.url)
        try:
            yield store
        except FileNotFoundError:
            raise RemoteNotFoundError(url, "not found") from None
        except _obstore().exceptions.BaseError as error:
            raise translated(error, url) from None  # its cause would show the whole request


def _head(found: Any) -> Head:  # noqa: ANN401  (as above)
    return Head(found["size"], found["e_tag"])


def _persistently(request: Callable[[], T]) -> T:
    """Return the result of a request that may be repeated as a whole."""
    for _ in range(TRIES - 1):
        try:
            return request()
        except RemoteError as error:  # noqa: PERF203  (a few times)
            if not error.retry:
                raise
    return request()


def is_running(process: int) -> bool:
    """Return True if this machine has a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


@lru_cache(maxsize=16)
def _opened(url: str) -> Any:  # noqa: ANN401  (as above)
    require("s3", "obstore", purpose=url)
    options = {"allow_http": os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")}
    retries = {"retry_timeout": timedelta(seconds=PATIENCE.seconds), "max_retries": PATIENCE.attempts}
    try:
        return _obstore().store.from_url(url, client_options=options, retry_config=retries)
    except (ValueError, _obstore().exceptions.BaseError) as error:
        raise RemoteError(url, str(error)) from None


def _obstore() -> Any:  # noqa: ANN401  (as above)
    import obstore  # noqa: PLC0415  (an extra)

    return obstore


class ForkedStore:
    """The methods of a store in a forked process, called in a process of its own. It ends with this one."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  (a method)
        if name.startswith("__"):
            raise AttributeError(name)
        return partial(_ask, self._store, name)


def _ask(store: ObjectStore, name: str, *args: Any) -> Any:  # noqa: ANN401
    global _process  # noqa: PLW0603  (a process has one)
    with _LOCK:
        if _process is None or _process[0] != os.getpid() or _process[1].poll() is not None:
            command = [sys.executable, "-c", "from tailwise.storage.object_store import serve; serve()"]
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
