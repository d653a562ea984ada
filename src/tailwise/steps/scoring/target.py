"""Target sets: embeddings of what a model should be good at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog
from tailwise.catalog.embeddings import column_settings, normalise_rows, other_models
from tailwise.catalog.files import digest, file_digest
from tailwise.errors import UserError
from tailwise.kernels.grid import row_chunks
from tailwise.kernels.scores import MAX_TARGETS
from tailwise.sources.clip_retrieval import find_partitions
from tailwise.sources.embedding_files import StoredRows

TARGET_ROWS = 2048


class Target:
    """A target set of image embeddings: a .npy file [T, d], a folder in clip-retrieval layout, or a catalog."""

    def __init__(self, path: str, option: str = "target") -> None:
        self.option, self.path = f"`{option}`", Path(path).expanduser()
        self.blocks: Sequence[Any]
        self.files: list[Path] = [self.path] if self.path.is_file() else []
        self._settings: Mapping[str, Any] = {}  # of the encoder, where it is known
        if (self.path / layout.HEADER).exists():
            catalog = Catalog.open(self.path)
            snapshot = catalog.snapshot()
            self.blocks = catalog.embedding_parts("image", snapshot)
            self.id = catalog.embedding_id("image", snapshot)
            self._settings = column_settings(catalog, "image")
            return
        if self.path.is_dir():
            self.files = [partition.path for partition in find_partitions(self.path).get("image", [])]
        if not self.files:
            raise UserError(
                f"{self.option} {path}: give a .npy file of image embeddings, a folder with img_emb/, or another catalog"
            )
        try:
            self.blocks = [StoredRows.of_file(file) for file in self.files]
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{self.option} {path} can't be read as .npy: {error}") from error
        self.id = digest([file_digest(file) for file in self.files])

    def check(self, dimension: int, settings: Mapping[str, Any] | None = None) -> None:
        """Refuse what is not T rows of `dimension` numbers, or not of the encoder of a column with these settings."""
        if names := other_models(self._settings, settings or {}):
            models = [
                ", ".join(f"{name} {made.get(name)}" for name in names) for made in (self._settings, settings or {})
            ]
            raise UserError(
                f"{self.option} {self.path} was embedded by {models[0]}, and the catalog's images by {models[1]}: give embeddings of the "
                "same encoder"
            )
        for block in self.blocks:
            if len(block.shape) != 2 or block.shape[1] != dimension or block.dtype.kind != "f":
                raise UserError(
                    f"{self.option} {self.path} holds {block.dtype} {list(block.shape)}, and the catalog's image embeddings have "
                    f"{dimension} dimensions: give embeddings of the same encoder, float16 or float32 [T, {dimension}]"
                )
        rows = sum(map(len, self.blocks))
        if rows and not next(self.pieces(), np.empty(0)).size:
            raise UserError(
                f"{self.option} {self.path}: not one of its {rows:,} rows is an embedding: all are zero, or hold NaN or Inf"
            )
        if not 1 <= rows <= MAX_TARGETS:
            raise UserError(f"{self.option} {self.path}: must hold between 1 and {MAX_TARGETS:,} embeddings")

    def pieces(self) -> Iterator[npt.NDArray[np.float16]]:
        """Its rows scaled to unit norm, in pieces that are not empty; those that can't be scaled are left out."""
        for _, chunk in row_chunks(self.blocks, TARGET_ROWS):
            rows, _ = normalise_rows(np.asarray(chunk))
            if (good := rows.any(axis=1)).any():
                yield rows[good]
