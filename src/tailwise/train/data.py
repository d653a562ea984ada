"""What open_clip's trainer gets in place of its own training data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tailwise.train.randomness import reseed, undisturbed

if TYPE_CHECKING:
    from tailwise.loader import Batch, Loader
    from tailwise.train.record import Record
    from tailwise.train.segments import Segments


class SegmentLoader:
    """One segment of the loader's endless sequence at a time, in the form that the trainer takes.

    Attributes:
        num_batches: batches of a segment but the last; the trainer counts its steps by this number.
        num_samples: samples of such a segment, of all ranks.
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
        """Wraps a loader.

        Args:
            loader: positioned anywhere.
            segments: how the training is cut.
            global_batch: samples of a batch, over all ranks.
            seed: (seed, phase, rank): keys the random numbers of the model.
            form: (images, texts) → a batch as the trainer takes it.
            record: where to note what was seen, if anywhere.
        """
        self.num_batches, self.num_samples = segments.length, segments.length * global_batch
        self._segments = segments
        self._loader, self._seed, self._form, self._record = loader, seed, form, record
        self._segment = 0
        self._batches: Iterator[Batch] | None = None

    def __len__(self) -> int:
        return self.num_batches

    def set_segment(self, segment: int) -> None:
        """Goes to the start of a segment, and reseeds the global generators for it."""
        self._segment = segment
        first, _ = self._segments.bounds(segment)
        if self._loader.position != first:
            self._loader.seek(first)
            self._batches = None
        reseed(self._seed[0], self._seed[1], segment, self._seed[2])

    def __iter__(self) -> Iterator[Any]:
        """The batches of the segment."""
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
    """Stands where open_clip has its `DataInfo` for "train"."""

    dataloader: SegmentLoader

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each of its epochs, which are segments."""
        self.dataloader.set_segment(epoch)
