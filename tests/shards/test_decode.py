"""One decoder, one list of formats, one bound: good images as Pillow has them, everything else an ImageError."""

import io
import pickle
import shutil
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from tailwise.shards import decode
from tailwise.shards.decode import MOST_PIXELS, REASONS, ImageError, decode_rgb

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)).resize((24, 20))


def saved(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width, height, *chunks):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


GOOD = {
    "jpeg": saved(PICTURE, "JPEG"),
    "progressive": saved(PICTURE, "JPEG", progressive=True),
    "cmyk": saved(PICTURE.convert("CMYK"), "JPEG"),
    "exif-of-a-megabyte": saved(PICTURE, "JPEG", comment=bytes(60_000), icc_profile=bytes(1_000_000)),
    "png": saved(PICTURE, "PNG"),
    "grey-and-alpha": saved(PICTURE.convert("LA"), "PNG"),
    "palette": saved(PICTURE.quantize(9), "PNG", transparency=3),
    "webp": saved(PICTURE, "WEBP"),
    "animated-webp": saved(PICTURE, "WEBP", save_all=True, append_images=[PICTURE.rotate(90)] * 30),
    "gif": saved(PICTURE.quantize(9), "GIF"),
    "animated-gif": saved(
        PICTURE.quantize(9), "GIF", save_all=True, append_images=[PICTURE.rotate(90).quantize(9)] * 30
    ),
    "animated-png": saved(PICTURE, "PNG", save_all=True, append_images=[PICTURE.rotate(90)] * 30),
    "bmp": saved(PICTURE, "BMP"),
    "tiff": saved(PICTURE, "TIFF"),
    "tiff-of-pages": saved(PICTURE, "TIFF", save_all=True, append_images=[PICTURE.rotate(90)] * 30),
    "mpo": saved(PICTURE, "MPO", save_all=True, append_images=[PICTURE.rotate(90)]),
    "ppm": saved(PICTURE, "PPM"),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_images_have_the_pixels_that_pillow_gives(name):
    found = decode_rgb(GOOD[name])
    assert found.mode == "RGB"
    assert found.tobytes() == Image.open(io.BytesIO(GOOD[name])).convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["uint16", "int32", "float32"])
def test_greys_of_more_than_8_bits_are_scaled(mode):
    grey = np.arange(150 * 40).reshape(150, 40).astype(np.float64) / (
        150 * 40 - 1
    )  # more rows than are scaled at a time
    values = (grey * (1 if mode == "float32" else 65_535)).astype(mode)
    found = np.asarray(decode_rgb(saved(Image.fromarray(values), "TIFF")))
    wanted = np.rint(values.astype(np.float64) * (255 / (1 if mode == "float32" else 65_535))).astype(np.uint8)
    assert (found == wanted[:, :, None]).all()


REFUSED = {
    "EPS": "not an image", "PDF": "not an image", "ICO": "not an image", "ICNS": "not an image", "TGA": "not an image",
    "PCX": "not an image", "SGI": "not an image", "DDS": "not an image", "JPEG2000": "not an image", "XBM": "not an image",
    "IM": "not an image", "SPIDER": "not an image", "QOI": "not an image",
}  # fmt: skip
HEADS = {
    "wmf": b"\xd7\xcd\xc6\x9a" + bytes(40),
    "emf": b"\x01\0\0\0" + bytes(36) + b" EMF" + bytes(100),
    "fits": b"SIMPLE  =                    T".ljust(80) + b"BITPIX  =                    8".ljust(80) + bytes(2800),
    "psd": b"8BPS\0\1" + bytes(6) + b"\0\3" + struct.pack(">II", 4, 4) + b"\0\x08\0\3" + bytes(60),
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "grib": b"GRIB" + bytes(3) + b"\x01" + bytes(100),
    "html": b"<!doctype html><body>404",
    "nothing": b"",
    "one-byte": b"\xff",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_formats_are_refused_by_their_content(kind):
    image = PICTURE.convert("1") if kind == "XBM" else PICTURE.convert("F") if kind == "SPIDER" else PICTURE
    if kind == "ICNS":
        image = image.resize((64, 64))
    with pytest.raises(ImageError) as caught:
        decode_rgb(saved(image, kind))
    assert caught.value.reason == "not an image"


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_other_formats_are_refused(name):
    with pytest.raises(ImageError) as caught:
        decode_rgb(HEADS[name])
    assert caught.value.reason == "not an image"


def test_postscript_starts_nothing(tmp_path, monkeypatch):
    marker = tmp_path / "started"
    for name in ("gs", "gswin64c"):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n: > {marker}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("gs") == str(tmp_path / "gs")
    eps = saved(PICTURE, "EPS")
    for content in (
        eps,
        b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(eps)) + bytes(20) + eps,
    ):  # with a DOS header too
        with pytest.raises(ImageError, match="not an image"):
            decode_rgb(content)
    assert not marker.exists()
    subprocess.run(["gs"], check=True)  # the check above can fail
    assert marker.exists()


