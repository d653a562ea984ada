"""Which of several captions a draw uses: a function of (seed, epoch, row) and the weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tailwise.catalog.captions import ORIGINAL, find_captions
from tailwise.catalog.catalog import Catalog
from tailwise.kernels.keyed import hash_each, stream_key


class Chosen(NamedTuple):
    """Captions of n draws."""

    texts: list[str | None]  # None for a sample's own
    names: list[str]  # of the captions that are used
    lacking: int  # draws of captions that the sample does not have: its own is used


class CaptionMix:
    """Captions by name, and the share of the draws that uses each. May be pickled.

    Attributes:
        names: of the captions, sorted.
    """

    def __init__(self, catalog: Catalog, weights: Mapping[str, float], seed: int) -> None:
        """Open the captions; a UserError if the catalog lacks some. `weights` are those of `caption_weights`."""
        self.names, self._seed = sorted(weights), seed
        self._ends = np.cumsum([weights[name] for name in self.names])[:-1]
        self._captions = [find_captions(catalog, name) for name in self.names]

    @property
    def ids(self) -> dict[str, str]:
        """Hash of each of the captions, without samples' own."""
        return {captions.name: captions.id for captions in self._captions if captions is not None}

    def choose(self, rows: npt.NDArray[np.int64], epochs: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """Return the number, in `names`, of the captions that each draw uses: int64 [n]; of rows and epochs [n]."""
        places = np.empty(len(rows))
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            places[mine] = (hash_each(stream_key(self._seed, "captions", epoch), rows[mine]) >> np.uint64(11)) / 2.0**53
        return np.searchsorted(self._ends, places, side="right")

    def of(self, rows: npt.NDArray[np.int64], epochs: npt.NDArray[np.int32]) -> Chosen:
        """Return the captions of draws, by their rows and epochs [n]."""
        numbers = self.choose(rows, epochs)
        texts: list[str | None] = [None] * len(rows)
        names, lacking = [ORIGINAL] * len(rows), 0
        for number, captions in enumerate(self._captions):
            mine = np.flatnonzero(numbers == number)
            for at, text in zip(mine.tolist(), captions.of(rows[mine]) if captions else (), strict=False):
                lacking += text is None
                if text is not None:
                    texts[at], names[at] = text, self.names[number]
        return Chosen(texts, names, lacking)
