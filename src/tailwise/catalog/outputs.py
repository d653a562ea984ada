"""Where commands may write. A catalog, a tar of its pool, and files that are not ours are never written over, also not through links.

An output that exists is compared with the one that a command writes: where both have the same bytes, the command was repeated, and is done.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tailwise.catalog.catalog import Catalog
from tailwise.catalog.files import file_digest, read_array
from tailwise.catalog.layout import HEADER
from tailwise.errors import ConflictError, NotFoundError, UserError
from tailwise.storage.local import TEMPORARY_SUFFIX, replacing, scratch
from tailwise.text import spreadsheet_cell

logger = logging.getLogger(__name__)


def _check_output(path: Path, catalog: Catalog | None, is_ours: Callable[[Path], bool]) -> bool:
    """Return True if an output exists, and is in the format that is written, or empty; see `writing_output`."""
    _refuse_catalog(path)
    if path.is_symlink():
        raise ConflictError(f"{path} is a link, which is no regular file: name the file itself")
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file")
    if not path.exists():
        if not path.absolute().parent.is_dir():
            raise NotFoundError(f"the folder {path.absolute().parent} doesn't exist: make it first")
        return False
    if not path.is_file():
        raise UserError(f"{path} is no regular file: name another one")
    if catalog is not None and any(os.path.samestat(path.stat(), shard) for shard in _local_shards(catalog)):
        raise UserError(f"{path} is a shard of the pool of {catalog.folder}: name another file")
    if path.stat().st_size and not is_ours(path):
        raise ConflictError(f"{path} exists and is not a file of this format: name another file, or delete it first")
    return True


def _publish_new(temporary: Path, path: Path) -> None:
    """Give a file its name; keep a file of this name with the same bytes, and refuse one with others."""
    if not path.exists():
        temporary.replace(path)
    elif file_digest(path) == file_digest(temporary):
        temporary.unlink()
        logger.info("%s: done already", path)
    else:
        raise ConflictError(f"{path} exists: name another file, or replace it with `overwrite`")


@contextmanager
def writing_output(
    path: Path,
    catalog: Catalog | None,
    *,
    overwrite: bool,
    is_ours: Callable[[Path], bool],
    guard: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[Path]:
    """Yield a temporary path; publish it as `replacing` does, and keep other commands from writing the same output meanwhile.

    The temporary file is the lock: a killed command leaves it behind unlocked, and the next one takes it over.

    Args:
        path: of the output.
        catalog: whose shards are protected; None without a catalog.
        overwrite: whether an existing file may be replaced; one with the same bytes as the new file is no mistake without it.
        is_ours: returns True for an existing file in the format that is written.
        guard: as in `replacing`.

    Raises:
        UserError: the path is a link, a folder or no regular file; it is in a catalog; it is a shard of the pool, in whatever
            spelling; its folder is missing.
        ConflictError: another command is writing this file; it exists, and is not to be replaced or not in this format.
    """
    if _check_output(path, catalog, is_ours) and not overwrite:
        logger.info("%s exists: it is compared with what this command writes", path)
    temporary = path.with_name(f"{path.name}{TEMPORARY_SUFFIX}")
    while True:
        with temporary.open("ab") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConflictError(
                    f"another command is writing {path}: wait for it to end, or name another file"
                ) from error
            if not _is_still(temporary, stream):
                continue  # it was published between being opened and being locked
            try:
                with replacing(path, guard=guard, publish=Path.replace if overwrite else _publish_new):
                    yield temporary
            finally:
                if _is_still(temporary, stream):
                    temporary.unlink()
            return


def scratch_beside(output: Path) -> AbstractContextManager[Path]:
    """Return an empty folder for intermediate files beside an output; see `scratch`."""
    return scratch(output.absolute().with_name(f".{output.name}{TEMPORARY_SUFFIX}"))


def _is_still(path: Path, stream: IO[bytes]) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    return False


def check_output_folder(folder: Path, option: str, marks: Collection[str] | None = None) -> Path:
    """Return `folder`, if a command may write its files there.

    Args:
        folder: may exist.
        option: that named it, for errors.
        marks: patterns of names, one of which shows that the folder is an earlier output; None if any folder will do.

    Raises:
        UserError: it is a URL, a file or a dangling link; it is in a catalog; it holds other files.
    """
    _refuse_catalog(folder)
    if re.fullmatch(r"[a-z][a-z0-9+.-]+:", folder.parts[0] if folder.parts else "") and not folder.exists():
        raise UserError(f"{option} {folder}: must be a folder of this machine, not a URL")
    if folder.is_dir():
        # A killed process leaves temporary files.
        found = any(not path.name.endswith(TEMPORARY_SUFFIX) for path in folder.iterdir())
        if marks is not None and found and not any(any(folder.glob(mark)) for mark in marks):
            raise ConflictError(f"{folder} holds something else: give {option} a new or an empty folder")
    elif folder.exists() or folder.is_symlink():
        raise UserError(f"{folder} is no folder: give {option} another name")
    return folder


def _refuse_catalog(path: Path) -> None:
    """Refuse a path that leads into a catalog, by itself or by the links on its way.

    Raises:
        UserError: it does.
    """
    try:
        real = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links that lead in a circle, NUL in the name
        raise UserError(f"{path} can't be written to: {error}") from error
    for folder in (real, *real.parents, path.absolute(), *path.absolute().parents):
        if (folder / HEADER).exists():
            raise ConflictError(f"{path} is in the catalog {folder}: name a place outside of it")


def _local_shards(catalog: Catalog) -> Iterator[os.stat_result]:
    """Yield what the file system says of each local file of the pool."""
    for path in catalog.shards().column("path").to_pylist():
        if "://" not in path:
            with suppress(OSError):  # moved or deleted: nothing to protect
                yield Path(path).stat()


def for_spreadsheets(table: pa.Table) -> pa.Table:
    """Return the table with its text made safe by `spreadsheet_cell`, for a CSV file."""
    for at, field in enumerate(table.schema):
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            cells = [None if value is None else spreadsheet_cell(value) for value in table.column(at).to_pylist()]
            table = table.set_column(at, field.name, pa.array(cells, field.type))
    return table


# --- formats ------------------------------------------------------------------------------------------------------------


def is_table(schema: pa.Schema) -> Callable[[Path], bool]:
    """Return a check for Parquet files with the columns of `schema`."""
    return partial(_passes, lambda path: pq.read_schema(path).names == schema.names)


def is_array(dtype: np.dtype[Any]) -> Callable[[Path], bool]:
    """Return a check for `.npy` files of a type."""
    return partial(_passes, lambda path: read_array(path).dtype == dtype)


def is_text(start: str) -> Callable[[Path], bool]:
    """Return a check for text files that begin so."""
    return partial(_passes, lambda path: _head(path).startswith(start.encode()) and b"\0" not in _head(path))


def is_png(path: Path) -> bool:
    """Return True for PNG files."""
    return _passes(lambda path: _head(path).startswith(b"\x89PNG"), path)


def _head(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(1 << 16)


def _passes(check: Callable[[Path], bool], path: Path) -> bool:
    with suppress(OSError, ValueError, EOFError, pa.ArrowException):
        return bool(check(path))
    return False
