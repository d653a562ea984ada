"""Replaced samples of one rank: counted, logged, and an error if they are too many."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tailwise.errors import UserError
from tailwise.loader.dataset import Batch, BatchDataset

FEW = 100  # replacements that are always allowed, whatever their share

logger = logging.getLogger(__name__)


@dataclass
class Counts:
    """Numbers of samples of one rank so far."""

    replaced: int = 0  # replaced samples
    unforeseen: int = 0  # replaced samples that were neither removed nor in a shard that was damaged at the start
    consumed: int = 0  # all samples


class ReplacedSamples:
    """Counts and log of replaced samples, of a dataset; see `tailwise.Loader`."""

    def __init__(self, dataset: BatchDataset, max_replaced: float, log: Path | None) -> None:
        self.dataset, self.counts = dataset, Counts()
        self._max_replaced, self._log = max_replaced, log

    def note(self, batch: Batch) -> None:
        """Count and log the replaced samples of a batch; raise a UserError if they are too many."""
        rows = np.array([item.row for item in batch.replaced], np.int64)
        foreseen = np.isin(
            self.dataset.order.plan.shards_of(rows), list(self.dataset.damaged)
        ) | ~self.dataset.removals.keeps(rows)
        unexpected = [item for item, known in zip(batch.replaced, foreseen.tolist(), strict=True) if not known]
        unforeseen = self.counts.unforeseen + len(unexpected)
        consumed = self.counts.consumed + len(batch.rows)
        if unexpected:
            order = self.dataset.order
            of_epoch = order.batches_until(order.options.first_epoch + 1) * len(batch.rows)
            allowed = self._max_replaced * max(consumed, of_epoch)
            if unforeseen > (max(FEW, allowed) if self._max_replaced else 0):
                last = unexpected[-1]
                ((key, uid),) = self.dataset.locations.names(np.array([last.row]))
                raise UserError(
                    f"{unforeseen:,} of {consumed:,} samples had to be replaced, more than the share {self._max_replaced} that may be; "
                    f"the last one was key {key}, uid {uid} ({last.reason}); mend the shards or raise `max_replaced`"
                )
            if not self.counts.unforeseen:
                logger.warning("a sample was replaced (%s); others are, without a word", unexpected[0].reason)
        if batch.replaced and self._log is not None:
            self._write(self._log, batch)
        self.counts = Counts(self.counts.replaced + len(batch.replaced), unforeseen, consumed)

    def _write(self, log: Path, batch: Batch) -> None:
        rows = np.array([row for item in batch.replaced for row in (item.row, item.stand_in)])
        names = self.dataset.locations.names(rows)
        with log.open("a", encoding="utf-8") as stream:
            for at, item in enumerate(batch.replaced):
                (key, uid), (other_key, other_uid) = names[2 * at : 2 * at + 2]
                line = {"position": item.position, "row": item.row, "key": key, "uid": uid}
                line |= {"stand_in_key": other_key, "stand_in_uid": other_uid, "reason": item.reason}
                stream.write(json.dumps(line) + "\n")


def check_appendable(log: Path) -> None:
    """Raise a UserError if a log cannot be written."""
    try:
        log.open("a", encoding="utf-8").close()
    except OSError as error:
        raise UserError(f"the log {log} can't be written ({error.strerror}): name another file") from error
