"""Containers: the kinds of files that hold samples, in one table, through which all other packages read them.

A container with bytes is a file in which each encoded image and each caption is one range of bytes, or that is read as if (a Parquet
file with images). So the stores (`ranges.py`), the fingerprint (`fingerprint.py`), the checks (`verify.py`) and the decoder
(`decode.py`) serve all containers; a row says what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import pyarrow as pa

from tailwise.catalog.catalog import REPLACED_BY
from tailwise.catalog.schema import PARQUET
from tailwise.errors import UnsupportedError
from tailwise.shards.columns import count_rows
from tailwise.shards.content import Pairs, ShardContent
from tailwise.shards.grouping import DEFAULT
from tailwise.shards.members import MemberChoice
from tailwise.shards.metadata import read_metadata
from tailwise.shards.parquet_images import checksum_images, has_images, read_image_pairs, read_images
from tailwise.shards.webdataset import checksum_shard, read_pairs, read_shard


@dataclass(frozen=True)
class Container:
    """One kind of file that holds samples. Functions take a path or URL."""

    suffix: str  # end of the names of such files
    has_bytes: bool  # whether the images and captions of its samples can be read from the file
    # a file that cannot be read gives no samples, and a reason; of files with bytes, a MemberChoice may follow the path
    index: Callable[..., ShardContent]
    checksum: Callable[[str], tuple[int, str]]  # size in bytes and index checksum, as `index` notes them
    pairs: Callable[
        [str, Sequence[str]], Pairs
    ]  # … and names of targets → image and targets of each sample, for evaluation
    indexing: str  # title of the progress of an import
    needed: str  # values without which a sample is not imported


def no_bytes(paths: Sequence[str], samples: int, which: str = "", instead: str = "") -> UnsupportedError:
    """Return the error for a number of samples in files without bytes; `which` images to download, and what to do `instead`."""
    return UnsupportedError(
        f"{samples:,} samples in {len(paths):,} file(s) of metadata have no images, the first file is {paths[0]}: download the images"
        f"{which}, and import them into a new catalog{instead}"
    )


def _refuse(path: str, *_: object) -> NoReturn:
    raise no_bytes([path], count_rows(path))


WEBDATASET = Container(".tar", True, read_shard, checksum_shard, read_pairs, "indexing tars", "image and caption")
IMAGES = Container(
    *(".parquet", True, read_images, checksum_images, read_image_pairs, "reading Parquet files", "image and caption")
)
FOLDER = Container("/", True, read_shard, checksum_shard, read_pairs, "indexing folders", "image and caption")
METADATA = Container(".parquet", False, read_metadata, _refuse, _refuse, "reading metadata", "uid or URL, and caption")
# By name of their format. A container that has no row in `tailwise.sources.SOURCES` is found by its suffix, on this machine.
CONTAINERS: dict[str, Container] = {
    "webdataset": WEBDATASET,
    "parquet-images": IMAGES,
    "files": FOLDER,
    "datacomp": METADATA,
}


def container_of(path: str, choice: MemberChoice = DEFAULT) -> Container:
    """Return the container of a file that is not in a catalog, by its name, and its columns; tars may have any name."""
    return container_named(path, images=path.endswith(IMAGES.suffix) and has_images(path, choice))


def container_named(path: str, *, images: bool) -> Container:
    """Return the container of a file by its name alone; of two with one suffix, the one with or without images."""
    named = [container for container in CONTAINERS.values() if path.endswith(container.suffix)]
    return next((container for container in named if container.has_bytes is images), (named or [WEBDATASET])[0])


def containers_of(shards: pa.Table) -> list[Container]:
    """Return the container of each shard, by what the catalog notes of it (SHARD_SCHEMA)."""
    images = shards[PARQUET].is_valid().to_pylist()
    paths = [path.partition(REPLACED_BY)[0] for path in shards["path"].to_pylist()]
    return [container_named(path, images=has) for path, has in zip(paths, images, strict=True)]


def index_shard(path: str, choice: MemberChoice = DEFAULT) -> ShardContent:
    """Return the samples of a file of any container. `choice` is for files with bytes."""
    container = container_of(path, choice)
    return container.index(path, *[choice] * container.has_bytes)


def with_bytes(shards: pa.Table) -> pa.Table:
    """Return the shards (SHARD_SCHEMA) whose samples have bytes."""
    return shards.filter(pa.array([container.has_bytes for container in containers_of(shards)], pa.bool_()))


def without_bytes(shards: pa.Table) -> pa.Table:
    """Return the shards (SHARD_SCHEMA) whose samples have no bytes."""
    return shards.filter(pa.array([not container.has_bytes for container in containers_of(shards)], pa.bool_()))
