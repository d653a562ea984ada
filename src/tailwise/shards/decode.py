"""The only decoder of encoded images: the loader, `evaluate`, `compare` and `embed` get the same pixels, or the same error.

The result is that of `Image.open(…).convert("RGB")`: the first frame of an animation, no rotation by EXIF, no transparency.
There are three differences, because images come from the web. Only FORMATS are opened: Pillow passes EPS to Ghostscript, which runs it.
The size is checked before anything is decoded. Greys of more than 8 bits are scaled, not clipped to white.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from tailwise.text import plain

MOST_PIXELS = 1 << 25  # 33.5 million; decoding takes 4 to 16 bytes a pixel (PNG to WebP)
MOST_BYTES = 1 << 27  # encoded: more than an uncompressed image of MOST_PIXELS has
MOST_ASPECT = 200  # longer by shorter side; one pixel by 65,535 becomes 10 GB when its shorter side is resized to 224
MOST_SCANS = 100  # of a JPEG; each passes over all pixels, and an encoder writes about 10
# Web pages show these, or scanners write them. Others start programs (EPS), hold an image whose own header gives another size (ICO,
# ICNS), or take too much memory (JPEG 2000).
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "PPM")

UNREADABLE = "unreadable image"
NOT_AN_IMAGE = "not an image"
TOO_LONG = "image of too many bytes"
TOO_LARGE = "image of too many pixels"
TOO_NARROW = "image of extreme aspect ratio"
REASONS = (UNREADABLE, NOT_AN_IMAGE, TOO_LONG, TOO_LARGE, TOO_NARROW)

_DETAIL_CHARACTERS = 200
_SIXTEEN_BITS = 65_535
_STRIP_ROWS = 64  # of a grey image, scaled at a time: in float64


class ImageError(ValueError):
    """An encoded image that is refused.

    Attributes:
        reason: one of REASONS, for counts.
        detail: the fault of this image, on one line.
    """

    def __init__(self, reason: str, detail: str) -> None:
        """Take reason and detail; the detail may hold bytes of the image."""
        self.reason, self.detail = reason, plain(" ".join(detail.split()))[:_DETAIL_CHARACTERS]
        super().__init__(f"{self.reason}: {self.detail}")

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return ImageError, (self.reason, self.detail)


def too_long(size_bytes: int) -> ImageError | None:
    """Return the error of an encoded image of this size, before it is read; None if the size is allowed."""
    if size_bytes <= MOST_BYTES:
        return None
    return ImageError(TOO_LONG, f"{size_bytes:,} bytes, more than {MOST_BYTES:,}")


def decode_rgb(encoded: bytes) -> Image.Image:
    """Return an encoded image in RGB; raise an ImageError if its format is not allowed or it is too long, large, narrow, or broken."""
    if (error := too_long(len(encoded))) is not None:
        raise error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata and large sizes: thousands in a web pool
        try:
            image = Image.open(io.BytesIO(encoded), formats=_formats())
            _check_size(*image.size)
            if image.format in {"JPEG", "MPO"} and encoded.count(b"\xff\xda") > MOST_SCANS:
                raise ImageError(UNREADABLE, f"more than {MOST_SCANS} scans")
            return _to_rgb(image)
        except ImageError:
            raise
        except UnidentifiedImageError as problem:  # whose message holds an address in memory
            raise ImageError(NOT_AN_IMAGE, _describe(encoded)) from problem
        except Image.DecompressionBombError as problem:
            raise ImageError(TOO_LARGE, str(problem)) from problem
        except Exception as problem:  # broken images make decoders raise anything
            raise ImageError(UNREADABLE, str(problem) or type(problem).__name__) from problem


def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # AVIF: not in every Pillow


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise ImageError(TOO_LARGE, f"{width} × {height} pixels, more than {MOST_PIXELS:,}")
    if max(width, height) > MOST_ASPECT * min(width, height):
        raise ImageError(TOO_NARROW, f"{width} × {height} pixels, beyond 1 : {MOST_ASPECT}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode not in {"I", "F"} and not image.mode.startswith("I;16"):
        return image.convert("RGB")
    image.load()
    strips = [
        (0, top, image.width, min(top + _STRIP_ROWS, image.height)) for top in range(0, image.height, _STRIP_ROWS)
    ]
    greatest = max(float(np.nanmax(np.asarray(image.crop(strip)))) for strip in strips)
    white = _white(np.asarray(image.crop(strips[0])).dtype.kind, greatest)
    grey = Image.new("L", image.size)
    for strip in strips:
        scaled = np.nan_to_num(np.asarray(image.crop(strip)).astype(np.float64) * (255 / white))
        grey.paste(Image.fromarray(np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)), strip)
    return grey.convert("RGB")


def _white(kind: str, greatest: float) -> int:
    """Return the grey value of white; for 32-bit integers and floats, the smallest usual one that is not exceeded."""
    usual = {"u": (_SIXTEEN_BITS,), "i": (255, _SIXTEEN_BITS), "f": (1, 255, _SIXTEEN_BITS)}[kind]
    white = next((value for value in usual if greatest <= value), None)
    if white is None:
        raise ValueError(f"grey values up to {greatest:g}, more than 16 bits")
    return white


def _describe(content: bytes) -> str:
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
