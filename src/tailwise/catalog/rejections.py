"""Rejected samples of a step, by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tailwise.catalog.schema import REJECTED_SCHEMA
from tailwise.storage.local import replacing
from tailwise.text import storable

FLUSH_RECORDS = 100_000


@dataclass
class Rejections:
    """Counts of what was left out, by (stage, reason), and the files that list every case."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    files: list[Path] = field(default_factory=list)

    @contextmanager
    def writer(self, path: Path) -> Iterator[RejectionWriter]:
        """Opens a list at `path`; it is there, and counted, only after the block ended well and if it has any record."""
        counts: Counter[tuple[str, str]] = Counter()
        path.unlink(missing_ok=True)
        with replacing(path) as temporary, pq.ParquetWriter(temporary, REJECTED_SCHEMA, compression="zstd") as file:
            writer = RejectionWriter(file, counts)
            yield writer
            writer.flush()
        if not writer.written:
            path.unlink(missing_ok=True)
            return
        self.files.append(path)
        self.counts.update(counts)

    def count(self, path: Path) -> None:
        """Count a list that an earlier run wrote, if there is one."""
        if not path.exists():
            return
        self.files.append(path)
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(FLUSH_RECORDS, columns=["stage", "reason", "rows"]):
                for row in batch.to_pylist():
                    self.counts[row["stage"], row["reason"]] += row["rows"]


class RejectionWriter:
    """Writes records to one list; holds at most FLUSH_RECORDS of them."""

    def __init__(self, file: pq.ParquetWriter, counts: Counter[tuple[str, str]]) -> None:
        self.counts = counts
        self.written = 0
        self.example: str | None = None  # the first detail, for errors that leave no list behind
        self._file = file
        self._records: list[dict[str, Any]] = []

    def add(
        self, stage: str, reason: str, file: str, key: str | None, detail: str | None = None, rows: int = 1
    ) -> None:
        """Notes one case; `key` None means the whole file, `rows` how many samples or rows it stands for."""
        texts = {"file": file, "key": key, "detail": detail}
        texts = {name: None if text is None else storable(text) for name, text in texts.items()}
        self._records.append({"stage": stage, "reason": reason, **texts, "rows": rows})
        self.counts[stage, reason] += rows
        if detail and not self.example:
            self.example = f"{file}: {detail}"
        if len(self._records) >= FLUSH_RECORDS:
            self.flush()

    def add_table(self, table: pa.Table) -> None:
        """Notes all cases of a REJECTED_SCHEMA table."""
        for record in table.to_pylist():
            self.add(**record)

    def flush(self) -> None:
        """Writes what is held."""
        if self._records:
            self._file.write_table(pa.Table.from_pylist(self._records, schema=REJECTED_SCHEMA))
            self.written += len(self._records)
            self._records = []
