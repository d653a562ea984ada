"""Captions to tokens of a text model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tailwise.encoders.encoder import Fault, Inputs, Tensors

NO_WORDS = "empty caption"


@dataclass(frozen=True)
class CaptionPreparation:
    """Makes a model's tensors from captions. A caption with the tokens of "" gets no embedding."""

    tokenise: Callable[[list[str], int], Tensors]  # n captions, L → tensors [n, L], padded and truncated for the model
    tokens: str  # name of the tensor that holds the tokens
    length: int  # L of the model

    def __call__(self, items: Sequence[str]) -> Inputs:
        """Return the inputs of the captions, as `Side.prepare`."""
        tensors = self.tokenise(["", *items], self.length)
        tokens = tensors[self.tokens]
        said = (tokens[1:] != tokens[0]).any(dim=1)
        faults = {
            at: Fault(NO_WORDS, "nothing that the tokenizer knows" if items[at].strip() else "no words")
            for at in torch.nonzero(~said)[:, 0].tolist()
        }
        fit = torch.nonzero(said)[:, 0] + 1
        fit_tensors = {name: value[fit] for name, value in tensors.items()} if len(fit) else {}
        return Inputs(fit_tensors, faults, self._truncated(items, tokens))

    def _truncated(self, items: Sequence[str], tokens: Tensor) -> int:
        """Return the number of captions with more than L tokens: among those that fill all L, those whose tokens change with L + 1.

        The end token may also be the padding (CLIP and SigLIP of transformers), so the token before it shows whether a row is full.
        """
        filled = (tokens[1:, -2:] != tokens[0, -2:]).any(dim=1)
        full = [items[at] for at in torch.nonzero(filled)[:, 0].tolist()]
        if not full:
            return 0
        longer = self.tokenise(["", *full], self.length + 1)[self.tokens]
        goes_on = longer[1:, -1] != longer[0, -1]
        other = (longer[1:, :-1] != tokens[1:][filled]).any(dim=1)  # a token instead of the end token
        return int((goes_on | other).sum())
