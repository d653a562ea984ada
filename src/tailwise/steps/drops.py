"""Write a drop list: its table, then the mask of each part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Part
from tailwise.catalog.drops import drop_mask, write_drop_table, write_mask
from tailwise.context import Context
from tailwise.execution.base import KERNEL, Task, Worker


@dataclass(frozen=True)
class _WriteMask(Task[Part, None]):
    """Mark the dropped rows of a part."""

    folder: Path  # of the drop list

    def files(self, item: Part) -> Sequence[Path]:
        return (drop_mask(self.folder).path(item),)

    def run(self, item: Part, worker: Worker) -> None:  # noqa: ARG002
        write_mask(self.folder, item)


def write_drops(
    artifact: Artifact, parts: Sequence[Part], tables: Iterable[pa.Table], context: Context | None = None
) -> int:
    """Write table and mask of a drop list; return how many rows it drops.

    Args:
        artifact: whose identity has the kind "dedup" or "filter", and in its config "snapshot" (number) and "without" (names).
        parts: of the snapshot.
        tables: DROPPED_SCHEMA, by ascending row over all tables, each row once.
        context: runs the tasks and shows progress.
    """
    total = write_drop_table(artifact, tables)
    (context or Context()).run(_WriteMask(artifact.folder), parts, "marking drops", KERNEL)
    return total
