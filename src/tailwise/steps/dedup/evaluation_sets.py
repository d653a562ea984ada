"""Evaluation sets that a pool is compared with: images in tars and folders, another catalog, or embeddings in files.

An image of a set has a number, in the order of its files; with mirror images, number 2i is image i, and 2i + 1 its mirror image.
"""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from PIL import ImageOps

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog
from tailwise.catalog.embeddings import check_column, column_dimension, column_record, normalise_rows
from tailwise.catalog.files import digest, write_array
from tailwise.context import Context
from tailwise.encoders.encoder import Inputs, Tensors
from tailwise.errors import UserError
from tailwise.evaluate.images import FileShard, Shard
from tailwise.evaluate.sets import find_images, set_name
from tailwise.execution.base import Needs, Task, Worker
from tailwise.kernels.grid import row_chunks
from tailwise.requests import DedupRequest, EmbedRequest
from tailwise.shards.decode import ImageError, decode_rgb
from tailwise.steps.dedup.hashes import Hashes, HashImages, hash_images
from tailwise.steps.dedup.suggest import find_samples
from tailwise.steps.embedding.column import BATCH_SIZES
from tailwise.steps.embedding.tasks import Describe, load_once
from tailwise.steps.scoring.target import Target
from tailwise.storage.store_path import SCHEMES, path_of

Place = dict[str, Any]  # file, key and number of an image
CHUNK_ROWS = 65_536


class EvaluationSet(ABC):
    """A set of images."""

    has_images: ClassVar[bool] = False  # True if the images are decoded, and mirrored
    name: str  # for people
    id: str  # hash of its content
    count: int  # number of images

    @abstractmethod
    def embeddings(self, folder: Path, context: Context) -> list[Path]:
        """Return files of embeddings, float16 [n, d], unit norm or zero, in order; new ones are written into a folder.

        Raises:
            UserError: the images cannot be embedded as the pool was.
        """

    @abstractmethod
    def hashes(self, context: Context) -> Hashes:
        """Return the hash of the pixels of each image: uint64 [n, 2], zeros without one."""

    @abstractmethod
    def places(self, images: npt.NDArray[np.int64]) -> list[Place]:
        """Return where some images are, int64 [m] of [0, count)."""


def open_sets(pool: Catalog, request: DedupRequest, column: str | None, context: Context) -> list[EvaluationSet]:
    """Return the sets of a request, for a column of the pool, if embeddings are compared.

    Raises:
        UserError: one cannot be read, or lacks what is to be compared.
    """
    sets = [_open(name, pool, request, column, context) for name in request.against]
    for found in sets:
        if not found.has_images and (request.mirrored or (request.exact and isinstance(found, _OfVectors))):
            option = "mirrored" if request.mirrored else "exact"
            raise UserError(f"`{option}` needs the images of {found.name}: give their tars or folder in `against`")
        if not found.count:
            raise UserError(f"`against` {found.name}: it has no images")
    return sets


def _open(name: str, pool: Catalog, request: DedupRequest, column: str | None, context: Context) -> EvaluationSet:
    scheme, sign, _ = name.partition("://")
    if (not sign or scheme in SCHEMES) and (path_of(name) / layout.HEADER).exists():
        return _OfCatalog(name, pool, column)
    if not sign and (name.endswith(".npy") or (path_of(name) / "img_emb").is_dir()):
        return _OfVectors(name, pool, column)
    return _OfImages(name, pool, request, column, context)


# --- images ---------------------------------------------------------------------------------------------------------------


def _contents(shard: Shard, mirrored: bool = False) -> Iterator[bytes]:
    """Yield the encoded images of a shard, each before its mirror image."""
    for content, _ in shard.samples():
        if isinstance(content, bytes) or isinstance(shard, FileShard):  # files keep their numbers
            image = content if isinstance(content, bytes) else b""
            yield image
            if mirrored:
                yield _mirror(image)


def _first_file(shard: Shard) -> str:
    return shard.files[0][0] if isinstance(shard, FileShard) else shard.path


def _mirror(content: bytes) -> bytes:
    stream = io.BytesIO()
    try:
        ImageOps.mirror(decode_rgb(content)).save(stream, "PNG", compress_level=0)
    except ImageError:
        return b""
    return stream.getvalue()


