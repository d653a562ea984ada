"""The record of a training: which samples each batch held."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from tailwise.loader.dataset import Batch


class Record:
    """Appends one JSON line per batch of this rank to FOLDER/RUN.rank-R.jsonl.

    A line has segment, batch, epochs and rows (of each sample), pixels and texts (CRC-32 of the tensors' bytes, 8 hexadecimal
    digits), and replaced (number of replaced samples). A batch that is repeated after a resumption has two lines; the later one counts.
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
        }
        self._stream.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def checksum(tensor: Tensor) -> str:
    """Return the CRC-32 of a tensor's bytes in row order: 8 hexadecimal digits."""
    return f"{zlib.crc32(tensor.detach().cpu().contiguous().numpy().data):08x}"
