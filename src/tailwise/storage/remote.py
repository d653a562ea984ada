"""Requests to remote files by fsspec: repeated within bounds for each file, given up once for all readers of the process.

HTTP responses are checked here: fsspec takes the bytes as they come, whatever range the server says that they are.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple, TypeVar

import fsspec
import fsspec.asyn

from tailwise.extras import install_command
from tailwise.storage.errors import NoRangesError, RemoteError, RemoteNotFoundError, RemoteUnsupportedError, translated
from tailwise.storage.http import NO_RANGES, Patience, address_of, get, is_hub
from tailwise.storage.spans import Span

T = TypeVar("T")
logger = logging.getLogger(__name__)
REMEMBERED_SECONDS = 600.0  # a file that was given up is not asked again for so long
LOOKUP_THREADS = 16
# What pip installs for a protocol, by its name: an extra of ours, or the package.
_EXTRAS = {"s3": "s3", "hf": "hub", "http": "http", "https": "http"}
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}
_WARN_AFTER_SECONDS = 5.0
_JITTER = random.Random()  # not the process's own generator, which augmentations are drawn from


PATIENCE = Patience()


class Fetched(NamedTuple):
    """Bytes of a file."""

    content: bytes  # that were asked for, up to the end of the file
    total_bytes: int | None  # size of the file, if the server sends it
    seconds: float  # duration of the last request
    failures: int  # number of requests that failed before


class _Process:
    """State that a fork must not copy: locks, and file systems with their event loop; and the files that were given up."""

    def __init__(self, given_up: dict[str, tuple[float, RemoteError]]) -> None:
        self.lock = threading.RLock()
        self.filesystems: dict[str, Any] = {}
        self.turns: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self.given_up = given_up

    def check(self, url: str) -> None:
        """Raise the error of a file, or of its server, that was given up recently."""
        with self.lock:
            found = self.given_up.get(url) or self.given_up.get(_host(url))
        if found and time.monotonic() - found[0] < REMEMBERED_SECONDS:
            error = found[1]
            raise type(error)(url, error.cause, host_wide=error.host_wide)

    def attempts(self, url: str) -> int:
        """Return how often a request for this file may fail: less often if many files of its server were given up."""
        oldest = time.monotonic() - REMEMBERED_SECONDS
        with self.lock:
            others = sum(at > oldest and _host(other) == _host(url) for other, (at, _) in self.given_up.items())
        return PATIENCE.attempts if others < PATIENCE.full_for else PATIENCE.short_attempts

    def give_up(self, url: str, trouble: RemoteError, failures: int, seconds: float) -> RemoteError:
        """Remember that a file, or all of its server, cannot be read; return the error to raise."""
        cause = f"{trouble.cause} ({failures} attempts in {seconds:.0f} s)" if failures > 1 else trouble.cause
        error = type(trouble)(url, cause, host_wide=trouble.host_wide)
        with self.lock:
            self.given_up[_host(url) if trouble.host_wide else url] = (time.monotonic(), error)
        if trouble.retry:
            others = f", nor are other files of {_host(error.url)}" if trouble.host_wide else ""
            logger.warning("%s; given up, not tried again for %.0f minutes%s", error, REMEMBERED_SECONDS / 60, others)
        return error


_own = _Process({})


def _begin_process() -> None:
    global _own  # noqa: PLW0603  (a fork must not find locks as another thread held them)
    _own = _Process(dict(_own.given_up))


os.register_at_fork(after_in_child=_begin_process)


def forget_failures() -> None:
    """Let every file be tried again; called when a command or a loader starts."""
    with _own.lock:
        _own.given_up.clear()


def is_remote(path: str) -> bool:
    """Return True for a URL of a remote file, False for a local path or a file:// URL."""
    return "://" in path and not path.startswith(("file://", "local://"))


def _host(url: str) -> str:
    return "/".join(url.split("/", 3)[:3])


def filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, one for all threads of the process, and the file's name in it.

    An unknown protocol, or one whose package is missing, is a RemoteUnsupportedError; missing credentials are a RemoteError.
    """
    own, host = _own, url if "::" in url else _host(url)  # a chain's file system is bound to the whole of it
    with own.lock:
        made = own.filesystems.get(host)
        if made is None:
            try:
                made = fsspec.core.url_to_fs(url)[0]
            except (ImportError, ValueError) as error:
                remedy = _install(url) if isinstance(error, ImportError) else ""
                raise RemoteUnsupportedError(url, f"{error}{remedy}") from error
            except Exception as error:  # each file system raises errors of its own libraries
                raise translated(error, url) from error
            own.filesystems[host] = made
    return made, made._strip_protocol(url)


def _install(url: str) -> str:
    """Return the command that installs what a protocol needs, behind a colon; nothing where it is unknown."""
    protocol = url.split("://", 1)[0].rsplit("::", 1)[-1]
    if protocol in _EXTRAS:
        return f": {install_command(_EXTRAS[protocol])}"
    return f": pip install {_PACKAGES[protocol]}" if protocol in _PACKAGES else ""


def call(url: str, method: str, **options: Any) -> Any:  # noqa: ANN401  (fsspec has no types)
    """Call a method of the URL's file system with the file's name and options, within bounds; a RemoteError if it cannot be done."""
    return persistently(url, lambda: _call_once(url, method, **options))[0]


def entry_of(url: str) -> dict[str, Any] | None:
    """Return what a file system lists of a name, None if it is not there; a RemoteError if that cannot be found out."""

    def look() -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = _call_once(url, "info")
        except FileNotFoundError as error:  # also of a repository that needs a token
            if isinstance(trouble := translated(error, url), RemoteNotFoundError):
                return None
            raise trouble from error
        return found

    return persistently(url, look)[0]


def _call_once(url: str, method: str, size_bytes: int = 0, **options: Any) -> Any:  # noqa: ANN401
    """Call a method whose response has at most `size_bytes`; asynchronous ones have a time-out."""
    files, name = filesystem(url)
    if not getattr(files, "async_impl", False):
        return getattr(files, method)(name, **options)
    seconds = PATIENCE.call_seconds(size_bytes)
    return fsspec.asyn.sync(files.loop, getattr(files, f"_{method}"), name, timeout=seconds, **options)


def persistently(url: str, request: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> tuple[T, int]:
    """Return a request's result, and how often it failed before.

    One thread repeats failed requests to a file; other threads whose requests to it failed wait for the result. `request` may raise
    anything. `progress` returns a number that grows while it gets bytes: attempts that got bytes do not count; their time does. Where
    the bounds are reached, or a retry is useless, a RemoteError is raised, and remembered for the file.
    """
    own = _own
    own.check(url)
    began = time.monotonic()
    try:
        return request(), 0
    except Exception as error:  # as above
        trouble = _trouble(error, url)
        if not trouble.retry:
            raise own.give_up(url, trouble, 1, 0) from error
    with own.lock:
        turn = own.turns[url]
    with turn:
        tries, failures, warned, before = 1, 1, False, progress()
        while True:
            own.check(url)
            elapsed = time.monotonic() - began
            left = PATIENCE.seconds - elapsed
            if not trouble.retry or failures >= own.attempts(url) or left <= 0:
                raise own.give_up(url, trouble, tries, elapsed) from trouble
            if not warned and (failures > 2 or elapsed > _WARN_AFTER_SECONDS):
                logger.warning("%s; trying again for up to %.0f s", trouble, left)
                warned = True
            logger.debug("%s; attempt %d", trouble, tries)
            backoff = PATIENCE.backoff_seconds * 2 ** (failures - 1) * _JITTER.uniform(0.75, 1.25)
            time.sleep(min(max(backoff, trouble.wait_seconds), left))
            try:
                return request(), tries
            except Exception as error:  # noqa: BLE001  (as above)
                trouble = _trouble(error, url)
            failures = failures + 1 if progress() == before else 1
            tries, before = tries + 1, progress()


def _trouble(error: Exception, url: str) -> RemoteError:
    if isinstance(error, NoRangesError):
        raise error  # no failure: the file can be read in another way
    return translated(error, url)


def read_range(url: str, start: int, stop: int, size_bytes: int | None = None) -> Fetched:
    """Return the bytes [start, stop) of a remote file, up to its end.

    Raises:
        NoRangesError: the server can only send the whole file.
        RemoteError: the file cannot be read within the bounds of PATIENCE, or has another size than `size_bytes`, if that is known.
    """
    content, seconds, total = bytearray(), 0.0, size_bytes

    def request() -> None:
        nonlocal seconds, total
        began = time.monotonic()
        while len(content) < stop - start:
            before = len(content)
            stated = _request_range(url, start + before, stop, content)
            if size_bytes is not None and stated is not None and stated != size_bytes:
                raise RemoteError(url, f"it has {stated:,} bytes now, not {size_bytes:,}")
            total = total if stated is None else stated
            if total is not None and start + len(content) >= total:
                break
            if len(content) == before:
                if total is not None:
                    raise RemoteError(url, "an empty response came", retry=True)
                break
        seconds = time.monotonic() - began

    _, failures = persistently(url, request, lambda: len(content))
    return Fetched(bytes(content), total, seconds, failures)


def _request_range(url: str, start: int, stop: int, content: bytearray) -> int | None:
    """Append the bytes of one request; return the size of the file, if the server sends it."""
    if _is_http(filesystem(url)[0]):
        return _get(url, content.extend, (start, stop))
    found: bytes = _call_once(url, "cat_file", start=start, end=stop, size_bytes=stop - start)
    if len(found) > stop - start:
        raise NoRangesError(url, NO_RANGES)
    content += found
    return start + len(content) if len(found) < stop - start else None


def _is_http(files: Any) -> bool:  # noqa: ANN401
    return is_hub(files) or ("http" in files.protocol and hasattr(files, "set_session"))


def _get(url: str, write: Callable[[bytes], object], span: Span | None = None) -> int | None:
    files, name = filesystem(url)
    address, headers = address_of(files, name) if is_hub(files) else (url, {})
    http = filesystem(address)[0]
    total: int | None = fsspec.asyn.sync(http.loop, get, http, url, PATIENCE, write, span, address, headers)
    return total


def download(url: str, target: BinaryIO, most_bytes: int) -> None:
    """Write a whole remote file to an empty local one; a RemoteError if it cannot be read, or has more than `most_bytes`."""

    def write(piece: bytes) -> None:
        if target.tell() + len(piece) > most_bytes:
            raise RemoteError(url, f"more than {most_bytes:,} bytes, which is all there is room for")
        target.write(piece)

    def request() -> None:
        target.seek(0)
        target.truncate()
        files, name = filesystem(url)
        if _is_http(files):
            _get(url, write)
        else:
            with files.open(name, "rb") as stream:
                while piece := stream.read(1 << 20):
                    write(piece)

    persistently(url, request)


def size_of(url: str) -> int | None:
    """Return the size of a remote file in bytes, None if its server does not send it without the file; or raise a RemoteError."""
    return persistently(url, lambda: _size_once(url))[0]


def _size_once(url: str) -> int | None:
    files, _ = filesystem(url)
    if _is_http(files) and not is_hub(files):  # the Hub lists sizes, a thousand with a request
        try:
            return _get(url, bytearray().extend, (0, 1))
        except NoRangesError as error:
            return error.total_bytes
    info = _call_once(url, "info")
    if info.get("type") == "directory":
        raise IsADirectoryError(f"{url} is a folder")
    return None if info["size"] is None else int(info["size"])


def sizes_of(urls: list[str]) -> list[int | RemoteError | None]:
    """Return `size_of` each, or the error why it cannot be read; many at a time."""

    def size_or_error(url: str) -> int | RemoteError | None:
        try:
            return size_of(url)
        except RemoteError as error:
            return error

    with ThreadPoolExecutor(LOOKUP_THREADS) as pool:
        return list(pool.map(size_or_error, urls))