BROKEN = {
    "truncated-jpeg": (GOOD["jpeg"][:-40], "unreadable image"),
    "truncated-png": (GOOD["png"][:-30], "unreadable image"),
    "bomb-in-a-comment": (png(4, 4, chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(1 << 26)))), "unreadable image"),
    "bomb-in-a-profile": (png(4, 4, chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(1 << 26)))), "unreadable image"),
    "65,000-squared": (png(65_000, 65_000), "image of too many pixels"),
    "12,000-squared": (png(12_000, 12_000), "image of too many pixels"),
    "just-too-large": (png(1 << 13, (1 << 12) + 1), "image of too many pixels"),
    "1-by-201": (png(1, 201), "image of extreme aspect ratio"),
    "many-scans": (GOOD["progressive"][:-2] + b"\xff\xda\0\2" * 200 + b"\xff\xd9", "unreadable image"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_are_refused_by_reason_without_a_warning(name):
    content, reason = BROKEN[name]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(ImageError) as caught:
            decode_rgb(content)
    assert (caught.value.reason, told) == (reason, [])
    assert caught.value.detail
    assert "\n" not in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.reason, again.detail) == (reason, caught.value.detail)


def test_encoded_images_of_too_many_bytes_are_refused(monkeypatch):
    monkeypatch.setattr(decode, "MOST_BYTES", 100)
    with pytest.raises(ImageError, match="too many bytes"):
        decode_rgb(GOOD["png"])


def test_the_largest_image_is_decoded_in_bounded_memory(tmp_path):
    side = int(MOST_PIXELS**0.5)
    path = tmp_path / "large.webp"
    Image.new("RGB", (side, side), (20, 130, 60)).save(path, "WEBP", lossless=True, method=0, quality=0)
    code = (
        "import sys\nfrom pathlib import Path\nfrom tailwise.shards.decode import decode_rgb\n"
        "print(decode_rgb(Path(sys.argv[1]).read_bytes()).size[0])\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    width, peak_kilobytes = map(int, done.stdout.split())
    assert width == side
    assert peak_kilobytes < 800_000


@pytest.mark.parametrize("error", [MemoryError, RecursionError, OverflowError, struct.error, EOFError, zlib.error])
def test_whatever_a_decoder_raises_becomes_an_image_error(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ImageError, match=f"unreadable image: {error.__name__}"):
        decode_rgb(GOOD["png"])


SMALL = {
    name: GOOD[name]
    for name in ("jpeg", "progressive", "png", "palette", "webp", "animated-webp", "gif", "bmp", "tiff", "ppm")
}


@pytest.mark.parametrize("name", SMALL)
def test_mutated_images_are_decoded_or_refused(name):
    """Nothing but an RGB image or an ImageError comes of 300 mutations: flipped bytes, cuts, repeats, extreme numbers."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    decoded = refused = 0
    for _ in range(300):
        content = bytearray(SMALL[name])
        for _ in range(rng.integers(1, 5)):
            at, kind = int(rng.integers(len(content))), rng.integers(4)
            if kind == 0:
                content[at] ^= int(rng.integers(1, 256))
            elif kind == 1:
                content[at : at + 4] = rng.choice(
                    [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80\0\0\0"]
                )
            elif kind == 2:
                content[at:] = content[at : at + int(rng.integers(1, 400))]
            else:
                content[at:at] = content[at : at + int(rng.integers(1, 40))]
        try:
            found = decode_rgb(bytes(content))
        except ImageError as error:
            assert error.reason in REASONS
            refused += 1
        else:
            assert found.mode == "RGB"
            assert found.width * found.height <= MOST_PIXELS
            decoded += 1
    assert refused > 10
    assert decoded + refused == 300


def test_truncated_images_stay_refused():
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
