"""Import: the scores of DataComp's metadata, joined by uid to the samples of tars as they are indexed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tailwise.catalog.files import create_array, digest
from tailwise.catalog.rejections import RejectionWriter
from tailwise.catalog.schema import REJECTED_SCHEMA
from tailwise.context import Context
from tailwise.execution.keys import AMBIGUOUS, KeyIndex
from tailwise.shards.columns import DAMAGE, count_rows, open_table, score_columns
from tailwise.shards.content import ShardContent
from tailwise.sources.datacomp import score_batches

STAGE = "scores of metadata"


def scores_id(metadata: Mapping[str, int]) -> str:
    """Return the hash of the files of scores (path → size) that were joined to a part."""
    return digest(sorted(metadata.items()))


class Scores:
    """The scores of several metadata files: an index of uids and a table of numbers, on disk.

    40 bytes a row and 8 more for each score; memory doesn't grow with them.
    """

    def __init__(self, paths: Sequence[str], work: Path, log: RejectionWriter, context: Context) -> None:
        """Reads all files.

        `work`: a folder for the index and the numbers. `log`: takes files that can't be read.
        """
        schemas = {path: schema for path in map(Path, paths) if (schema := _schema(path, log))}
        readable = {path: rows for path, (rows, _) in schemas.items()}
        names = {name for _, columns in schemas.values() for name in columns}
        self.columns = sorted(names)
        total = sum(readable.values())
        self._index = KeyIndex(work / "uids", total)
        self._values = create_array(work / "scores.npy", (total, len(self.columns)), np.float64)
        self._used = create_array(work / "used.npy", (total,), np.bool_)
        self._spans: dict[Path, slice] = {}
        start = 0
        for path, rows in context.progress(readable.items(), "reading scores", len(readable)):
            self._read(path, slice(start, start + rows), log)
            start += rows
        self._index.seal()

    def _read(self, path: Path, rows: slice, log: RejectionWriter) -> None:
        """Takes up one file, as far as it can be read."""
        done = rows.start
        try:
            for uids, values in score_batches(path, self.columns):
                named = np.array([bool(uid) for uid in uids], np.bool_)
                self._used[done : done + len(uids)] = ~named
                self._index.add([uid for uid in uids if uid], done + np.flatnonzero(named))
                self._values[done : done + len(uids)] = values
                done += len(uids)
        except DAMAGE as error:
            log.add("import", "unreadable metadata", str(path), None, str(error), rows.stop - done)
        self._spans[path] = span = slice(rows.start, done)
        if nameless := int(self._used[span].sum()):
            log.add(STAGE, "row without uid", str(path), None, None, nameless)

    def find(self, uids: Sequence[bytes | None]) -> npt.NDArray[np.int64]:
        """Return the row of each uid, and note that samples have it."""
        rows = self._index.find([uid.hex() if uid else "" for uid in uids])
        self._used[rows[rows >= 0]] = True
        return rows

    def list_unused(self, log: RejectionWriter) -> None:
        """Count the rows that no sample got, once all are joined."""
        for path, span in self._spans.items():
            if unused := int((~self._used[span]).sum()):
                detail = "no sample has their uids, or several rows have one"
                log.add(STAGE, "row without sample", str(path), None, detail, unused)

    def join(self, content: ShardContent, path: str) -> ShardContent:
        """A tar with scores for its samples that have a uid; those of the tar's own sidecar stay.

        `content`: as `index_shard` returns it.
        """
        samples = content.samples
        rows = self.find(samples.column("uid").to_pylist())
        keys = samples.column("key").to_pylist()
        detail = "several rows of the metadata have it: the sample stays, without their scores"
        listed = [
            {"stage": "import", "reason": "ambiguous uid", "file": path, "key": keys[at], "detail": detail, "rows": 1}
            for at in np.flatnonzero(rows == AMBIGUOUS)
        ]
        for number, name in enumerate(self.columns):
            samples = _with_column(samples, name, self._column(number, rows))
        rejected = pa.concat_tables([content.rejected, pa.Table.from_pylist(listed, schema=REJECTED_SCHEMA)])
        return replace(content, samples=samples, rejected=rejected)

    def _column(self, number: int, rows: npt.NDArray[np.int64]) -> pa.Array:
        values = np.full(len(rows), np.nan)
        values[rows >= 0] = self._values[rows[rows >= 0], number]
        return pa.array(values, pa.float64(), mask=np.isnan(values))


def _with_column(samples: pa.Table, name: str, values: pa.Array) -> pa.Table:
    at = samples.schema.get_field_index(name)
    field = pa.field(name, pa.float64())
    if at < 0:
        return samples.append_column(field, values)
    return samples.set_column(at, field, pc.coalesce(samples.column(name), values))


def _schema(path: Path, log: RejectionWriter) -> tuple[int, list[str]] | None:
    """The number of rows and the scores of a metadata file; None, and a line in the log, if it can't be read."""
    try:
        with open_table(path, ["uid"]) as file:
            rows = int(file.metadata.num_rows)
            names, unfit = score_columns(file)
        for detail in unfit.values():
            log.add("metadata columns", "column not used", str(path), None, detail, rows)
        return rows, names
    except DAMAGE as error:
        log.add("import", "unreadable metadata", str(path), None, str(error), count_rows(path))
        return None
