"""Hashes of images: of their encoded bytes, or of their decoded pixels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Catalog
from tailwise.catalog.columns import PartColumn
from tailwise.catalog.files import digest
from tailwise.catalog.kinds import HASHES


def hashes_artifact(catalog: Catalog, config: Mapping[str, Any], inputs: Mapping[str, str]) -> Artifact:
    """Return the artifact of hashes, named by what is hashed and a hash of configuration and inputs."""
    folder = HASHES.path(catalog.folder, f"{config['of']}-{digest([config, inputs])[:12]}")
    return Artifact(folder, "hashes", config, inputs)


def hash_column(folder: Path) -> PartColumn:
    """Return the column of hashes: uint64 [rows, 2], zeros for images without one."""
    return PartColumn(folder, layout.HASH)
