"""Captions to a text model's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tailwise.encoders.encoder import Fault, Inputs, Tensors

NO_WORDS = "empty caption"


@dataclass(frozen=True)
class CaptionPreparation:
    """From captions to a model's tensors. A caption that says no more than "" gets no embedding.

    Attributes:
        tokenise: n captions, L → tensors [n, L], padded and truncated as the model wants it.
        tokens: which of the tensors holds the tokens.
        length: L of the model.
    """

    tokenise: Callable[[list[str], int], Tensors]
    tokens: str
    length: int

    def __call__(self, items: Sequence[str]) -> Inputs:
        """As `Side.prepare` has it."""
        tensors = self.tokenise(["", *items], self.length)
        tokens = tensors[self.tokens]
        said = (tokens[1:] != tokens[0]).any(dim=1)
        faults = {
            at: Fault(NO_WORDS, "nothing that the tokenizer knows" if items[at].strip() else "no words")
            for at in torch.nonzero(~said)[:, 0].tolist()
        }
        fit = torch.nonzero(said)[:, 0] + 1
        return Inputs(
            {name: value[fit] for name, value in tensors.items()} if len(fit) else {},
            faults,
            self._truncated(items, tokens),
        )

    def _truncated(self, items: Sequence[str], tokens: Tensor) -> int:
        """How many captions have more than L tokens: of those that fill all L, how many read differently where there is room for one more.

        The end itself may be what is padded with (CLIP and SigLIP of transformers): it can't tell whether a row is full, the token before
        it does.
        """
        filled = (tokens[1:, -2:] != tokens[0, -2:]).any(dim=1)
        full = [items[at] for at in torch.nonzero(filled)[:, 0].tolist()]
        if not full:
            return 0
        longer = self.tokenise(["", *full], self.length + 1)[self.tokens]
        goes_on = longer[1:, -1] != longer[0, -1]
        other = (longer[1:, :-1] != tokens[1:][filled]).any(dim=1)  # in place of an end
        return int((goes_on | other).sum())
