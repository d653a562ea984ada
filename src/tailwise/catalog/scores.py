"""Scores: one number for each sample, from which filters, plans and dedups choose."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Catalog
from tailwise.catalog.columns import PartColumn
from tailwise.catalog.files import digest
from tailwise.catalog.kinds import SCORE, plain_name


def score_artifact(catalog: Catalog, name: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> Artifact:
    """Return the artifact of a score, named by the score and a hash of its options and inputs."""
    folder = SCORE.path(catalog.folder, f"{plain_name(name)}-{digest([config, inputs])[:12]}")
    return Artifact(folder, "score", config, inputs)


def score_column(folder: Path) -> PartColumn:
    """Return the column of a score: float32, NaN for rows without one."""
    return PartColumn(folder, layout.SCORE)


def repetition(folder: Path, number: int | str) -> Path:
    """Return the file of one repetition of an averaged score; "*" gives a pattern for all."""
    return folder / f"{layout.REPETITION}{number}{layout.ARRAY}"
