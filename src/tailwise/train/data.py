"""The training data that open_clip's trainer gets, their record, and the random numbers that a model draws (patch dropout, drop path)."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailwise.kernels.keyed import stream_key
from tailwise.loader.dataset import Batch
from tailwise.loader.loader import Loader
from tailwise.train.segments import Segments


class SegmentLoader:
    """One segment of the loader's endless sequence at a time, in the place of open_clip's `DataInfo` and of its data loader.

    Attributes:
        num_batches: batches of a segment (the last may be shorter); the trainer counts its steps by this number.
        num_samples: samples of such a segment over all ranks.
    """

    def __init__(
        self,
        loader: Loader,  # at any position
        *,
        segments: Segments,  # of the training
        global_batch: int,  # samples of a batch over all ranks
        seed: tuple[int, int, int],  # (seed, phase, rank): key of the model's random numbers
        form: Callable[[Tensor, Tensor], Any],  # (images, texts) → a batch in the trainer's form
        record: Record | None = None,  # of the batches
    ) -> None:
        self.num_batches, self.num_samples = segments.length, segments.length * global_batch
        self.dataloader = self  # the trainer reads its batches from here
        self._segments, self._loader, self._seed, self._form, self._record = segments, loader, seed, form, record
        self._segment = 0
        self._batches: Iterator[Batch] | None = None

    def __len__(self) -> int:
        return self.num_batches

    def set_epoch(self, segment: int) -> None:
        """Move to the start of a segment, and reseed the global generators for it. The trainer calls segments epochs."""
        self._segment = segment
        first, _ = self._segments.bounds(segment)
        if self._loader.position != first:
            self._loader.seek(first)
            self._batches = None
        reseed(self._seed[0], self._seed[1], segment, self._seed[2])

    def __iter__(self) -> Iterator[Any]:
        if self._batches is None:
            self._batches = iter(self._loader)
        for number in range(*self._segments.bounds(self._segment)):
            with undisturbed():
                batch = next(self._batches)
            if self._record is not None:
                self._record.add(self._segment, number, batch)
            yield self._form(batch.images, batch.texts)


class Record:
    """Appends one JSON line per batch of this rank to FOLDER/RUN.rank-R.jsonl.

    A line has segment, batch, epochs and rows (of each sample), pixels and texts (CRC-32 of the tensors' bytes, 8 hexadecimal
    digits), replaced (number of replaced samples), and captions (their names, if there are several).
    A batch that is repeated after a resumption has two lines; the later one counts.
    """

    def __init__(self, folder: Path, run: str, rank: int) -> None:
        """Create the folder and open the file, or raise an OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{run}.rank-{rank}.jsonl"
        self._stream = self.path.open("a", encoding="utf-8")

    def add(self, segment: int, number: int, batch: Batch) -> None:
        """Write one batch and flush the file."""
        line = {
            "segment": segment,
            "batch": number,
            "epochs": batch.epochs.tolist(),
            "rows": batch.rows.tolist(),
            "pixels": checksum(batch.images),
            "texts": checksum(batch.texts),
            "replaced": len(batch.replaced),
            **({"captions": batch.captions} if batch.captions else {}),
        }
        self._stream.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def checksum(tensor: Tensor) -> str:
    """Return the CRC-32 of a tensor's bytes in row order: 8 hexadecimal digits."""
    return f"{zlib.crc32(tensor.detach().cpu().contiguous().numpy().data):08x}"


def reseed(seed: int, *numbers: int) -> None:
    """Seed the global generators of torch (CPU and CUDA), random and numpy from a key of (seed, numbers)."""
    key = int(stream_key(seed, "train", *numbers))
    torch.manual_seed(key)
    random.seed(key)
    np.random.seed(key % (1 << 32))  # noqa: NPY002  (other libraries use the global generator)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restore the state of the global generators at the end, because code that reads data may use them."""
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