def _values_of(
    shard: Shard,
    mirrored: bool,
    batch_size: int,
    nothing: npt.NDArray[Any],
    prepare: Callable[[list[bytes]], Inputs],
    values: Callable[[Tensors], npt.NDArray[Any]],
) -> npt.NDArray[Any]:
    """Return the values of a shard's images [n, …], zeros where one cannot be decoded; `nothing` is those of no image."""
    found, contents = [nothing], _contents(shard, mirrored)
    while batch := list(islice(contents, batch_size)):
        inputs, rows = prepare(batch), np.zeros((len(batch), *nothing.shape[1:]), nothing.dtype)
        if fit := [at for at in range(len(batch)) if at not in inputs.faults]:
            rows[fit] = values(inputs.tensors)
        found.append(rows)
    return np.concatenate(found)


@dataclass(frozen=True)
class _Count(Task[Shard, tuple[int, str]]):
    def label(self, item: Shard) -> str:
        return _first_file(item)

    def run(self, item: Shard, worker: Worker) -> tuple[int, str]:  # noqa: ARG002
        count, state = 0, hashlib.sha256()
        for content in _contents(item):
            count += 1
            state.update(len(content).to_bytes(8, "little") + content)
        return count, state.hexdigest()


@dataclass(frozen=True)
class _Hash(Task[Shard, Hashes]):
    mirrored: bool

    def label(self, item: Shard) -> str:
        return _first_file(item)

    def run(self, item: Shard, worker: Worker) -> Hashes:  # noqa: ARG002
        nothing, size = np.empty((0, 2), np.uint64), BATCH_SIZES["cpu"]
        hashes = lambda tensors: tensors["hash"].numpy().view(np.uint64)  # noqa: E731
        return _values_of(item, self.mirrored, size, nothing, HashImages("pixels"), hashes)


@dataclass(frozen=True)
class _Embed(Task[tuple[Path, Shard], None]):
    """Embed the images of a shard. Items: the file to write, and the shard."""

    request: EmbedRequest  # names the encoder, and says how to load it
    dimension: int
    mirrored: bool

    def files(self, item: tuple[Path, Shard]) -> tuple[Path]:
        return (item[0],)

    def label(self, item: tuple[Path, Shard]) -> str:
        return _first_file(item[1])

    def run(self, item: tuple[Path, Shard], worker: Worker) -> None:
        encoder = load_once(self.request, worker)
        nothing, size = np.empty((0, self.dimension), np.float16), BATCH_SIZES.get(encoder.device.type, 64)
        rows = lambda tensors: normalise_rows(encoder.embed("image", tensors).cpu().numpy())[0]  # noqa: E731
        found = _values_of(item[1], self.mirrored, size, nothing, encoder.sides["image"].prepare, rows)
        write_array(item[0], found)


class _OfImages(EvaluationSet):
    has_images = True

    def __init__(self, name: str, pool: Catalog, request: DedupRequest, column: str | None, context: Context) -> None:
        self.name, self._shards = find_images(name)
        self._pool, self._column, self._mirrored = pool, str(column), request.mirrored
        self._device = request.device
        read = list(context.map(_Count(), self._shards, f"reading {self.name}"))
        self._firsts = np.cumsum([0, *(count for count, _ in read)])
        self.count, self.id = int(self._firsts[-1]), digest(read)

    def embeddings(self, folder: Path, context: Context) -> list[Path]:
        request, dimension = _recorded_encoder(self._pool, self._column, self._device, self.name, context)
        files = [folder / f"{self.id[:12]}-{at:06d}{layout.ARRAY}" for at in range(len(self._shards))]
        task, needs = _Embed(request, dimension, self._mirrored), Needs(device=self._device)
        context.run(task, list(zip(files, self._shards, strict=True)), f"embedding {self.name}", needs)
        return files

    def hashes(self, context: Context) -> Hashes:
        return np.concatenate(list(context.map(_Hash(self._mirrored), self._shards, f"hashing {self.name}")))

    def places(self, images: npt.NDArray[np.int64]) -> list[Place]:
        places = []
        for image in images.tolist():
            at = int(np.searchsorted(self._firsts, image, side="right")) - 1
            shard, number = self._shards[at], image - int(self._firsts[at])
            path, number = (shard.files[number][0], 0) if isinstance(shard, FileShard) else (shard.path, number)
            places.append({"file": path if "://" in path else str(Path(path).absolute()), "number": number})
        return places


