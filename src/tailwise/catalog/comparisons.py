"""Comparisons: the most similar earlier member of each sample's cluster, from which every ε of dedup is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Catalog
from tailwise.catalog.files import create_array, digest, map_array
from tailwise.catalog.kinds import COMPARISON
from tailwise.storage.local import replacing


def comparison_artifact(catalog: Catalog, config: Mapping[str, Any], inputs: Mapping[str, str]) -> Artifact:
    """Return the artifact of a comparison, named by the hash of its configuration and inputs."""
    return Artifact(COMPARISON.path(catalog.folder, digest([config, inputs])), "neighbours", config, inputs)


class Neighbours:
    """The most similar earlier member of each sample's cluster, flat over the snapshot.

    Attributes:
        folder: of the artifact.
        similarity: float64 [N], mapped: 1 if they are identical; NOTHING_EARLIER where there is none, and for samples that aren't
            judged.
        row: int64 [N], mapped: which row that is, −1 where there is none.
    """

    def __init__(self, folder: Path) -> None:
        """Open the files in an artifact's folder."""
        self.folder = folder
        self.similarity: npt.NDArray[np.float64] = map_array(folder / layout.NEAREST_SIMILARITY)
        self.row: npt.NDArray[np.int64] = map_array(folder / layout.NEAREST_ROW)

    @staticmethod
    def are_written(folder: Path) -> bool:
        """Return True if both files exist: the similarities are published last."""
        return (folder / layout.NEAREST_SIMILARITY).exists()

    @staticmethod
    @contextmanager
    def writing(folder: Path, rows: int) -> Iterator[tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]]:
        """Yield similarity and row, mapped for writing, of N rows; publish both files at the end of the block."""
        with (
            replacing(folder / layout.NEAREST_SIMILARITY) as similarity_path,
            replacing(folder / layout.NEAREST_ROW) as row_path,
        ):
            yield create_array(similarity_path, (rows,), np.float64), create_array(row_path, (rows,), np.int64)
