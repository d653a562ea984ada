"""Comparisons: the most similar earlier member of each sample's cluster, from which every ε of dedup is read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact, FinishedArtifact, read_manifest
from tailwise.catalog.catalog import Catalog
from tailwise.catalog.columns import RowColumn
from tailwise.catalog.files import digest
from tailwise.catalog.kinds import COMPARISON


def comparison_artifact(catalog: Catalog, config: Mapping[str, Any], inputs: Mapping[str, str]) -> Artifact:
    """Return the artifact of a comparison, named by the hash of its configuration and inputs."""
    return Artifact(COMPARISON.path(catalog.folder, digest([config, inputs])), "neighbours", config, inputs)


class Neighbours(FinishedArtifact):
    """The most similar earlier member of each sample's cluster."""

    def __init__(self, catalog: Catalog, folder: Path) -> None:
        """Open a finished comparison, whose folder this is."""
        self.catalog, self.folder = catalog, folder
        self.manifest = read_manifest(folder, "comparison", "repeat the command")

    @cached_property
    def similarity(self) -> RowColumn:
        """Similarity to it, float64 [N]: 1 for identical ones; NOTHING_EARLIER where there is none, and for samples that aren't judged."""
        return self.row_column(layout.SIMILARITY, np.float64)

    @cached_property
    def row(self) -> RowColumn:
        """Its row, int64 [N]; −1 where there is none."""
        return self.row_column(layout.NEAREST_ROW, np.int64)
