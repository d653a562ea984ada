"""Encoded images of unknown origin to a model's tensors. Images that cannot be decoded or preprocessed get a reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from tailwise.encoders.encoder import Fault, Inputs, Tensors
from tailwise.errors import UserError
from tailwise.shards.decode import UNREADABLE, ImageError, decode_rgb

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
