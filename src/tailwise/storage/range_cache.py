"""Fetched ranges on disk, shared by all processes of a machine, bounded in bytes.

    FOLDER/lock                        held briefly; its 8 bytes are the sum of the sizes of all ranges and claims
    FOLDER/ranges/KEY/START-STOP       a complete range of one object
    FOLDER/ranges/KEY/START-STOP.claim a range that is being fetched; the process holds an flock on it, so that its death is noticed

The sum is raised before a claim is made and lowered after a file is deleted. If a process is killed in between, the sum is too high,
never too low, until the next eviction counts again.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tailwise.errors import UserError
from tailwise.storage.pread import OpenFile
from tailwise.storage.spans import Span

CLAIM = ".claim"
EVICT_SHARE = 0.1  # share of the cache that is evicted at once, so that the folder is seldom listed


@dataclass
class Claim:
    """A range that this process fetches; it must `commit` or `abandon` the claim."""

    path: Path
    span: Span  # of the object
    handle: int  # of the file, open for writing and locked


def _span(name: str) -> Span:
    start, stop = name.removesuffix(CLAIM).split("-")
    return int(start), int(stop)


def _is_dead(path: Path) -> bool:
    """Return whether the process that made a claim has ended."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False  # committed meanwhile
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


class RangeCache:
    """Ranges of objects as files: each is fetched by one process and used by all; the least recently used are evicted."""

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        """Make the folder, of this cache alone and on a local disk (because of `flock`); a UserError if it cannot be written to.

        `max_bytes` is the bound of the sizes of all ranges and claims together.
        """
        if max_bytes <= 0:
            raise UserError(f"a cache of {max_bytes:,} bytes holds nothing: give it at least 1 GB")
        self.folder = Path(folder).expanduser().absolute()
        self.max_bytes = max_bytes
        self.evictions = 0  # by this process
        try:
            with self._locked():
                pass
        except OSError as error:
            raise UserError(
                f"can't write to the cache folder {self.folder} ({error.strerror or error}): name another"
            ) from error

    def path(self, key: str, span: Span) -> Path:
        """Return the file of a range."""
        return self.folder / "ranges" / key / f"{span[0]}-{span[1]}"

    def open(self, key: str, span: Span) -> OpenFile | None:
        """Return a range, opened for reading at offset − span[0], or None if it is gone. It can be read even after its eviction."""
        path = self.path(key, span)
        try:
            file = OpenFile(path)
        except FileNotFoundError:
            return None
        if os.fstat(file.handle).st_size != span[1] - span[0]:  # the machine lost power before the content was on disk
            path.unlink(missing_ok=True)
            return None
        return file

    def ready(self, key: str) -> list[Span]:
        """Return the spans of an object that can be opened."""
        try:
            names = os.listdir(self.folder / "ranges" / key)  # noqa: PTH208  (names are all it takes)
        except FileNotFoundError:
            return []
        return [_span(name) for name in names if not name.endswith(CLAIM)]

    def claim(self, key: str, plan: Callable[[list[Span], list[Span]], list[Span]]) -> list[Claim]:
        """Return a claim for each span of an object that a plan asks for, as long as there is room; other processes wait meanwhile.

        The plan gets the spans that can be opened, and those that a process is fetching.
        """
        with self._locked() as ledger:
            folder = self.folder / "ranges" / key
            folder.mkdir(parents=True, exist_ok=True)
            claims: list[Claim] = []
            try:
                for span in plan(*self._state(folder, ledger)):
                    if not self._reserve(span[1] - span[0], ledger):
                        break
                    path = self.path(key, span)
                    path = path.with_name(path.name + CLAIM)
                    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
                    fcntl.flock(handle, fcntl.LOCK_EX)
                    claims.append(Claim(path, span, handle))
            except BaseException:
                for claim in claims:
                    self._give_up(claim, ledger)
                raise
            return claims

    def commit(self, claim: Claim, content: bytes) -> None:
        """Make a fetched range visible to all; abandon the claim and raise an OSError if it cannot be written."""
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(claim.handle, view) :]
            with self._locked():
                claim.path.rename(claim.path.with_suffix(""))
        except OSError:
            self.abandon(claim)
            raise
        self._let_go(claim)

    def abandon(self, claim: Claim) -> None:
        """Give up a claim; processes that wait for it look again."""
        with self._locked() as ledger:
            self._give_up(claim, ledger)

    def _give_up(self, claim: Claim, ledger: int) -> None:
        try:
            claim.path.unlink(missing_ok=True)
            _add(ledger, claim.span[0] - claim.span[1])
        finally:
            self._let_go(claim)

    def wait(self, key: str, span: Span) -> None:
        """Return when no process is fetching this range."""
        path = self.path(key, span)
        with suppress(FileNotFoundError), path.with_name(path.name + CLAIM).open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH)

    @staticmethod
    def _let_go(claim: Claim) -> None:
        fcntl.flock(claim.handle, fcntl.LOCK_UN)  # a forked process may have the descriptor too
        os.close(claim.handle)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Exclude all other processes and threads; yield the descriptor of the sum."""
        path = self.folder / "lock"
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            handle = os.open(path, flags, 0o644)
        except FileNotFoundError:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, flags, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
            fcntl.flock(handle, fcntl.LOCK_UN)
        finally:
            os.close(handle)

    def _state(self, folder: Path, ledger: int) -> tuple[list[Span], list[Span]]:
        ready, claimed = list[Span](), list[Span]()
        for name in os.listdir(folder):  # noqa: PTH208
            span = _span(name)
            if not name.endswith(CLAIM):
                ready.append(span)
            elif _is_dead(folder / name):
                (folder / name).unlink()
                _add(ledger, span[0] - span[1])
            else:
                claimed.append(span)
        return ready, claimed

    def _reserve(self, size_bytes: int, ledger: int) -> bool:
        total = _total(ledger)
        if total is None or total + size_bytes > self.max_bytes:
            slack = int(EVICT_SHARE * self.max_bytes)
            total = self._evict(self.max_bytes - size_bytes - slack)
        fits = total + size_bytes <= self.max_bytes
        _set(ledger, total + size_bytes if fits else total)
        return fits

    def _evict(self, target_bytes: int) -> int:
        """Delete the least recently used ranges until `target_bytes` are left, if possible; return the bytes that are left."""
        total, files = 0, []
        for entry in (file for folder in os.scandir(self.folder / "ranges") for file in os.scandir(folder.path)):
            span = _span(entry.name)
            if not entry.name.endswith(CLAIM):
                status = entry.stat()
                files.append((status.st_mtime_ns, status.st_size, entry.path))
                total += status.st_size
            elif _is_dead(Path(entry.path)):
                Path(entry.path).unlink()
            else:
                total += span[1] - span[0]
        for _, size_bytes, path in sorted(files):
            if total <= target_bytes:
                break
            Path(path).unlink(missing_ok=True)
            total -= size_bytes
            self.evictions += 1
        return total


def _total(ledger: int) -> int | None:
    """Return the sum; None if none has been written."""
    content = os.pread(ledger, 9, 0)
    return int.from_bytes(content, "little") if len(content) == 8 else None


def _set(ledger: int, total: int) -> None:
    os.pwrite(ledger, max(total, 0).to_bytes(8, "little"), 0)


def _add(ledger: int, size_bytes: int) -> None:
    total = _total(ledger)
    if total is not None:
        _set(ledger, total + size_bytes)
