"""Files that are either whole or absent (temporary name, fsync, rename), scratch folders, and locks."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

from tailwise.errors import ConflictError, UnsupportedError, UserError
from tailwise.storage.lease import leased
from tailwise.storage.store_path import cache_folder, is_stored, stored

TEMPORARY_SUFFIX = ".writing"  # of a file until it is complete
FULL = (errno.ENOSPC, errno.EDQUOT)
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
_own_part = ""  # of the names of this process's temporary files
_in_part = False  # True while this process is one of several parts of a run


def distinguish_temporary_files(own: str) -> None:
    """Give all temporary files of this process names of its own: its node may be taken for lost, and another process repeat its work.

    What such a process leaves behind is not overwritten by the next one: see `remove_temporary_files`.
    """
    global _own_part  # noqa: PLW0603  (a process has one name)
    _own_part = f".{own}"


def begin_part() -> None:
    """Work beside other processes that run parts of the same command: share locks with them, and leave their temporary files alone."""
    global _in_part  # noqa: PLW0603  (as above)
    _in_part = True
    distinguish_temporary_files(uuid.uuid4().hex)


def end_part() -> None:
    """Work alone again."""
    global _in_part, _own_part
    _in_part, _own_part = False, ""


def in_part() -> bool:
    """Return True if this process is one of several parts of a run."""
    return _in_part


def remove_temporary_files(folder: Path, pattern: str = "*") -> None:
    """Remove what killed writers have left in a folder: temporary files of files whose names match. The caller holds its lock."""
    if is_stored(folder):
        return  # uploads leave none
    for path in () if _in_part else folder.glob(f"{pattern}{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


@contextmanager
def replacing(
    path: Path,
    *,
    unique: bool = False,
    guard: Callable[[], AbstractContextManager[None]] = nullcontext,
    publish: Callable[[Path, Path], object] = Path.replace,
) -> Iterator[Path]:
    """Yield a temporary path beside `path`; after success, flush it to disk and `publish` it as `path`; after an error, delete it.

    A `unique` name is of this process alone, where no lock excludes other writers (see also `distinguish_temporary_files`). `guard` is
    entered while the file is renamed: an error of it leaves the old file in place.
    """
    if (place := stored(path)) is not None:
        temporary = place.store.new_copy()
        try:
            yield temporary
            with guard():
                place.upload(temporary)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            name_full_disk(error, temporary)
            raise
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    own = f".{uuid.uuid4().hex}" if unique else _own_part
    temporary = path.with_name(f"{path.name}{own}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        flush(temporary)
        with guard():
            publish(temporary, path)
        flush(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        name_full_disk(error, path)
        raise


def in_place(path: Path) -> AbstractContextManager[Path]:
    """Yield the path to which a file of a scratch folder is written: itself; a temporary one, for an object store."""
    return replacing(path) if is_stored(path) else nullcontext(path)


def put_if_absent(path: Path, content: bytes) -> bool:
    """Write a file where there is none, and return True; return False where there is one. Of several writers, one wins.

    The file gets its name by a hard link, which fails where the name is taken; on a file system without hard links, under a lock.
    """
    if (place := stored(path)) is not None:
        return place.store.put_if_absent(place.key, content)
    try:
        with replacing(path, unique=True, publish=_link) as temporary:
            temporary.write_bytes(content)
    except FileExistsError:
        return False
    return True


def _link(temporary: Path, path: Path) -> None:
    try:
        path.hardlink_to(temporary)
    except OSError as error:
        # NFS may have sent the request twice, as the first answer was lost.
        if error.errno == errno.EEXIST and path.samefile(temporary):
            temporary.unlink()
            return
        if error.errno not in NO_LINKS:
            raise
        with folder_locked(path.parent):
            if path.exists():
                raise FileExistsError(path) from error
            temporary.replace(path)
    else:
        temporary.unlink()


@contextmanager
def scratch(folder: Path, *, own: bool = False) -> Iterator[Path]:
    """Yield an empty folder for intermediate files; delete what an earlier process left in it before, and the folder afterwards.

    With `own`, only this process uses the files, so that they need not be in an object store, where `folder` may be.

    Raises:
        UserError: this process is one of several parts, which would all use this folder.
    """
    if _in_part:
        raise UserError("`part`: this step keeps intermediate files, of one process alone: run it without `part`")
    if own and is_stored(folder):
        cache = cache_folder()
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f"{os.getpid()}-", dir=cache) as made:
            yield Path(made)
        return
    remove_folder(folder)
    folder.mkdir(parents=True)
    try:
        yield folder
    except OSError as error:
        name_full_disk(error, folder)
        raise
    finally:
        remove_folder(folder)


def remove_folder(folder: Path) -> None:
    """Delete a folder with all that is in it, if it is there and can be deleted."""
    if (place := stored(folder)) is not None:
        place.remove()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def name_full_disk(error: BaseException, path: Path) -> None:
    """Raise an error that names the file, if `error` is that of a full disk and names none."""
    full = isinstance(error, OSError) and (error.errno in FULL or "requested and" in str(error))  # NumPy's words for it
    if full and getattr(error, "filename", None) is None:
        raise OSError(
            errno.ENOSPC, "no space left on the disk: make room, then repeat this command", str(path)
        ) from error


def flush(path: Path) -> None:
    """Write a file, or the names in a folder, to the disk; in an object store, they are safe already."""
    if is_stored(path):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path, what: str, *, wait: bool = False, shared: bool = False) -> Iterator[None]:
    """Hold the lock file `path`, alone or shared with others; the operating system releases it when the process ends.

    If another process holds it, wait, or raise a ConflictError that says what is locked (`what`). Parts of a run share a lock that they do
    not wait for (see `begin_part`). In an object store, a lock is held alone. An UnsupportedError says that there are no such locks.
    """
    if (place := stored(path)) is not None:
        if _in_part and not wait:
            raise UnsupportedError(f"`part` needs a catalog on a file system, and {path.parent} is in an object store")
        with leased(place, what, wait=wait):
            yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    shared = shared or (_in_part and not wait)
    # NFS shares a lock of files that are open for reading only, and gives others to writers.
    with path.open("a+") as stream:
        try:
            fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise ConflictError(
                f"another process is writing {what}: wait for it to end, then repeat this command"
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            raise UnsupportedError(
                f"the file system of {path} has no locks (flock: {error.strerror}): mount it with them (Lustre: -o flock), or "
                "use another one"
            ) from error
        try:
            yield
        finally:  # closing is not enough: a process forked meanwhile holds the file open, and with it the lock
            fcntl.flock(stream, fcntl.LOCK_UN)


@contextmanager
def folder_locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which leaves no file; wait until the process that holds it releases it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)
