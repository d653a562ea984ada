"""The training data that open_clip's trainer gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tailwise.train.randomness import reseed, undisturbed

if TYPE_CHECKING:
    from tailwise.loader.dataset import Batch
    from tailwise.loader.loader import Loader
    from tailwise.train.record import Record
    from tailwise.train.segments import Segments


class SegmentLoader:
    """One segment of the loader's endless sequence at a time, in the trainer's form.

    Attributes:
        num_batches: batches of a segment (the last may be shorter); the trainer counts its steps by this number.
        num_samples: samples of such a segment over all ranks.
    """

    def __init__(
        self,
        loader: Loader,
        *,
        segments: Segments,
        global_batch: int,
        seed: tuple[int, int, int],
        form: Callable[[Tensor, Tensor], Any],
        record: Record | None = None,
    ) -> None:
        """Wrap a loader.

        Args:
            loader: the loader, at any position.
            segments: the segments of the training.
            global_batch: samples of a batch over all ranks.
            seed: (seed, phase, rank): key of the model's random numbers.
            form: (images, texts) → a batch in the trainer's form.
            record: record of the batches, if any.
        """
        self.num_batches, self.num_samples = segments.length, segments.length * global_batch
        self._segments, self._loader, self._seed, self._form, self._record = segments, loader, seed, form, record
        self._segment = 0
        self._batches: Iterator[Batch] | None = None

    def __len__(self) -> int:
        return self.num_batches

    def set_segment(self, segment: int) -> None:
        """Move to the start of a segment, and reseed the global generators for it."""
        self._segment = segment
        first, _ = self._segments.bounds(segment)
        if self._loader.position != first:
            self._loader.seek(first)
            self._batches = None
        reseed(self._seed[0], self._seed[1], segment, self._seed[2])

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of the segment."""
        if self._batches is None:
            self._batches = iter(self._loader)
        for number in range(*self._segments.bounds(self._segment)):
            with undisturbed():
                batch = next(self._batches)
            if self._record is not None:
                self._record.add(self._segment, number, batch)
            yield self._form(batch.images, batch.texts)


@dataclass
class TrainData:
    """Replaces open_clip's `DataInfo` for "train"."""

    dataloader: SegmentLoader

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each of its epochs, which are segments."""
        self.dataloader.set_segment(epoch)
