"""Encoded images of unknown origin to RGB, as training sees them; what can't be, is refused with a reason.

Training's decoders (open_clip's, the loader's) are `Image.open(…).convert("RGB")`, and so is this one: the first frame of an animation,
no rotation by EXIF, transparency dropped. It differs where that is useless or dangerous: 16-bit greys are scaled, not clipped to white;
the size is looked at before anything is decoded; and only raster formats are opened (Pillow hands EPS to Ghostscript, and that runs it).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError

from tailwise.encoders.encoder import Fault, Inputs, Tensors
from tailwise.errors import UserError

MOST_PIXELS = 89_478_485  # from which on Pillow warns of a decompression bomb: 256 MB as RGB
DECODED_PIXELS = (
    1 << 25
)  # of originals held at a time, 100 MB as RGB: a batch of photos of 12 megapixels would be gigabytes
MOST_ASPECT = (
    200  # longer by shorter side; one pixel by 65,535 would become 10 GB when its shorter side is resized to 224
)
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "ICO", "PPM")

UNREADABLE = "unreadable image"
NO_IMAGE = "not an image"
TOO_LARGE = "image of too many pixels"
TOO_NARROW = "image of extreme aspect ratio"

_SIXTEEN_BITS = 65_535


def decode_image(content: bytes) -> Image.Image | Fault:
    """One encoded image as RGB, or why it can't be."""
    try:
        image = Image.open(io.BytesIO(content), formats=_formats())
        return _size_fault(*image.size) or _to_rgb(image)
    except UnidentifiedImageError:  # whose message holds an address in memory
        return Fault(NO_IMAGE, _what(content))
    except Image.DecompressionBombError as error:
        return Fault(TOO_LARGE, str(error))
    except Exception as error:  # noqa: BLE001  (broken images make decoders raise anything)
        return Fault(UNREADABLE, str(error) or type(error).__name__)


@dataclass(frozen=True)
class ImagePreparation:
    """From encoded images to a model's tensors.

    Attributes:
        preprocess: the model's own: n RGB images → tensors [n, …].
    """

    preprocess: Callable[[Sequence[Image.Image]], Tensors]

    def __call__(self, items: Sequence[bytes]) -> Inputs:
        """As `Side.prepare` has it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of odd metadata: thousands in a web pool
            faults: dict[int, Fault] = {}
            done = [tensors for images in _decoded(items, faults) if (tensors := self._preprocess(images, faults))]
            if len(done) < 2:
                return Inputs(done[0] if done else {}, faults)
            return Inputs({name: torch.cat([tensors[name] for tensors in done]) for name in done[0]}, faults)

    def _preprocess(self, images: dict[int, Image.Image], faults: dict[int, Fault]) -> Tensors:
        """Tensors of the images that the model's preprocessing takes; adds the faults of the others.

        Raises:
            UserError: it takes each, but not all at once.
        """
        try:
            return self.preprocess(list(images.values()))
        except Exception:  # noqa: BLE001  (of one image that the model's preprocessing can't take: found below)
            faults |= {at: fault for at, image in images.items() if (fault := self._fault(image)) is not None}
        fit = [image for at, image in images.items() if at not in faults]
        try:
            return self.preprocess(fit) if fit else {}
        except Exception as error:
            raise UserError(
                f"the model's preprocessing takes each image, but not {len(fit)} at once ({' '.join(str(error).split())[:200]}): does "
                "it bring all to one size? Give --batch-size 1, or mend its preprocessor_config.json"
            ) from error

    def _fault(self, image: Image.Image) -> Fault | None:
        try:
            self.preprocess([image])
        except Exception as error:  # noqa: BLE001  (as above)
            return Fault(UNREADABLE, f"{image.width} × {image.height} pixels, preprocessing: {error}")
        return None


def _decoded(items: Sequence[bytes], faults: dict[int, Fault]) -> Iterator[dict[int, Image.Image]]:
    """Images by index, as many at once as have DECODED_PIXELS; adds the faults of the others."""
    images: dict[int, Image.Image] = {}
    held = 0
    for at, content in enumerate(items):
        image = decode_image(content)
        if isinstance(image, Fault):
            faults[at] = image
            continue
        images[at] = image
        held += image.width * image.height
        if held >= DECODED_PIXELS:
            yield images
            images, held = {}, 0
    if images:
        yield images


def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # AVIF: not in every Pillow


def _size_fault(width: int, height: int) -> Fault | None:
    if width * height > MOST_PIXELS:
        return Fault(TOO_LARGE, f"{width} × {height} pixels, more than {MOST_PIXELS:,}")
    if max(width, height) > MOST_ASPECT * min(width, height):
        return Fault(TOO_NARROW, f"{width} × {height} pixels, beyond 1 : {MOST_ASPECT}")
    return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in {"I", "F"} or image.mode.startswith("I;16"):
        return Image.fromarray(_to_bytes(np.asarray(image))).convert("RGB")
    return image.convert("RGB")


def _to_bytes(values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """Grey values of 16 bits, or of whatever range, to 0 … 255: [h, w]."""
    if values.dtype.kind == "u":
        top = _SIXTEEN_BITS
    else:
        # 32-bit integers and floats don't tell their range: it is the least usual one that holds them.
        greatest = float(np.nanmax(values))
        ranges = (1, 255, _SIXTEEN_BITS) if values.dtype.kind == "f" else (255, _SIXTEEN_BITS)
        top = next((bound for bound in ranges if greatest <= bound), 0)
        if not top:
            raise ValueError(f"grey values up to {greatest:g}, more than 16 bits")
    scaled = np.nan_to_num(values.astype(np.float64) * (255 / top))
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


def _what(content: bytes) -> str:
    """What bytes that are no image are, for people."""
    if not content:
        return "0 bytes"
    head = content[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in head:
        return "SVG"
    if head.startswith((b"<!doctype html", b"<html")) or b"<body" in head:
        return "HTML"
    if head.startswith(b"%!ps"):
        return "PostScript"
    return f"begins with {content[:8]!r}"
