"""Tables in a source; the kinds of Parquet files: DataComp's metadata, embeddings, or neither."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from tailwise.errors import UserError
from tailwise.shards.columns import DAMAGE, is_vectors
from tailwise.sources.clip_retrieval import find_partitions
from tailwise.sources.parquet_embeddings import choose_columns
from tailwise.sources.tar_files import expand

Kind = Literal["metadata", "embeddings", "unreadable", "other"]


def find_tables(source: str, suffix: str = ".parquet") -> list[Path]:
    """Return the files of a suffix in a local folder, file, glob or brace pattern, by name; without sidecars of tars.

    Of a folder, these are the files in it, or else those anywhere below. Hidden folders and clip-retrieval's layout are left out.
    """
    if "://" in source:
        return []
    path = Path(source).expanduser().absolute()
    if path.is_dir():
        beside = [item for item in path.glob(f"*{suffix}") if not _is_sidecar(item)]
        found = _in_folder(path, beside) or _in_folder(path, path.rglob(f"*{suffix}"))
    elif path.exists():
        found = [path]
    else:
        matches = {pattern: glob.glob(pattern) for pattern in expand(LocalFileSystem(), str(path))}  # noqa: PTH207  (Path globs are relative)
        missing = [pattern for pattern, names in matches.items() if not names and pattern.endswith(suffix)]
        if missing and len(missing) < len(matches):
            count = f"{len(missing):,} of {len(matches):,} files or patterns"
            raise UserError(f"{count} in {source!r} are missing, first {missing[0]}: restore them")
        found = [Path(name) for names in matches.values() for name in names]
    tables = sorted({item for item in found if item.suffix == suffix and item.is_file()}, key=str)
    return [item for item in tables if not _is_sidecar(item)]


def _is_sidecar(table: Path) -> bool:
    return table.with_suffix(".tar").exists()


def _in_folder(folder: Path, items: Iterable[Path]) -> list[Path]:
    tables: list[Path] = []
    laid_out: dict[Path, bool] = {}
    for item in items:
        inside = item.relative_to(folder).parts[:-1]
        if any(part.startswith(".") for part in inside):
            continue
        home = item.parent.parent if item.parent.name == "metadata" else item.parent
        if home not in laid_out:
            laid_out[home] = bool(find_partitions(home))
        if not laid_out[home]:
            tables.append(item)
    return tables


def kind_of(path: Path, id_column: str | None = None, embedding_column: str | None = None) -> Kind:
    """Return the kind of a Parquet file, by its columns.

    A column of vectors means embeddings; `uid` and `text`, without img2dataset's `key` or clip-retrieval's `image_path`, mean metadata. A
    column with a name of embeddings but another type means embeddings too; they are rejected because of that type when they are read.
    """
    try:
        schema = pq.read_schema(path)
        names = schema.names
    except DAMAGE:
        return "unreadable"
    columns = choose_columns(schema, id_column, embedding_column)
    metadata = {"uid", "text"} <= {*names} and not {*names} & {"key", "image_path"}
    if columns and (embedding_column or not metadata or is_vectors(schema.types[names.index(columns[1])])):
        return "embeddings"
    return "metadata" if metadata else "other"
