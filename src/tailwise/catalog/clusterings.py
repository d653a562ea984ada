"""Clusterings: the cluster of each sample. A grouping by a column is a clustering without centroids."""

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
from tailwise.catalog.artifacts import Artifact, FinishedArtifact, find_manifest, finished_folder, read_manifest
from tailwise.catalog.catalog import Catalog
from tailwise.catalog.columns import PartColumn
from tailwise.catalog.files import map_array, read_json, read_table, write_array, write_json, write_table
from tailwise.notebook import GREY, areas, shown
from tailwise.text import command_line

RAREST_ENTRY, RAREST_CONCEPT = "rarest entry", "rarest concept"  # what `group_by_entry` and `group_by_concept` group by


def clustering_artifact(catalog: Catalog, name: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> Artifact:
    """Return the artifact of a new clustering."""
    return Artifact(catalog.clusters_folder(name), "clusters", config, inputs)


@dataclass(frozen=True)
class ClusterFiles:
    """The files of a clustering, finished or not."""

    folder: Path  # of the artifact

    @property
    def labels(self) -> PartColumn:
        """Cluster of each row, negative for rows without a cluster: int32."""
        return PartColumn(self.folder, layout.LABEL)

    @property
    def similarities(self) -> PartColumn:
        """Similarity of each row to its centroid: float32; missing without centroids."""
        return PartColumn(self.folder, layout.SIMILARITY)

    @property
    def ranks(self) -> PartColumn:
        """Rank of each row in its cluster, by row number: uint32, or uint64 (see `appearance_ranks`)."""
        return PartColumn(self.folder, layout.RANK)

    @property
    def has_centroids(self) -> bool:
        """True for a clustering by k-means, False for a grouping."""
        return (self.folder / layout.CENTROIDS).exists()

    @property
    def centroids(self) -> npt.NDArray[np.float32]:
        """Centroids, mapped: float32 [K, d], unit-norm rows."""
        return map_array(self.folder / layout.CENTROIDS)

    @property
    def fit(self) -> Any:  # noqa: ANN401  (JSON values)
        """Figures of the fit of the centroids."""
        return read_json(self.folder / layout.FIT)

    def write_centroids(self, centroids: npt.NDArray[np.float32], fit: Mapping[str, Any]) -> None:
        """Write the figures of a fit, then its centroids."""
        write_json(self.folder / layout.FIT, fit)
        write_array(self.folder / layout.CENTROIDS, centroids)

    @cached_property
    def table(self) -> pa.Table:
        """One row per cluster: cluster, size, d_intra, d_inter; also density if requested, value in a grouping."""
        return read_table(self.folder / layout.CLUSTER_TABLE)

    def write_table(self, table: pa.Table) -> None:
        """Write the table of clusters."""
        write_table(self.folder / layout.CLUSTER_TABLE, table)


@dataclass(frozen=True, eq=False)
class Clustering(FinishedArtifact, ClusterFiles):
    """A finished clustering."""

    catalog: Catalog
    name: str
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, catalog: Catalog, name: str, remedy: str | None = None) -> Clustering:
        """Open a finished clustering.

        `remedy`: end of the error message; by default the command that makes the clustering.

        Raises:
            NotFoundError: there is no clustering of this name.
        """
        folder = catalog.clusters_folder(name)
        make = f"make it with {command_line('cluster', catalog.folder, name=name)}"
        return cls._of(catalog, name, read_manifest(folder, "clustering", remedy or make))

    @classmethod
    def find(cls, catalog: Catalog, name: str | None) -> Clustering | None:
        """Open a finished clustering; None if there is none of this name, or no name is given."""
        manifest = find_manifest(catalog.clusters_folder(name)) if name else None
        return None if manifest is None else cls._of(catalog, str(name), manifest)

    @classmethod
    def _of(cls, catalog: Catalog, name: str, manifest: Mapping[str, Any]) -> Clustering:
        return cls(finished_folder(catalog.clusters_folder(name), manifest["identity"]), catalog, name, manifest)

    def _repr_html_(self) -> str:
        sizes = np.sort(self.table.column("size").to_numpy())[::-1]
        of = {"column": self.column, "grouped by": self.config.get("group_by"), "without": ", ".join(self.without)}
        facts = {"clusters": len(sizes), "samples in clusters": int(sizes.sum()), **of}
        if len(sizes):
            facts["sizes"] = f"{sizes[-1]:,} … {sizes[0]:,}, median {np.median(sizes):,.0f}"
        return shown(f"clustering {self.name}", facts, areas({"samples": (GREY, sizes)}))

    @property
    def without(self) -> list[str]:
        """Names of the drop lists whose samples are in no cluster, as given."""
        return list(self.config.get("without", ()))

    @property
    def column(self) -> str | None:
        """Embedding column that was clustered; None for a grouping."""
        return self.config.get("column")

    @property
    def embeddings_changed(self) -> bool:
        """True if the embeddings were replaced since."""
        return self.inputs["embeddings"] != self.catalog.embedding_id(str(self.column), self.snapshot)

    def parts(self, column: str) -> Iterator[npt.NDArray[Any]]:
        """Return a column (layout.LABEL, SIMILARITY or RANK), part by part, mapped."""
        return (PartColumn(self.folder, column).read(part) for part in self.catalog.parts(self.snapshot))

    @property
    def values(self) -> list[str | None] | None:
        """Value of each group of a grouping; None for other clusterings."""
        return self.table.column("value").to_pylist() if "value" in self.table.column_names else None

    @property
    def why_none(self) -> str:
        """Reason why a row that no list dropped is in no cluster."""
        if self.column is not None:
            return f"no {self.column} embedding"
        group_by = self.config.get("group_by")
        if group_by == RAREST_ENTRY:
            return "no entry of the list in its caption"
        if group_by == RAREST_CONCEPT:
            return "no concept in its list"
        return "in no group" if group_by is None else f"no value of {group_by}"
