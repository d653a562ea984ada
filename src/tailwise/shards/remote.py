"""Remote shards (s3, http, gs, … by fsspec), read through a bounded cache on disk that all processes of the machine share."""

from __future__ import annotations

import hashlib
import heapq
import io
import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.errors import UserError
from tailwise.kernels.places import by_value
from tailwise.shards.fingerprint import SOME, Comparisons, blocks_of_url
from tailwise.storage.errors import NoRangesError, RemoteError
from tailwise.storage.lru import LRUCache
from tailwise.storage.pread import OpenFile
from tailwise.storage.range_cache import Claim, RangeCache
from tailwise.storage.remote import download, read_range
from tailwise.storage.spans import LinkEstimate, Span, Spans, coalesce
from tailwise.text import redacted

CONNECTIONS = 16  # per process
CLAIMS_AT_ONCE = 16
GAP_SHARE = 0.5  # of the bytes that a request costs: unwanted bytes also take room in the cache
MAX_OPEN_RANGES = 256
MAX_WANTED = 1 << 20  # ranges; further hints are dropped
TOUCH_SECONDS = 1.0  # time between two marks that a range is in use
_PIECE_BYTES = (1 << 20, 16 << 20)
READ, _PREFETCH = 0, 1  # priorities


class _Process:
    """State that a fork must not copy: threads, their locks and queues. Threads end when there is no work."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.link = LinkEstimate()
        self.counts = Counter[str]()
        self.tasks: list[tuple[int, int, Callable[[], None], Future[None]]] = []  # a heap
        self.numbers = itertools.count()
        self.threads = 0
        self.hints: list[npt.NDArray[np.int64]] = []
        self.hinted_ranges = 0
        self.prefetching = False
        self.closings = 0
        self.whole = threading.Lock()
        # By priority: each claim holds a file descriptor.
        self.under_way = [threading.Semaphore(2 * CONNECTIONS) for _ in (READ, _PREFETCH)]

    def submit(self, priority: int, task: Callable[[], None]) -> Future[None]:
        """Run a task on one of CONNECTIONS threads. They are daemons, unlike those of an executor: an exit waits for no request."""
        done: Future[None] = Future()
        with self.lock:
            if self.threads < CONNECTIONS:
                threading.Thread(target=self._work, daemon=True).start()
                self.threads += 1
            heapq.heappush(self.tasks, (priority, next(self.numbers), task, done))
        return done

    def _work(self) -> None:
        while True:
            with self.lock:
                if not self.tasks:
                    self.threads -= 1
                    return
                _, _, task, done = heapq.heappop(self.tasks)
            try:
                done.set_result(task())
            except BaseException as error:  # noqa: BLE001  (raised by the future's result)
                done.set_exception(error)
            del task, done  # they refer to the store


def each_or_error(
    read: Callable[[int, int, int], bytes], ranges: npt.NDArray[np.int64]
) -> Iterator[bytes | memoryview | OSError]:
    """Yield what `read` returns for each (shard, start, stop) of int64 [n, 3], or the OSError that it raises."""
    for shard, start, stop in ranges.tolist():
        try:
            content: bytes | OSError = read(shard, start, stop)
        except OSError as error:
            content = error
        yield content


class RemoteShards:
    """Remote shards, read by range. May be forked, pickled, and used by several threads.

    Ranges of a shard are fetched in one request if the gap between them takes less than half the time of one more request, by the times
    of earlier requests. If nearly all of a shard is wanted, it is fetched whole, in a few requests.
    """

    remote = True

    def __init__(
        self,
        paths: Sequence[str],
        folder: str | Path,
        max_bytes: int,
        versions: Sequence[str] | None = None,
        sizes: Sequence[int] | None = None,
        fingerprints: Sequence[str | None] | None = None,
    ) -> None:
        """Make the cache folder, which must lie on a local disk; connect to nothing yet. See `ranges.open_store`.

        Without `sizes`, the server must answer requests for ranges. Each process compares some blocks with the fingerprint before its
        first request. Fetching more ahead of the reads than `max_bytes` is in vain.
        """
        self.paths = paths
        self.versions, self.sizes, self.fingerprints = versions, sizes, fingerprints
        self.cache = RangeCache(folder, max_bytes)
        self._forget()

    def _forget(self) -> None:
        self._known: dict[int, Spans] = {}
        self._files: LRUCache[tuple[int, Span], OpenFile | None] = LRUCache(MAX_OPEN_RANGES)
        self._process = _Process()
        self._comparisons = Comparisons(self.paths, self.fingerprints)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("paths", "versions", "sizes", "fingerprints", "cache")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def _own(self) -> _Process:
        if self._process.pid != os.getpid():
            self._forget()
        return self._process

    @property
    def statistics(self) -> Counter[str]:
        """Return the "requests" of this process that succeeded, the "bytes" that they brought, and the "retries" of failed ones."""
        return self._own.counts

    def read(self, shard: int, start: int, stop: int) -> bytes:
        """See `LocalShards`: from the cache, or else fetched now."""
        if start >= stop:
            return b""
        content = self._cached(shard, start, stop)
        return self._fetch_one(shard, start, stop) if content is None else content

    def read_many(self, ranges: npt.NDArray[np.int64]) -> Iterator[bytes | memoryview | OSError]:
        """See `LocalShards`: all that is missing is fetched before the first is yielded."""
        asked = ranges.tolist()
        missing = [at for at, each in enumerate(asked) if self._span(*each) is None]
        for shard in {asked[at][0] for at in missing}:
            self._refresh(shard)
        missing = [at for at in missing if self._span(*asked[at]) is None]
        if len(missing) > 1:
            self._obtain(ranges[missing], READ)
        yield from each_or_error(self.read, ranges)

    def want(self, ranges: npt.NDArray[np.int64]) -> None:
        """Take a hint that these ranges will be read soon: a thread fetches the missing ones. Returns at once, raises nothing."""
        own = self._own
        with own.lock:
            if own.hinted_ranges + len(ranges) > MAX_WANTED:
                return
            if not own.prefetching:
                threading.Thread(target=self._prefetch, args=(own,), daemon=True).start()
                own.prefetching = True
            own.hinted_ranges += len(ranges)
            own.hints.append(np.array(ranges, np.int64))

    def close(self) -> None:
        """See `LocalShards`: hints are dropped, and threads end after the requests that are under way."""
        own = self._own
        with own.lock:
            own.closings += 1
            own.hints, own.hinted_ranges = [], 0
        self._known.clear()
        self._files.clear()

    def _cached(self, shard: int, start: int, stop: int) -> bytes | None:
        """Return bytes from a file of the cache; None if no file has them."""
        for look_up in (False, True):
            if look_up:
                self._refresh(shard)
            span = self._span(shard, start, stop)
            file = self._files.get((shard, span), partial(self._open, shard, span)) if span is not None else None
            if file is not None and span is not None:
                now = time.monotonic()
                if now - file.touched > TOUCH_SECONDS:
                    file.touched = now
                    os.utime(file.handle)
                return os.pread(file.handle, stop - start, start - span[0])
        return None

    def _open(self, shard: int, span: Span) -> OpenFile | None:
        return self.cache.open(self._key(shard), span)

    def _refresh(self, shard: int) -> None:
        """Look up the spans of a shard that other threads and processes have fetched."""
        self._known[shard] = Spans(self.cache.ready(self._key(shard)))

    def _span(self, shard: int, start: int, stop: int) -> Span | None:
        known = self._known.get(shard)
        return known.find(start, stop) if known is not None else None

    def _key(self, shard: int) -> str:
        """Return the name of a shard's folder in the cache."""
        version = self.versions[shard] if self.versions is not None else ""
        text = f"{self.paths[shard]}\t{version}".encode("utf-8", "surrogateescape")
        return hashlib.blake2b(text, digest_size=16).hexdigest()

    def _fetch_one(self, shard: int, start: int, stop: int) -> bytes:
        """Fetch a range; if another process is fetching it, wait for that."""
        key = self._key(shard)
        others: list[Span] = []
        extent = self._extent(shard, start, stop)

        def plan(ready: list[Span], claimed: list[Span]) -> list[Span]:
            span = Spans(claimed).find(start, stop)
            others[:] = [span] if span is not None else []
            there = others or Spans(ready).find(start, stop) is not None
            return [] if there else [extent]

        for waited in (False, True):
            claims = self.cache.claim(key, plan)
            if claims:
                return self._fetch(shard, claims[0])[start - extent[0] : stop - extent[0]]
            if others and waited:
                break  # the fetch of another process failed; all processes try now, not one after the other
            for span in others:
                self.cache.wait(key, span)
            content = self._cached(shard, start, stop)
            if content is not None:
                return content
            if not others:
                break  # no room in the cache
        return self._request(shard, start, stop)

    def _extent(self, shard: int, start: int, stop: int) -> Span:  # noqa: ARG002
        """Return the span to fetch for a range that a reader waits for."""
        return start, stop

    def _fetch(self, shard: int, claim: Claim) -> bytes:
        try:
            content = self._request(shard, *claim.span)
        except BaseException:
            self.cache.abandon(claim)
            raise
        with suppress(OSError):  # a full disk: the content is good anyway
            self.cache.commit(claim, content)
        return content

    def _obtain(self, ranges: npt.NDArray[np.int64], priority: int, closings: int | None = None) -> None:
        """Fetch the missing ones of (shard, start, stop), int64 [n, 3], that no other process fetches; a reader waits for them.

        Errors are ignored: a read of a missing range repeats the request. Stop if the store is closed after this number of closings.
        """
        own = self._own
        pending: list[Future[None]] = []
        for shard, mine in by_value(ranges[:, 0]):
            key = self._key(shard)
            wanted: list[Span] = [(start, stop) for _, start, stop in ranges[mine].tolist() if start < stop]
            while wanted:
                if closings not in {None, own.closings}:
                    return
                planned: list[Span] = []
                claims = self.cache.claim(key, partial(self._plan, shard, priority, wanted, planned))
                for claim in claims:
                    own.under_way[priority].acquire()
                    pending.append(own.submit(priority, partial(self._fetch_claim, own, shard, claim, priority)))
                if len(claims) < len(planned) or not claims:
                    break  # nothing is missing, or there is no room
                done = Spans(claim.span for claim in claims)
                wanted = [span for span in wanted if done.find(*span) is None]
        if priority == READ:
            for future in pending:
                future.result()

    def _plan(
        self,
        shard: int,
        priority: int,
        wanted: list[Span],
        planned: list[Span],
        ready: list[Span],
        claimed: list[Span],
    ) -> list[Span]:
        """Return up to CLAIMS_AT_ONCE spans to fetch, also in `planned`, for the wanted ones that are neither ready nor claimed."""
        held = Spans(ready + claimed)
        missing = [span for span in wanted if held.find(*span) is None]
        if priority == READ:
            missing = [self._extent(shard, *span) for span in missing]
        planned[:] = coalesce(missing, *self._bounds(), held)[:CLAIMS_AT_ONCE]
        return planned

    def _bounds(self) -> tuple[float, float]:
        """Return the greatest gap that is fetched too, and the greatest size of what is fetched together, in bytes."""
        request_bytes = self._own.link.request_bytes
        low, high = _PIECE_BYTES
        return GAP_SHARE * request_bytes, min(max(8 * request_bytes, low), high, self.cache.max_bytes // 8)

    def _fetch_claim(self, own: _Process, shard: int, claim: Claim, priority: int) -> None:
        try:
            with suppress(OSError, UserError):  # the read repeats the request, and raises
                self._fetch(shard, claim)
        finally:
            own.under_way[priority].release()

    def _prefetch(self, own: _Process) -> None:
        while True:
            with own.lock:
                hints, own.hints, own.hinted_ranges = own.hints, [], 0
                own.prefetching = bool(hints)
                closings = own.closings
            if not hints:
                return
            with suppress(OSError, UserError):  # as above
                # Ranges of a shard that several batches want are fetched together.
                self._obtain(np.concatenate(hints), _PREFETCH, closings)

    def _request(self, shard: int, start: int, stop: int) -> bytes:
        """Return one range, with retries; if the server does not support ranges, from the whole file."""
        own, url = self._own, self.paths[shard]
        size = self.sizes[shard] if self.sizes is not None else None
        self._comparisons.check(shard, size, blocks_of_url(url), SOME)
        try:
            found = read_range(url, start, stop, size)
        except NoRangesError:
            if size is None:
                raise
            if (start, stop) == (0, size):
                return self._compared(shard, _whole(url, size))
            with own.whole:  # one at a time, since it is held in memory
                return self._fetch_one(shard, 0, size)[start:stop]
        with own.lock:
            own.counts.update(requests=1, retries=found.failures, bytes=len(found.content))
            own.link.observe(len(found.content), found.seconds)
        if len(found.content) < stop - start:
            end = start + len(found.content)
            raise OSError(f"{redacted(url)} ends at byte {end:,}; bytes {start:,} … {stop:,} were wanted")
        return self._compared(shard, found.content) if (start, stop) == (0, size) else found.content

    def _compared(self, shard: int, content: bytes) -> bytes:
        """Return the content of a whole shard after a comparison: a server without ranges sent no block before."""
        self._comparisons.check(
            shard, len(content), lambda ranges: [content[slice(*block)] for block in ranges], again=True
        )
        return content


def _whole(url: str, size: int) -> bytes:
    target = io.BytesIO()
    download(url, target, size)
    if target.tell() != size:
        raise RemoteError(url, f"it has {target.tell():,} bytes now, not {size:,}")
    return target.getvalue()
