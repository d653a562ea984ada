"""Matches: which entries of a list stand in which captions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.columns import PartColumn
from tailwise.catalog.files import digest, read_table, write_table
from tailwise.catalog.kinds import MATCHES

Found = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]  # how many entries each caption has, and which


def matches_artifact(catalog: Catalog, config: Mapping[str, Any], inputs: Mapping[str, str]) -> Artifact:
    """Return the artifact of matches, named by the hash of its configuration and inputs."""
    return Artifact(MATCHES.path(catalog.folder, digest([config, inputs])), "matches", config, inputs)


@dataclass(frozen=True)
class Matches:
    """The matches of a snapshot's captions and a list of entries."""

    folder: Path  # may be deleted when the plans are made
    name: str  # hash of configuration and inputs
    spellings: Mapping[str, int]  # each spelling, and the number of the entry that it spells; see `read_entries`

    @property
    def inputs(self) -> dict[str, str]:
        """Name and hash of the matches, for the inputs of other artifacts."""
        return {"matches": self.name}

    @cached_property
    def entries(self) -> list[str]:
        """Return the name of each entry: its first spelling."""
        names = {number: spelling for spelling, number in reversed(list(self.spellings.items()))}
        return [names[number] for number in range(len(names))]

    def write_entries(self) -> Path:
        """Write the spellings and the numbers of their entries; return the file."""
        path = self.folder / layout.ENTRY_TABLE
        columns = {
            "spelling": pa.array(self.spellings, pa.string()),
            "entry": pa.array(self.spellings.values(), pa.int32()),
        }
        write_table(path, pa.table(columns))
        return path

    @property
    def columns(self) -> tuple[PartColumn, PartColumn]:
        """Number of entries of each row, int32 [rows] per part, and the entries of all rows in order, int32 [m]."""
        return PartColumn(self.folder, layout.ENTRY_COUNT), PartColumn(self.folder, layout.ENTRY)

    def part(self, part: Part, kept: npt.NDArray[np.bool_]) -> Found:
        """Return the matches of one part (see `columns`), without those of rows that are not kept."""
        counts, entries = (column.read(part) for column in self.columns)
        if kept.all():
            return counts, entries
        return np.where(kept, counts, 0).astype(np.int32), entries[np.repeat(kept, counts)]


def read_entry_table(path: Path) -> tuple[list[str], list[int]]:
    """Return the spellings, and the numbers of their entries, that `Matches.write_entries` wrote."""
    spellings, entries = (column.to_pylist() for column in read_table(path).columns)
    return spellings, entries
