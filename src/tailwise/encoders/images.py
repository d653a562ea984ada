"""Encoded images of unknown origin to RGB, as training sees them; what can't be, is refused with a reason.

Training's decoders (open_clip's, the loader's) are `Image.open(…).convert("RGB")`, and so is this one: the first frame of an animation,
no rotation by EXIF, transparency dropped. It differs where that is useless or dangerous: 16-bit greys are scaled, not clipped to white;
the size is looked at before anything is decoded; and only raster formats are opened (Pillow hands EPS to Ghostscript, and that runs it).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from tailwise.encoders.encoder import Fault, Inputs, Tensors

MOST_PIXELS = 89_478_485  # from which on Pillow warns of a decompression bomb: 256 MB as RGB
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
            decoded = [decode_image(content) for content in items]
            faults = {at: item for at, item in enumerate(decoded) if isinstance(item, Fault)}
            images = {at: item for at, item in enumerate(decoded) if not isinstance(item, Fault)}
            try:
                return Inputs(self.preprocess(list(images.values())) if images else {}, faults)
            except Exception:  # noqa: BLE001  (of one image that the model's preprocessing can't take: found below)
                faults |= {at: fault for at, image in images.items() if (fault := self._fault(image)) is not None}
            fit = [image for at, image in images.items() if at not in faults]
            return Inputs(self.preprocess(fit) if fit else {}, faults)

    def _fault(self, image: Image.Image) -> Fault | None:
        try:
            self.preprocess([image])
        except Exception as error:  # noqa: BLE001  (as above)
            return Fault(UNREADABLE, f"{image.width} × {image.height} pixels, preprocessing: {error}")
        return None


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
