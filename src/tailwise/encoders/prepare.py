"""Encoded images of unknown origin, and captions, to a model's tensors. What cannot be decoded or preprocessed gets a reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from tailwise.encoders.encoder import Fault, Inputs, Tensors
from tailwise.errors import UserError
from tailwise.shards.decode import UNREADABLE, ImageError, decode_rgb

NO_WORDS = "empty caption"
DECODED_PIXELS = 1 << 25  # decoded at a time, 100 MB as RGB: a batch of photos of 12 megapixels would be gigabytes


@dataclass(frozen=True)
class ImagePreparation:
    """Makes a model's tensors from encoded images."""

    preprocess: Callable[[Sequence[Image.Image]], Tensors]  # the model's preprocessing: n RGB images → tensors [n, …]

    def __call__(self, items: Sequence[bytes]) -> Inputs:
        """Return the inputs of the images, as `Side.prepare`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the model's preprocessing gives thousands in a web pool
            faults: dict[int, Fault] = {}
            done = [tensors for images in _decoded(items, faults) if (tensors := self._preprocess(images, faults))]
            if len(done) < 2:
                return Inputs(done[0] if done else {}, faults)
            return Inputs({name: torch.cat([tensors[name] for tensors in done]) for name in done[0]}, faults)

    def _preprocess(self, images: dict[int, Image.Image], faults: dict[int, Fault]) -> Tensors:
        """Return tensors of the images that the model's preprocessing accepts; add the faults of the others."""
        try:
            return self.preprocess(list(images.values()))
        except Exception:  # noqa: BLE001  (an image that the model's preprocessing refuses is found below)
            faults |= {at: fault for at, image in images.items() if (fault := self._fault(image)) is not None}
        fit = [image for at, image in images.items() if at not in faults]
        try:
            return self.preprocess(fit) if fit else {}
        except Exception as error:
            problem = f"takes each image, but not {len(fit)} at once ({' '.join(str(error).split())[:200]})"
            remedy = "does it bring all to one size? Give `batch_size` 1, or correct its preprocessor_config.json"
            raise UserError(f"the model's preprocessing {problem}: {remedy}") from error

    def _fault(self, image: Image.Image) -> Fault | None:
        try:
            self.preprocess([image])
        except Exception as error:  # noqa: BLE001  (as above)
            return Fault(UNREADABLE, f"{image.width} × {image.height} pixels, preprocessing: {error}")
        return None


def _decoded(items: Sequence[bytes], faults: dict[int, Fault]) -> Iterator[dict[int, Image.Image]]:
    """Yield decoded images by index, about DECODED_PIXELS at once; add the faults of the others."""
    images: dict[int, Image.Image] = {}
    held = 0
    for at, content in enumerate(items):
        try:
            image = decode_rgb(content)
        except ImageError as error:
            faults[at] = Fault(error.reason, error.detail)
            continue
        images[at] = image
        held += image.width * image.height
        if held >= DECODED_PIXELS:
            yield images
            images, held = {}, 0
    if images:
        yield images


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
