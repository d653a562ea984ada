"""Scores: one number for each sample, from which filters, plans and dedups choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.files import digest, map_array, write_array
from tailwise.catalog.kinds import SCORE


def plain_name(name: str) -> str:
    """A score's name as a part of the name of an artifact: columns may have any name, folders not."""
    return "".join(letter if letter.isalnum() or letter in "_-" else "-" for letter in name)


def score_artifact(catalog: Catalog, name: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> Artifact:
    """Return the artifact of a score, made or not: scores of one name may differ in options and inputs."""
    folder = SCORE.path(catalog.folder, f"{plain_name(name)}-{digest([config, inputs])[:12]}")
    return Artifact(folder, "score", config, inputs)


@dataclass(frozen=True)
class ScoreFiles:
    """The files of a score, finished or not.

    Attributes:
        folder: that holds them.
    """

    folder: Path

    def path(self, part: Part) -> Path:
        """The file of one part."""
        return layout.part_column(self.folder, layout.SCORE, part.name)

    def read(self, part: Part) -> npt.NDArray[np.float32]:
        """The score of each row of a part: float32 [n], mapped; NaN where a row has none."""
        return map_array(self.path(part))

    def write(self, part: Part, values: npt.NDArray[Any]) -> None:
        """Writes one part, as float32."""
        write_array(self.path(part), np.asarray(values).astype(np.float32))

    def repetition(self, number: int | str) -> Path:
        """The file of one repetition of a score that is an average; "*" is a pattern for all."""
        return self.folder / f"{layout.REPETITION}{number}{layout.ARRAY}"
