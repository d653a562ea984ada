"""Clusterings: which cluster each sample belongs to. A grouping by something else than embeddings is one without centroids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact, artifact_id, find_manifest, read_manifest
from tailwise.catalog.catalog import Catalog, Part, Snapshot
from tailwise.catalog.embeddings import COLUMNS
from tailwise.catalog.files import map_array, read_json, read_table, write_array, write_json, write_table
from tailwise.text import command_line

RAREST_ENTRY = "rarest entry"  # what `group_by_entry` groups by


def clustering_artifact(catalog: Catalog, name: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> Artifact:
    """Return the artifact of a clustering that is to be made."""
    return Artifact(catalog.clusters_folder(name), "clusters", config, inputs)


@dataclass(frozen=True)
class ClusterFiles:
    """The files of a clustering, finished or not.

    Attributes:
        folder: that holds them.
    """

    folder: Path

    def path(self, column: str, part: Part) -> Path:
        """The file of one part of a column: layout.LABEL, SIMILARITY or RANK."""
        return layout.part_column(self.folder, column, part.name)

    def labels(self, part: Part) -> npt.NDArray[np.int32]:
        """The cluster of each row of a part, negative for those in none: int32 [n], mapped."""
        return map_array(self.path(layout.LABEL, part))

    def ranks(self, part: Part) -> npt.NDArray[np.uint32]:
        """The rank of each row in its cluster, in the order of the rows: uint32 [n], mapped."""
        return map_array(self.path(layout.RANK, part))

    def similarities(self, part: Part) -> npt.NDArray[np.float32]:
        """Each row's similarity to its centroid: float32 [n], mapped; only where there are centroids."""
        return map_array(self.path(layout.SIMILARITY, part))

    def write(self, column: str, part: Part, values: npt.NDArray[Any]) -> None:
        """Writes one part of a column."""
        write_array(self.path(column, part), values)

    @property
    def has_centroids(self) -> bool:
        """Whether it is by k-means."""
        return (self.folder / layout.CENTROIDS).exists()

    @property
    def centroids(self) -> npt.NDArray[np.float32]:
        """Unit-norm rows, float32 [K, d], mapped; only where there are any."""
        return map_array(self.folder / layout.CENTROIDS)

    @property
    def fit(self) -> Any:  # noqa: ANN401  (JSON values)
        """The course of the fit of the centroids."""
        return read_json(self.folder / layout.FIT)

    def write_centroids(self, centroids: npt.NDArray[np.float32], fit: Mapping[str, Any]) -> None:
        """Writes centroids, and before them the course of their fit."""
        write_json(self.folder / layout.FIT, fit)
        write_array(self.folder / layout.CENTROIDS, centroids)

    @cached_property
    def table(self) -> pa.Table:
        """One row a cluster: cluster, size, d_intra, d_inter; density if it was asked for; value in a grouping."""
        return read_table(self.folder / layout.CLUSTER_TABLE)

    def write_table(self, table: pa.Table) -> None:
        """Writes the table of clusters."""
        write_table(self.folder / layout.CLUSTER_TABLE, table)


@dataclass(frozen=True, eq=False)
class Clustering(ClusterFiles):
    """A finished clustering.

    Attributes:
        folder: that holds its files.
        catalog: of the samples.
        name: its name in the catalog.
        manifest: of the artifact.
    """

    catalog: Catalog
    name: str
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, catalog: Catalog, name: str, remedy: str | None = None) -> Clustering:
        """Opens it.

        Args:
            catalog: of the samples.
            name: its name in the catalog.
            remedy: where there is none; by default the command that makes one.

        Raises:
            UserError: there is none of this name.
        """
        folder = catalog.clusters_folder(name)
        make = f"make it with {command_line('cluster', catalog.folder, name=name)}"
        return cls(folder, catalog, name, read_manifest(folder, "clustering", remedy or make))

    @classmethod
    def find(cls, catalog: Catalog, name: str | None) -> Clustering | None:
        """Opens it; None if there is none of this name, or no name."""
        manifest = find_manifest(folder := catalog.clusters_folder(name)) if name else None
        return None if manifest is None else cls(folder, catalog, str(name), manifest)

    @property
    def config(self) -> dict[str, Any]:
        """All that decides it."""
        return dict(self.manifest["identity"]["config"])

    @property
    def inputs(self) -> dict[str, str]:
        """Name and hash of each thing that it was made from."""
        return dict(self.manifest["identity"]["inputs"])

    @property
    def summary(self) -> dict[str, Any]:
        """The figures of its manifest."""
        return dict(self.manifest["summary"])

    @property
    def id(self) -> str:
        """The hash that stands for it among the inputs of another artifact."""
        return artifact_id(self.manifest)

    @cached_property
    def snapshot(self) -> Snapshot:
        """The snapshot that it was made for."""
        return self.catalog.snapshot(self.config["snapshot"])

    @property
    def without(self) -> list[str]:
        """Names of the drop lists that it was made without, as given."""
        return list(self.config.get("without", ()))

    @property
    def column(self) -> str | None:
        """The embedding column that it is by; None for a grouping."""
        return self.config.get("column")

    @property
    def embeddings_changed(self) -> bool:
        """Whether its embeddings are others now."""
        return self.inputs["embeddings"] != self.catalog.embedding_id(str(self.column), self.snapshot)

    def parts(self, column: str) -> Iterator[npt.NDArray[Any]]:
        """One column, part by part, mapped: layout.LABEL, SIMILARITY or RANK."""
        return (map_array(self.path(column, part)) for part in self.catalog.parts(self.snapshot))

    @property
    def values(self) -> list[str | None] | None:
        """What the groups of a grouping stand for; None for other clusterings."""
        return self.table.column("value").to_pylist() if "value" in self.table.column_names else None

    @property
    def why_none(self) -> str:
        """Why a row that nothing dropped belongs to no cluster."""
        if self.column in COLUMNS:
            return f"no {self.column} embedding"
        group_by = self.config.get("group_by")
        if group_by == RAREST_ENTRY:
            return "no entry of the list in its caption"
        return "in no group" if group_by is None else f"no value of {group_by}"
