"""Images of a set, decoded by worker processes, shard by shard; at most a few batches are in memory.

Results do not depend on the number of workers: a batch is within one shard, and has its number.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.base import default_workers
from tailwise.execution.local import as_it_is, begin_worker
from tailwise.shards.containers import container_named
from tailwise.shards.content import Pairs
from tailwise.shards.decode import UNREADABLE, ImageError, decode_rgb, too_long
from tailwise.storage.errors import RemoteError

MAX_WORKERS = 8  # default; a batch of 256 images of 224 pixels takes 150 MB, and each worker holds two
INCOMPLETE = "without image or target"


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn any error of reading a file or URL into a UserError."""
    try:
        yield
    except RemoteError as error:
        raise UserError(f"{path} can't be read ({error.cause}): check the URL, or try again later") from error
    except Exception as error:  # each file system raises errors of its own libraries
        remedy = "check the path, or fetch it again"
        raise UserError(f"{path} can't be read ({error or type(error).__name__}): {remedy}") from error


@dataclass(frozen=True)
class TarShard:
    """One file of samples, such as a tar; see `Container.pairs`."""

    path: str  # a local path or any fsspec URL
    targets: tuple[str, ...]  # extensions of the targets: "cls" or "txt", and others

    def samples(self) -> Pairs:
        """Yield the encoded image and the targets of each sample, in order; None where one is missing. May raise a UserError."""
        with reading(self.path):
            yield from container_named(self.path, images=True).pairs(self.path, self.targets)


@dataclass(frozen=True)
class FileShard:
    """Some image files of known classes."""

    files: tuple[tuple[str, int], ...]  # path and class of each

    def samples(self) -> Pairs:
        """Yield the encoded image and the class of each file."""
        for path, label in self.files:
            with reading(path):
                content = too_long(Path(path).stat().st_size) or Path(path).read_bytes()
            yield content, (str(label).encode(),)


Shard: TypeAlias = TarShard | FileShard


@dataclass(frozen=True)
class Batch:
    """Some samples of one shard, in order."""

    shard: int  # number of the shard
    number: int  # number of the batch in the shard
    images: Tensor  # float32 [n, 3, h, w]
    targets: list[Any]  # [n], each as returned by the set's `parse`
    skipped: dict[str, int]  # number of samples that were left out before the batch's end, by reason


@dataclass(eq=False)
class _Batches(IterableDataset[Batch | UserError]):
    shards: Sequence[Shard]
    preprocess: Callable[[Any], Tensor]
    parse: Callable[[tuple[bytes, ...]], Any]
    batch_size: int

    def __iter__(self) -> Iterator[Batch | UserError]:
        """Yield the batches of this worker's shards. A UserError is yielded, because a raised one would arrive as a traceback."""
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        try:
            for number in range(first, len(self.shards), step):
                yield from self._of_shard(number)
        except UserError as error:
            yield error

    def _of_shard(self, shard: int) -> Iterator[Batch]:
        images: list[Tensor] = []
        targets: list[Any] = []
        skipped: Counter[str] = Counter()
        number = 0
        for content, target in self.shards[shard].samples():
            try:
                parsed = None if target is None else self.parse(target)
                if content is None or (parsed is None and isinstance(content, bytes)):
                    raise ImageError(INCOMPLETE, "")
                if isinstance(content, ImageError):
                    raise content
                images.append(self._decoded(content))
            except ImageError as error:
                skipped[error.reason] += 1
                continue
            targets.append(parsed)
            if len(images) == self.batch_size:
                yield Batch(shard, number, torch.stack(images), targets, dict(skipped))
                images, targets, skipped, number = [], [], Counter(), number + 1
        if images or skipped:
            yield Batch(shard, number, torch.stack(images) if images else torch.empty(0), targets, dict(skipped))

    def _decoded(self, content: bytes) -> Tensor:
        """Return an image as the model takes it; raise an ImageError if it cannot be decoded or preprocessed."""
        image = decode_rgb(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the model's preprocessing
                return self.preprocess(image)
        except Exception as error:  # preprocessing may raise anything
            raise ImageError(UNREADABLE, f"preprocessing: {error}") from error


def read_batches(
    shards: Sequence[Shard],
    preprocess: Callable[[Any], Tensor],  # RGB image → float32 [3, h, w]
    parse: Callable[
        [tuple[bytes, ...]], Any
    ],  # bytes of a sample's targets → their value; None if they have none; an ImageError leaves the sample out
    *,
    batch_size: int,  # n; the last batch of a shard may be smaller
    workers: int
    | None,  # processes; 1: this one; None: one per processor, at most MAX_WORKERS and the number of shards
    context: Context,
    description: str,  # of the progress
) -> Iterator[Batch]:
    """Yield the batches of all shards, in an order that depends on the number of workers: see `Batch.shard` and `Batch.number`.

    Raise a UserError if a shard cannot be read.
    """
    workers = min(workers or min(default_workers(), MAX_WORKERS), len(shards))
    batches = DataLoader(
        _Batches(shards, preprocess, parse, batch_size),
        batch_size=None,
        num_workers=workers if workers > 1 else 0,
        prefetch_factor=1 if workers > 1 else None,
        collate_fn=as_it_is,
        worker_init_fn=begin_worker,
        generator=torch.Generator(),  # the global generator's state stays the same
    )
    for batch in context.progress(cast("Iterable[Batch | UserError]", batches), description):
        if isinstance(batch, UserError):
            raise batch
        yield batch
