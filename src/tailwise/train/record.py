"""What a training saw, batch by batch: `record`."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from tailwise.loader import Batch


class Record:
    """Appends one JSON line per batch of this rank to FOLDER/RUN.rank-R.jsonl.

    A line has segment, batch, epochs and rows (of each sample), pixels and texts (CRC-32 of the tensors' bytes, 8 hexadecimal
    digits), and replaced (samples replaced in it). A batch that is repeated after a resumption is there twice; the later one counts.
    """

    def __init__(self, folder: Path, run: str, rank: int) -> None:
        """Opens the file; makes the folder.

        Raises:
            OSError: it can't be written to.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{run}.rank-{rank}.jsonl"
        self._stream = self.path.open("a", encoding="utf-8")

    def add(self, segment: int, number: int, batch: Batch) -> None:
        """Writes one batch, and flushes it."""
        line = {
            "segment": segment,
            "batch": number,
            "epochs": batch.epochs.tolist(),
            "rows": batch.rows.tolist(),
            "pixels": checksum(batch.images),
            "texts": checksum(batch.texts),
            "replaced": len(batch.replaced),
        }
        self._stream.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


def checksum(tensor: Tensor) -> str:
    """CRC-32 of a tensor's bytes, row after row: 8 hexadecimal digits."""
    return f"{zlib.crc32(tensor.detach().cpu().contiguous().numpy().data):08x}"