def _recorded_encoder(pool: Catalog, column: str, device: str, name: str, context: Context) -> tuple[EmbedRequest, int]:
    """Return how to load the encoder that a column records, and d; a UserError if it is unknown, or another one now."""
    record = column_record(pool, column)
    encoder, settings = record["encoder"], record["settings"]
    instead = (
        f"give the embeddings of {name} by the encoder of column {column!r} in `against`: a .npy file, a folder with img_emb/, or a "
        "catalog that has this column; or compare `exact` pixels without `epsilon`"
    )
    if not settings:
        raise UserError(f"the encoder of column {column!r} is unknown, because it was imported: {instead}")
    chosen = {name: settings[name] for name in ("precision", "backend", "pooling") if name in settings}
    request = EmbedRequest(encoder=encoder, device=device, **chosen)
    try:
        (described,) = context.executor.map(Describe(request), [("image",)], Needs(device=device))
    except UserError as error:
        raise UserError(f"{error}; or {instead}") from error
    made = described["image"]
    if other := [key for key in sorted({*settings, *made.settings}) if settings.get(key) != made.settings.get(key)]:
        raise UserError(f"{encoder} has another {', '.join(other)} than when it made column {column!r}: {instead}")
    return request, made.dimension


# --- catalogs, embeddings -------------------------------------------------------------------------------------------------


class _OfCatalog(EvaluationSet):
    def __init__(self, name: str, pool: Catalog, column: str | None) -> None:
        self._catalog, self._column, self.name = Catalog.open(name), column, set_name(name)
        if self._catalog.folder == pool.folder:
            raise UserError(f"`against` {name}: it is the pool itself; give an evaluation set")
        self._snapshot = self._catalog.snapshot()
        self.id, self.count = self._snapshot.id, self._snapshot.rows
        if column is not None:
            self._check(pool, column)
            self.id = digest([self.id, self._catalog.embedding_id(column, self._snapshot)])

    def _check(self, pool: Catalog, column: str) -> None:
        self._catalog.require_embeddings(check_column(self._catalog, column, "image"), self._snapshot)
        ours, theirs = (column_record(each, column) for each in (pool, self._catalog))
        known = [record["settings"] for record in (ours, theirs) if record["settings"]]
        if ours["dimension"] != theirs["dimension"] or (len(known) == 2 and known[0] != known[1]):
            made = f"was made by {theirs['encoder']}, and the pool's by {ours['encoder']}, of other weights, settings or dimensions"
            raise UserError(f"`against` {self.name}: its column {column!r} {made}: embed both by the same encoder")

    def embeddings(self, folder: Path, context: Context) -> list[Path]:  # noqa: ARG002
        parts = self._catalog.parts(self._snapshot)
        return [self._catalog.embedding_path(str(self._column), part) for part in parts]

    def hashes(self, context: Context) -> Hashes:
        column = hash_images(self._catalog, self._snapshot, "pixels", context)
        return np.concatenate([column.read(part) for part in self._catalog.parts(self._snapshot)])

    def places(self, images: npt.NDArray[np.int64]) -> list[Place]:
        known = find_samples(self._catalog, self._snapshot, images.tolist())
        return [{"file": known[row].shard, "key": known[row].key} for row in images.tolist()]


class _OfVectors(EvaluationSet):
    def __init__(self, name: str, pool: Catalog, column: str | None) -> None:
        self._target = Target(name, "against")
        if column is not None:
            self._target.check(column_dimension(pool, column) or 0)
        self.name, self.id = set_name(name), self._target.id
        self._firsts = np.cumsum([0, *map(len, self._target.blocks)])
        self.count = int(self._firsts[-1])

    def embeddings(self, folder: Path, context: Context) -> list[Path]:  # noqa: ARG002
        files = []
        for start, chunk in row_chunks(self._target.blocks, CHUNK_ROWS):
            files.append(folder / f"{self.id[:12]}-{start:012d}{layout.ARRAY}")
            write_array(files[-1], normalise_rows(np.asarray(chunk).astype(np.float32))[0])
        return files

    def hashes(self, context: Context) -> Hashes:
        raise NotImplementedError  # `open_sets` refuses

    def places(self, images: npt.NDArray[np.int64]) -> list[Place]:
        at = np.searchsorted(self._firsts, images, side="right") - 1
        numbers = (images - self._firsts[at]).tolist()
        files = [str(self._target.files[number].absolute()) for number in at.tolist()]
        return [{"file": file, "number": number} for file, number in zip(files, numbers, strict=True)]
