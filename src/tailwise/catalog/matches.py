"""Matches: which entries of a list stand in which captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.files import digest, map_array, read_table, write_array, write_table
from tailwise.catalog.kinds import MATCHES

Found = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]  # how many entries each caption has, and which


def matches_artifact(catalog: Catalog, config: Mapping[str, Any], inputs: Mapping[str, str]) -> Artifact:
    """Return the artifact of matches, made or not: its name is the hash of all that decides it."""
    return Artifact(MATCHES.path(catalog.folder, digest([config, inputs])), "matches", config, inputs)


@dataclass(frozen=True)
class Matches:
    """The matches of a snapshot's captions and a list of entries.

    Attributes:
        folder: where they lie; it may be deleted when the plans are made.
        entries: the list, without blank and repeated ones.
    """

    folder: Path
    entries: list[str]

    @property
    def inputs(self) -> dict[str, str]:
        """Name and hash, for the inputs of another artifact."""
        return {"matches": self.folder.name}

    def write_entries(self) -> Path:
        """Writes the list; returns its file."""
        path = self.folder / layout.ENTRY_TABLE
        write_table(path, pa.table({"entry": pa.array(self.entries, pa.string())}))
        return path

    def has(self, part: Part) -> bool:
        """Whether a part is matched."""
        return all(path.exists() for path in self._paths(part))

    def part(self, part: Part, kept: npt.NDArray[np.bool_]) -> Found:
        """The matches of one part: how many entries each row has, int32 [rows], none where not kept; and which, int32 [m]."""
        counts, entries = (map_array(path) for path in self._paths(part))
        if kept.all():
            return counts, entries
        return np.where(kept, counts, 0).astype(np.int32), entries[np.repeat(kept, counts)]

    def write(self, part: Part, found: Sequence[npt.NDArray[np.int32]]) -> None:
        """Writes the matches of one part: how many entries each row has, and which."""
        for path, column in zip(self._paths(part), found, strict=True):
            write_array(path, column)

    def _paths(self, part: Part) -> tuple[Path, Path]:
        return (
            layout.part_column(self.folder, layout.ENTRY_COUNT, part.name),
            layout.part_column(self.folder, layout.ENTRY, part.name),
        )


def read_entry_table(path: Path) -> list[str]:
    """The list that `Matches.write_entries` wrote."""
    entries: list[str] = read_table(path).column(0).to_pylist()
    return entries
