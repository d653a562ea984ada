"""Drop lists: the samples that a dedup or a filter leaves out, with the reason of each.

A list names the lists that it was made without (`without`): what those drop took no part in it. Together they say what survives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tailwise.catalog import layout
from tailwise.catalog.artifacts import REMOVALS, FinishedArtifact, finished_folder, read_manifest
from tailwise.catalog.catalog import Catalog, Snapshot
from tailwise.catalog.columns import RowColumn
from tailwise.catalog.files import check_file
from tailwise.catalog.kinds import WITHOUT
from tailwise.catalog.removals import Removals
from tailwise.errors import UserError
from tailwise.text import command_line

DROPPED_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),  # of the catalog; ascending
        pa.field("reason", pa.string(), nullable=False),
        pa.field("value", pa.float64()),  # of the score that decided, if one did
        pa.field("cluster", pa.int32()),  # that the sample was compared in
        pa.field("kept_row", pa.int64()),  # the sample that this one duplicates
        pa.field("similarity", pa.float32()),  # to it
    ]
)
AGAINST_SCHEMA = pa.schema(  # of a list of images that evaluation sets hold
    [
        *DROPPED_SCHEMA,
        pa.field("set", pa.string()),  # evaluation set of the most similar image
        pa.field("file", pa.string()),  # path or URL of the file that holds it
        pa.field("key", pa.string()),  # of a sample of a catalog
        pa.field("number", pa.int64()),  # of the image in its file, from 0 on
        pa.field("mirrored", pa.bool_()),  # whether the sample resembles its mirror image
    ]
)


class DropList(FinishedArtifact):
    """A finished drop list.

    Attributes:
        catalog: the catalog that holds it.
        name: of it.
        kind: the stage that made it: "dedup" or "filter".
        without: names of the lists it was made without, as given.
        clustering: name of the clustering inside which samples were compared; None of a filter.
    """

    def __init__(self, catalog: Catalog, name: str, user: str | None = None) -> None:
        """Opens it.

        `user`: what was made without it, if that is why it is opened.

        Raises:
            UserError: there is none of this name.
        """
        self.catalog, self.name = catalog, name
        place = catalog.drops_folder(name)
        make = f"make it with {command_line('dedup', catalog.folder, '…', name=name)} or `tailwise filter …`"
        remedy = f"{user} was made without it: restore {place}" if user else make
        self.manifest = read_manifest(place, "drop list", remedy)
        self.folder = finished_folder(place, self.manifest["identity"])
        self.kind: str = self.manifest["identity"]["kind"]
        self.without: list[str] = list(self.config["without"])
        self.clustering: str | None = self.config.get("clustering")

    @cached_property
    def mask(self) -> RowColumn:
        """Which rows it drops, those of `without` not among them: bool [N]."""
        return self.row_column(layout.DROPPED, np.bool_)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield some columns of all dropped rows, in pieces, ascending."""
        with pq.ParquetFile(check_file(self.folder / layout.DROPPED_TABLE)) as file:
            yield from file.iter_batches(columns=list(columns))

    def tables(self, rows: slice) -> pa.Table:
        """Return the dropped rows among some rows, and the reasons: DROPPED_SCHEMA."""
        return read_drops(self.folder, rows)


def read_drops(folder: Path, rows: slice, columns: Sequence[str] | None = None) -> pa.Table:
    """Return some columns of the dropped rows among some rows, from the folder of a drop list."""
    within = [("row", ">=", rows.start), ("row", "<", rows.stop)]
    return pq.read_table(check_file(folder / layout.DROPPED_TABLE), columns=columns, filters=within)


class Survivors:
    """Rows of a snapshot that are left by drop lists, by the lists that these were made without, and by removals.

    Attributes:
        snapshot: whose rows.
        lists: all of them, each once, earlier ones first.
        removals: of the snapshot.
        inputs: name and hash of each, for the inputs of an artifact.
    """

    def __init__(
        self,
        catalog: Catalog,
        without: Sequence[str],
        snapshot: Snapshot,
        users: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """Opens the lists.

        `users`: what was made without them, and with which inputs: the lists must be the same still.

        Raises:
            UserError: there is no such list, it was made for another snapshot, or it isn't the one that was used.
        """
        self.snapshot, self.lists = snapshot, list[DropList]()
        self._open(catalog, without, snapshot, users or {})
        self.removals = Removals.of(catalog, snapshot)
        self.inputs = {WITHOUT + item.name: item.id for item in self.lists}
        if self.removals.id is not None:
            self.inputs[REMOVALS] = self.removals.id

    def _open(
        self, catalog: Catalog, names: Sequence[str], snapshot: Snapshot, users: Mapping[str, Mapping[str, str]]
    ) -> None:
        for name in names:
            used = {user: inputs[WITHOUT + name] for user, inputs in users.items() if WITHOUT + name in inputs}
            known = next((item for item in self.lists if item.name == name), None)
            opened = known or DropList(catalog, name, next(iter(used), None))
            for user, identity in used.items():
                if identity != opened.id:
                    raise UserError(
                        f"the drop list {name!r} is not the one that {user} was made without: it was rebuilt since; restore "
                        f"the old {opened.folder}, or rebuild {user}"
                    )
            if known is not None:
                continue
            if opened.snapshot.number != snapshot.number:
                raise UserError(
                    f"the drop list {name!r} was made for snapshot {opened.snapshot.number}, and this is for {snapshot.number}: "
                    "make it for that snapshot too, under another name (dedup: `extends`)"
                )
            self._open(catalog, opened.without, snapshot, {f"the drop list {name!r}": opened.inputs})
            self.lists.append(opened)

    @property
    def pool(self) -> int:
        """Number of samples of the pool: all of the snapshot that are not removed, dropped or not. `keep` is a share of it."""
        return self.snapshot.rows - len(self.removals.rows)

    @property
    def all(self) -> bool:
        """True if no row is left out."""
        return not self.lists and self.removals.id is None

    def keeps(self, rows: slice) -> npt.NDArray[np.bool_]:
        """Which of some rows survive: bool [n]."""
        kept = self.removals.keeps(rows)
        for item in self.lists:
            kept &= ~item.mask[rows]
        return kept
