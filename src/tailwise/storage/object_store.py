"""Bytes at keys of an object store: S3, Google Cloud Storage, Azure.

Requests are those of obstore: it puts under conditions, joins ranges, and repeats requests that failed. Its threads do not survive a fork,
after which its calls would wait for ever: a process that was forked from one that has used a store is refused.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tailwise.errors import UnsupportedError
from tailwise.extras import require
from tailwise.storage.errors import RemoteError, RemoteNotFoundError, translated
from tailwise.storage.local import replacing
from tailwise.storage.remote import PATIENCE
from tailwise.storage.store import Head, check_key

WRITER = "tailwise-writer"  # attribute of an object: the request that has written it

_used_by: int | None = None  # process that has made the threads of obstore


@dataclass(frozen=True)
class ObjectStore:
    """The keys below a URL. Credentials come from the environment.

    Of writers that put under a condition, exactly one gets the answer that it has won, also after a lost response: an object names the
    request that has written it. Only a `replace_if` whose response was lost, and whose bytes were replaced since, gets the answer that it
    has lost.

    Attributes:
        url: such as s3://bucket/folder.
        cache: folder of this machine, for `local_path`.
        cache_bytes: greatest size of that folder.
    """

    url: str
    cache: Path
    cache_bytes: int

    def get(self, key: str) -> bytes:
        """See `Store`."""
        with self._requests(key) as store:
            return bytes(_obstore().get(store, key).bytes())

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """See `Store`."""
        with self._requests(key) as store:
            size = _obstore().head(store, key)["size"]
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

    def put_if_absent(self, key: str, content: bytes) -> bool:
        """See `Store`."""
        return self._put_if(key, content, "create", "AlreadyExistsError")

    def replace_if(self, key: str, etag: str, content: bytes) -> bool:
        """See `Store`."""
        return self.head(key) is not None and self._put_if(key, content, {"e_tag": etag}, "PreconditionError")

    def _put_if(self, key: str, content: bytes, mode: str | dict[str, str], refusal: str) -> bool:
        writer, began = uuid.uuid4().hex, time.monotonic()
        with self._requests(key) as store:
            errors = _obstore().exceptions
            while True:
                try:
                    _obstore().put(store, key, content, mode=mode, attributes={WRITER: writer}, use_multipart=False)
                    return True
                except getattr(errors, refusal):
                    return self._writer(store, key) == writer  # then an earlier request was done, and its response lost
                except errors.GenericError:  # obstore does not repeat what may have been done
                    if self._writer(store, key) == writer:
                        return True
                    if time.monotonic() - began > PATIENCE.seconds:
                        raise
                time.sleep(PATIENCE.backoff_seconds)

    @staticmethod
    def _writer(store: Any, key: str) -> str | None:  # noqa: ANN401  (of obstore, which may not be installed)
        """Return the request that has written what is at a key; None for nothing."""
        with suppress(FileNotFoundError):
            writer: str | None = _obstore().get(store, key, options={"head": True}).attributes.get(WRITER)
            return writer
        return None

    def head(self, key: str) -> Head | None:
        """See `Store`."""
        with suppress(FileNotFoundError), self._requests(key) as store:
            found = _obstore().head(store, key)
            return Head(found["size"], found["e_tag"])
        return None

    def keys(self, prefix: str) -> Iterator[str]:
        """See `Store`: in the order of the server, which is that of UTF-8."""
        with self._requests(prefix or None) as store:
            for found in _obstore().list(store, prefix or None):
                yield from (item["path"] for item in found)

    def delete(self, key: str) -> None:
        """See `Store`."""
        with suppress(FileNotFoundError), self._requests(key) as store:
            _obstore().delete(store, key)

    def local_path(self, key: str) -> Path:
        """See `Store`: a copy in the cache. It may be removed when others need room; a map of it stays valid.

        Raises:
            FileNotFoundError: nothing is at the key.
            UnsupportedError: it is larger than the cache.
        """
        with self._requests(key) as store:
            head = _obstore().head(store, key)
        name = blake2b(f"{self.url} {key} {head['e_tag']}".encode(), digest_size=16).hexdigest()
        path = self.cache / f"{name}{Path(key).suffix}"
        with suppress(FileNotFoundError):
            os.utime(path)
            return path
        self._make_room(key, head["size"])
        with replacing(path, unique=True) as temporary, temporary.open("wb") as file, self._requests(key) as store:
            for piece in _obstore().get(store, key, options={"if_match": head["e_tag"]}).stream():
                file.write(piece)
        return path

    def _make_room(self, key: str, size_bytes: int) -> None:
        """Remove the copies that were not used for the longest time, until another one fits."""
        if size_bytes > self.cache_bytes:
            kept = f"{self.cache} keeps {self.cache_bytes:,}: allow more with `cache_bytes`"
            raise UnsupportedError(f"{key} has {size_bytes:,} bytes, and {kept}")
        copies = []
        for path in self.cache.glob("*"):
            with suppress(FileNotFoundError):  # another process makes room
                copies.append((path.stat(), path))
        total = sum(status.st_size for status, _ in copies)
        for status, path in sorted(copies, key=lambda copy: copy[0].st_mtime_ns):
            if total + size_bytes <= self.cache_bytes:
                break
            path.unlink(missing_ok=True)
            total -= status.st_size

    @contextmanager
    def _requests(self, key: str | None) -> Iterator[Any]:
        """Yield the store of obstore; raise a ValueError for a wrong key, and a RemoteError for any error of a request."""
        global _used_by  # noqa: PLW0603  (as obstore has one pool of threads)
        url = self.url if key is None else f"{self.url}/{check_key(key)}"
        if _used_by not in (None, os.getpid()):
            raise UnsupportedError(f"{self.url} can't be used by a forked process: start it by spawn or forkserver")
        _used_by = os.getpid()
        store = _opened(self.url)
        try:
            yield store
        except FileNotFoundError:
            raise RemoteNotFoundError(url, "not found") from None
        except _obstore().exceptions.BaseError as error:
            raise translated(error, url) from None  # its cause would show the whole request


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
