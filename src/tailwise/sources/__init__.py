"""Sources of an import: tars, metadata and embeddings in several layouts. `find` recognizes the layouts."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

from tailwise.catalog.kinds import check_name
from tailwise.errors import NotFoundError, UserError
from tailwise.requests import SourceRequest
from tailwise.shards.columns import DAMAGE, table_at
from tailwise.shards.containers import CONTAINERS, Container
from tailwise.shards.containers import WEBDATASET as WEBDATASET
from tailwise.shards.containers import container_of as container_of
from tailwise.shards.members import MemberChoice
from tailwise.shards.metadata import metadata_columns
from tailwise.shards.parquet_images import has_images
from tailwise.sources.clip_retrieval import FOLDERS, ClusterIds, find_cluster_ids, find_partitions
from tailwise.sources.datacomp import EMBEDDINGS, MEMBERS, MetadataEmbeddings
from tailwise.sources.embedding_files import EmbeddingFile
from tailwise.sources.parquet_embeddings import Kind, ParquetEmbeddings, kind_of
from tailwise.sources.tar_files import UNKNOWN_BYTES as UNKNOWN_BYTES
from tailwise.sources.tar_files import LeftOut, NamedTars, find_folders, find_remote_tables, find_tables, find_tars
from tailwise.storage.errors import RemoteError
from tailwise.storage.ranged_file import FolderFile
from tailwise.storage.remote import forget_failures, is_remote
from tailwise.text import did_you_mean, is_unicode


@dataclass
class Found(NamedTars):
    """Content of the sources of one import: its tars, without duplicates, in the order of the sources, and all other files."""

    metadata: dict[str, int] = field(default_factory=dict)  # path and size of each of DataComp's metadata files
    urls: dict[str, int] = field(default_factory=dict)  # path and size of each list of URLs and captions
    embeddings: dict[str, list[EmbeddingFile]] = field(default_factory=dict)  # files by name of their column
    cluster_ids: list[ClusterIds] = field(default_factory=list)
    # by source, see `tables`
    _tables: dict[str, dict[Path, tuple[Kind, tuple[str, str] | None]]] = field(default_factory=dict, compare=False)

    @property
    def notes(self) -> list[str]:
        """One line for each reason why files are left out, with their number and the first file."""
        by_reason: dict[str, list[LeftOut]] = {}
        for item in self.left_out:
            by_reason.setdefault(item.reason, []).append(item)
        return [
            f"not imported: {len(items):,} × {reason}, first {items[0].path} ({items[0].remedy})"
            for reason, items in by_reason.items()
        ]

    def tables(self, source: str, options: SourceRequest) -> dict[Path, tuple[Kind, tuple[str, str] | None]]:
        """Return kind and columns (see `kind_of`) of the local tables that a source names; each is looked at once."""
        if source not in self._tables:
            self._tables[source] = {path: kind_of(path, options) for path in find_tables(source)}
        return self._tables[source]

    def merge(self, named: NamedTars) -> bool:
        """Add tars, without duplicates; return whether there are some."""
        self.tars |= named.tars
        self.failed |= named.failed
        self.left_out += [item for item in named.left_out if item not in self.left_out]
        return bool(named.tars)

    def add_embeddings(self, column: str, files: Iterable[EmbeddingFile]) -> None:
        """Add files of embeddings, without duplicates."""
        there = self.embeddings.setdefault(column, [])
        known = {(file.path, file.fingerprint) for file in there}
        there += [file for file in files if (file.path, file.fingerprint) not in known]


def _find_tars(source: str, found: Found, _: SourceRequest) -> bool:
    return found.merge(find_tars(source))


def _embedding_folders(source: str) -> list[Path]:
    """Return a local folder if it has clip-retrieval's layout; else all such folders below it, without hidden ones."""
    if "://" in source:
        return []
    folder = Path(source).expanduser().absolute()
    if any((folder / name).is_dir() for name in FOLDERS.values()) or not folder.is_dir():
        return [folder]
    below = {path.parent for name in FOLDERS.values() for path in folder.rglob(name) if path.is_dir()}
    return sorted(path for path in below if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _find_clip_retrieval(source: str, found: Found, _: SourceRequest) -> bool:
    columns = [item for folder in _embedding_folders(source) for item in find_partitions(folder).items()]
    for column, partitions in columns:
        found.add_embeddings(column, partitions)
    return bool(columns)


def _find_dynamics(source: str, found: Found, options: SourceRequest) -> bool:
    ids = [item for folder in _embedding_folders(source) for item in find_cluster_ids(folder)]
    found.cluster_ids += [item for item in ids if item not in found.cluster_ids]
    return _find_clip_retrieval(source, found, options) or bool(ids)


def _find_datacomp(source: str, found: Found, options: SourceRequest) -> bool:
    named = f"{source.removesuffix('.npz')}.parquet" if source.endswith(".npz") else source
    kinds = {path: kind for path, (kind, _) in found.tables(named, options).items()}
    if "metadata" not in kinds.values():
        return False
    tables = [path for path, kind in kinds.items() if kind in {"metadata", "unreadable"}]
    for path in tables:
        found.metadata.setdefault(str(path), path.stat().st_size)
    if any(path.with_suffix(".npz").exists() for path in tables):  # else they were not downloaded
        names = {column: f"{options.embedding or EMBEDDINGS[0]}_{member}" for column, member in MEMBERS.items()}
        there = _arrays_of([path.with_suffix(".npz") for path in tables], set(names.values()))
        for column, name in names.items():
            if not there or name in there:  # where none is there, the join names what is wrong
                files = [MetadataEmbeddings(path.with_suffix(".npz"), path, name) for path in tables]
                found.add_embeddings(column, files)
    return True


UNREADABLE = "unreadable Parquet file"
_UNUSED: dict[Kind, tuple[str, str]] = {
    "unreadable": (UNREADABLE, "fetch it again"),
    "other": (
        "Parquet file of no known format",
        "name its columns with `image` and `caption`, or with `id_column` and `embedding_column`",
    ),
}


def _find_urls(source: str, found: Found, options: SourceRequest) -> bool:
    """Find lists of URLs; of a remote source, also DataComp's metadata."""
    if is_remote(source) and found.tars:  # a list beside them is not used
        return False
    named = _find_kind(source, found, "urls", options, _is_metadata)
    found.urls |= named.tars
    found.merge(NamedTars({}, named.failed, named.left_out))
    return bool(named.tars)


def _find_kind(source: str, found: Found, kind: Kind, options: SourceRequest, has: Callable[[str], bool]) -> NamedTars:
    """Return the tables of a kind; of remote ones, the first speaks for all, because a look at each is a request."""
    if not is_remote(source):
        kinds = {path: of for path, (of, _) in found.tables(source, options).items()}
        listed = {"metadata", "embeddings"} & {*kinds.values()}  # with the unreadable ones
        named = NamedTars()
        for path, of in kinds.items():
            if of == kind or not is_unicode(str(path)):  # Arrow cannot read these
                named.add(str(path), path.stat().st_size)
            elif of in _UNUSED and not listed:
                named.left_out.append(LeftOut(str(path), *_UNUSED[of]))
        return named
    named = find_remote_tables(source)
    return named if any(map(has, islice(named.tars, 1))) else NamedTars()


def _is_metadata(path: str) -> bool:
    with suppress(*DAMAGE), table_at(path) as file:
        return metadata_columns(file.schema_arrow.names) is not None
    return False


def _arrays_of(paths: list[Path], wanted: set[str]) -> set[str]:
    """Return which of the wanted arrays are in one of the `.npz` files at least."""
    there = set[str]()
    for path in paths:
        with suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            there |= wanted & {name.removesuffix(".npy") for name in archive.namelist()}
        if there == wanted:
            break
    return there


def _find_images(source: str, found: Found, options: SourceRequest) -> bool:
    choice = MemberChoice.given(options.image, options.caption)
    return found.merge(_find_kind(source, found, "images", options, partial(has_images, choice=choice)))


def _find_files(source: str, found: Found, options: SourceRequest) -> bool:
    if is_remote(source) or not (folder := Path(source).expanduser().absolute()).is_dir():
        return False
    named = NamedTars()
    for path in find_folders(folder, MemberChoice.given(options.image, options.caption)):
        named.add(path, FolderFile(path).size_bytes)
    return found.merge(named)


def _find_parquet(source: str, found: Found, options: SourceRequest) -> bool:
    tables = found.tables(source, options)
    columns = {path: named for path, (_, named) in tables.items() if named is not None}
    if not columns:
        return False
    kinds = {path: kind for path, (kind, _) in tables.items()}
    unreadable = [] if "metadata" in kinds.values() else [path for path, kind in kinds.items() if kind == "unreadable"]
    usual = next(iter(columns.values()))  # for unreadable files, which the join lists
    paths = sorted([*columns, *unreadable], key=str)
    found.add_embeddings(
        options.column or "image", [ParquetEmbeddings(path, *columns.get(path, usual)) for path in paths]
    )
    return True


@dataclass(frozen=True)
class Format:
    """One kind of source."""

    find: Callable[[str, Found, SourceRequest], bool]  # adds files of this kind to Found; True if there are some
    given: str  # the sources that the user may name


def format_of(container: Container) -> Format:
    """Return the format of a container whose files are known by their names alone, and are local."""

    def find_files(source: str, found: Found, _: SourceRequest) -> bool:
        return found.merge(
            NamedTars({str(path): path.stat().st_size for path in find_tables(source, container.suffix)})
        )

    return Format(find_files, f"a local folder, file or pattern of {container.suffix} files")


SOURCES: dict[str, Format] = {
    "webdataset": Format(
        _find_tars, "a folder, file, glob, {brace..pattern} or ::-joined list of .tar files; local or any fsspec URL"
    ),
    "parquet-images": Format(
        _find_images,
        "a folder, file, glob or brace pattern of .parquet files with images and captions; local or any fsspec URL",
    ),
    "files": Format(
        _find_files, "a local folder of images and captions, files of one name (1.jpg, 1.txt), or of such folders"
    ),
    "clip-retrieval": Format(_find_clip_retrieval, "a local folder with img_emb/ or text_emb/, and metadata/"),
    "dynamics": Format(_find_dynamics, "a local folder as clip-retrieval's, with img_emb/img_emb_{p}_indices.npy"),
    "datacomp": Format(
        _find_datacomp, "a local folder, file or pattern of .parquet files with uid and text, .npz files beside them"
    ),
    "urls": Format(
        _find_urls,
        "a folder, file or pattern of .parquet files with URL and TEXT (LAION), or url and caption (img2dataset); local or any fsspec URL",
    ),
    "parquet": Format(
        _find_parquet,
        "a local folder, file or pattern of .parquet files with an id column and a column of lists of floats",
    ),
}
SOURCES |= {name: format_of(container) for name, container in CONTAINERS.items() if name not in SOURCES}


def find(sources: Sequence[str], format_name: str = "auto", options: SourceRequest | None = None) -> Found:
    """Return the content of the sources of an import: folders, files, patterns or URLs.

    `format_name` is a name of SOURCES, or "auto" to try all. It is a UserError if the format is unknown, a source has no file of it, no
    tar can be read, or an option does nothing.
    """
    forget_failures()
    chosen = options or SourceRequest()
    if format_name != "auto" and format_name not in SOURCES:
        raise UserError(f"unknown format {format_name!r}: {did_you_mean(format_name, ('auto', *SOURCES))}")
    if chosen.embedding is not None and chosen.embedding not in EMBEDDINGS:
        raise UserError(f"`embedding` {chosen.embedding!r}: use {' or '.join(EMBEDDINGS)}")
    for name in (chosen.clustering, chosen.column):
        if name is not None:
            check_name(name)
    tried = list(SOURCES) if format_name == "auto" else [format_name]
    found = Found()
    for source in sources:
        try:
            finds = [SOURCES[name].find(source, found, chosen) for name in tried]
        except (ValueError, RemoteError) as error:  # unbalanced braces; unknown protocol or unreachable server
            raise UserError(f"can't look into {source!r}: {error}") from error
        if not any(finds) and is_plain_path(source) and not Path(source).exists():
            raise NotFoundError(f"{source!r} does not exist")
        if not any(finds):
            expected = "; ".join(found.notes or [f"{name}: {SOURCES[name].given}" for name in tried])
            raise UserError(f"nothing to import in {source!r} ({expected})")
    if found.failed and found.failed.keys() == found.tars.keys():
        first, cause = next(iter(found.failed.items()))
        others = f" (and {len(found.failed) - 1:,} more)" if len(found.failed) > 1 else ""
        raise UserError(f"can't read {first}{others}: {cause}")
    _refuse_idle(found, chosen)
    if found.tars or found.metadata:
        why, remedy = "list of URLs beside samples that are there", "import it alone to make a pool of it"
        found.left_out += [LeftOut(path, why, remedy) for path in found.urls]
    else:
        found.metadata = found.urls
    return found


def is_plain_path(source: str) -> bool:
    """Return whether a source is one local path, and not a URL, a list or a pattern."""
    return not any(mark in source for mark in ("://", "::", "{", "*", "?", "["))


def _refuse_idle(found: Found, options: SourceRequest) -> None:
    """Refuse options that do nothing with the files that were found."""
    files = [file for column in found.embeddings.values() for file in column]
    npz = "DataComp's .npz files", any(isinstance(file, MetadataEmbeddings) for file in files)
    parquet = "Parquet embeddings", any(isinstance(file, ParquetEmbeddings) for file in files)
    needs = {"embedding": npz, "clustering": ("DynamiCS's cluster ids", bool(found.cluster_ids))}
    needs |= dict.fromkeys(("image", "caption"), ("tars or Parquet files with images", bool(found.tars)))
    needs |= dict.fromkeys(("id_column", "embedding_column", "column", "of"), parquet)
    for name, (what, there) in needs.items():
        if (value := getattr(options, name)) is not None and not there:
            raise UserError(f"`{name}` {value} does nothing: no source holds {what}")
