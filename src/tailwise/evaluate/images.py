"""Images of a set, shard by shard, decoded by worker processes; never more of them in memory than a few batches.

Results don't depend on the number of workers: a batch lies within one shard, and tells its place.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tailwise.errors import UserError
from tailwise.execution.local import as_it_is, begin_worker, default_workers
from tailwise.progress import Track
from tailwise.shards.containers import container_of
from tailwise.shards.content import Pairs
from tailwise.shards.decode import UNREADABLE, ImageError, decode_rgb, too_long
from tailwise.storage.errors import RemoteError

MAX_WORKERS = 8  # by default; a batch of 256 images of 224 pixels takes 150 MB, and each worker holds two
INCOMPLETE = "without image or target"


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Makes the errors of reading a file or URL the user's.

    Raises:
        UserError: anything went wrong.
    """
    try:
        yield
    except RemoteError as error:
        raise UserError(f"{path} can't be read ({error.cause}): check the URL, or try again later") from error
    except Exception as error:  # each file system raises errors of its own libraries
        raise UserError(
            f"{path} can't be read ({error or type(error).__name__}): check the path, or fetch it anew"
        ) from error


class Shard(Protocol):
    """Some samples of a set."""

    def samples(self) -> Pairs:
        """The encoded image and the target of each sample, in order; None for what is wanting.

        Raises:
            UserError: it can't be read.
        """
        ...


@dataclass(frozen=True)
class TarShard:
    """One file of samples, such as a tar; see `Container.pairs`.

    Attributes:
        path: a local path or any fsspec URL.
        target: extension of what is to be found: "cls" or "txt".
    """

    path: str
    target: str

    def samples(self) -> Pairs:
        """As `Shard` has it."""
        with reading(self.path):
            yield from container_of(self.path).pairs(self.path, self.target)


@dataclass(frozen=True)
class FileShard:
    """Some image files of known classes.

    Attributes:
        files: path and class of each.
    """

    files: tuple[tuple[str, int], ...]

    def samples(self) -> Pairs:
        """As `Shard` has it."""
        for path, label in self.files:
            with reading(path):
                content = too_long(Path(path).stat().st_size) or Path(path).read_bytes()
            yield content, str(label).encode()


@dataclass(frozen=True)
class Batch:
    """Some samples of one shard, in order.

    Attributes:
        shard: number of the shard.
        number: of the batch in it.
        images: float32 [n, 3, h, w].
        targets: [n], each as the set's `parse` gives it.
        skipped: how many samples before its end were left out, by reason.
    """

    shard: int
    number: int
    images: Tensor
    targets: list[Any]
    skipped: dict[str, int] = field(default_factory=dict)


class _Batches(IterableDataset[Batch | UserError]):
    def __init__(
        self,
        shards: Sequence[Shard],
        preprocess: Callable[[Any], Tensor],
        parse: Callable[[bytes], Any],
        batch_size: int,
    ) -> None:
        self._shards = shards
        self._preprocess = preprocess
        self._parse = parse
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[Batch | UserError]:
        """The batches of the shards that are this worker's. A user's mistake is given back, not raised: it would arrive as a traceback."""
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        try:
            for number in range(first, len(self._shards), step):
                yield from self._of_shard(number)
        except UserError as error:
            yield error

    def _of_shard(self, shard: int) -> Iterator[Batch]:
        images: list[Tensor] = []
        targets: list[Any] = []
        skipped: Counter[str] = Counter()
        number = 0
        for content, target in self._shards[shard].samples():
            try:
                parsed = None if target is None else self._parse(target)
                if content is None or (parsed is None and isinstance(content, bytes)):
                    raise ImageError(INCOMPLETE, "")
                images.append(self._decode(content))
            except ImageError as error:
                skipped[error.reason] += 1
                continue
            targets.append(parsed)
            if len(images) == self._batch_size:
                yield Batch(shard, number, torch.stack(images), targets, dict(skipped))
                images, targets, skipped, number = [], [], Counter(), number + 1
        if images or skipped:
            yield Batch(shard, number, torch.stack(images) if images else torch.empty(0), targets, dict(skipped))

    def _decode(self, content: bytes | ImageError) -> Tensor:
        """An image as the model takes it.

        Raises:
            ImageError: it cannot be decoded or preprocessed.
        """
        if isinstance(content, ImageError):
            raise content
        image = decode_rgb(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the model's preprocessing
                return self._preprocess(image)
        except Exception as error:  # as it may raise anything
            raise ImageError(UNREADABLE, f"preprocessing: {error}") from error


def read_batches(
    shards: Sequence[Shard],
    preprocess: Callable[[Any], Tensor],
    parse: Callable[[bytes], Any],
    *,
    batch_size: int,
    workers: int | None,
    track: Track,
    description: str,
) -> Iterator[Batch]:
    """The batches of all shards, in an order that depends on the number of workers: see `Batch.shard` and `Batch.number`.

    Args:
        shards: of the set.
        preprocess: RGB image → float32 [3, h, w].
        parse: what a target's bytes say; None if they say nothing. An ImageError leaves the sample out.
        batch_size: n; the last batch of a shard may be smaller.
        workers: processes; 1 reads in this one. By default one a processor, at most MAX_WORKERS and the number of shards.
        track: shows progress.
        description: for people.

    Raises:
        UserError: a shard can't be read.
    """
    workers = min(workers or min(default_workers(), MAX_WORKERS), len(shards))
    in_workers = workers if workers > 1 else 0
    batches = DataLoader(
        _Batches(shards, preprocess, parse, batch_size),
        batch_size=None,
        num_workers=in_workers,
        prefetch_factor=1 if in_workers else None,
        collate_fn=as_it_is,
        worker_init_fn=begin_worker,
        generator=torch.Generator(),  # else the process's own would lose a number
    )
    for batch in track(cast("Iterable[Batch | UserError]", batches), description):
        if isinstance(batch, UserError):
            raise batch
        yield batch
