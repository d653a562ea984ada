"""A pool of deliberately bad images and captions, through import and embed: each is handled or rejected as the tables here say."""

import io
import struct
import warnings
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tailwise.errors import UserError
from tailwise.requests import EmbedRequest
from tailwise.steps.embedding.embed import embed
from tailwise.steps.importing.pool import import_pool

COLOURS = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
PICTURE = Image.fromarray(COLOURS).resize((40, 50), Image.Resampling.NEAREST)  # 20 flat areas: a palette holds them
GREY = PICTURE.convert("L")
OTHER = Image.fromarray(255 - COLOURS).resize((40, 50), Image.Resampling.NEAREST)


def saved(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width, height, *chunks, depth=8, colour=2):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


def with_alpha(image):
    copy = image.convert("RGBA")
    copy.putalpha(Image.linear_gradient("L").resize(copy.size))
    return copy


def rotated_by_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(PICTURE, "PNG", exif=exif)


def palette():
    return PICTURE.quantize(20)


GREY16 = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)
FLOATS = np.asarray(GREY).astype(np.float32) / 255
JPEG = saved(PICTURE, "JPEG", quality=95)
PNG = saved(PICTURE, "PNG")
PROGRESSIVE = saved(PICTURE, "JPEG", progressive=True)
ZEROS_1BIT = zlib.compress(b"\0" * (20_000 // 8 + 1) * 20_000, 9)
PLAIN_JPEG = Image.open(io.BytesIO(JPEG)).convert("RGB")
CMYK = saved(PICTURE.convert("CMYK"), "JPEG", quality=95)

# What is seen of it.
HANDLED = {
    "png": (PNG, PICTURE),
    "jpeg": (JPEG, PLAIN_JPEG),
    "progressive-jpeg": (PROGRESSIVE, Image.open(io.BytesIO(PROGRESSIVE)).convert("RGB")),
    "jpeg-with-garbage-after-it": (JPEG + b"garbage" * 100, PLAIN_JPEG),
    "jpeg-with-garbage-as-exif": (saved(PICTURE, "JPEG", quality=95, exif=b"Exif\0\0garbage"), PLAIN_JPEG),
    "png-with-garbage-as-profile": (saved(PICTURE, "PNG", icc_profile=b"garbage"), PICTURE),
    "cmyk-jpeg": (CMYK, Image.open(io.BytesIO(CMYK)).convert("RGB")),
    "grey-jpeg": (
        saved(GREY, "JPEG", quality=95),
        Image.open(io.BytesIO(saved(GREY, "JPEG", quality=95))).convert("RGB"),
    ),
    "palette": (saved(palette(), "PNG"), PICTURE),
    "palette-with-transparent-colour": (saved(palette(), "PNG", transparency=3), PICTURE),
    "palette-with-alphas": (saved(palette(), "PNG", transparency=bytes(range(0, 200, 10))), PICTURE),
    "alpha": (saved(with_alpha(PICTURE), "PNG"), PICTURE),
    "grey-and-alpha": (saved(with_alpha(GREY.convert("RGB")).convert("LA"), "PNG"), GREY),
    "one-bit": (saved(GREY.convert("1"), "PNG"), GREY.convert("1")),
    "16-bit-png": (saved(GREY16, "PNG"), GREY),
    "16-bit-tiff": (saved(GREY16, "TIFF"), GREY),
    "32-bit-tiff-of-bytes": (saved(Image.fromarray(np.asarray(GREY).astype(np.int32)), "TIFF"), GREY),
    "32-bit-tiff-of-16-bits": (saved(Image.fromarray(np.asarray(GREY).astype(np.int32) * 257), "TIFF"), GREY),
    "float-tiff-to-1": (saved(Image.fromarray(FLOATS), "TIFF"), GREY),
    "float-tiff-to-255": (saved(Image.fromarray(FLOATS * 255), "TIFF"), GREY),
    "animated-gif": (saved(palette(), "GIF", save_all=True, append_images=[OTHER.quantize(20)]), PICTURE),
    "animated-webp": (saved(PICTURE, "WEBP", lossless=True, save_all=True, append_images=[OTHER]), PICTURE),
    "animated-png": (saved(PICTURE, "PNG", save_all=True, append_images=[OTHER]), PICTURE),
    "rotated-by-exif": (rotated_by_exif(), PICTURE),
    "bmp": (saved(PICTURE, "BMP"), PICTURE),
    "lzw-tiff": (saved(PICTURE, "TIFF", compression="tiff_lzw"), PICTURE),
    "one-pixel": (saved(Image.new("RGB", (1, 1), (200, 30, 60)), "PNG"), Image.new("RGB", (50, 50), (200, 30, 60))),
    "one-row": (saved(Image.new("RGB", (70, 1), (20, 130, 60)), "PNG"), Image.new("RGB", (50, 50), (20, 130, 60))),
    "one-column": (saved(Image.new("RGB", (1, 200), (20, 30, 160)), "PNG"), Image.new("RGB", (50, 50), (20, 30, 160))),
}
# Reason, and a part of the detail.
REJECTED = {
    "truncated-jpeg": (JPEG[: len(JPEG) // 2], "unreadable image", "truncated"),
    "truncated-png": (PNG[: len(PNG) - 40], "unreadable image", ""),
    "truncated-webp": (saved(PICTURE, "WEBP")[:60], "unreadable image", "decoder"),
    "wrong-checksum": (flipped(PNG, PNG.index(b"IDAT") + 6), "unreadable image", ""),
    "bomb": (png(20_000, 20_000, chunk(b"IDAT", ZEROS_1BIT), depth=1, colour=0), "image of too many pixels", "400000000"),
    "huge-by-its-header": (png(65_000, 65_000), "image of too many pixels", "4225000000"),
    "large-by-its-header": (png(10_000, 10_000), "image of too many pixels", "10000 × 10000 pixels, more than 33,554,432"),
    "huge-gif": (b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;",
                 "image of too many pixels", ""),
    "bomb-in-a-comment": (png(4, 4, chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(1 << 26)))), "unreadable image", ""),
    "too-narrow": (saved(Image.new("RGB", (1, 201)), "PNG"), "image of extreme aspect ratio", "1 × 201 pixels"),
    "float-tiff-without-range": (saved(Image.fromarray(FLOATS * 1e6), "TIFF"), "unreadable image", "more than 16 bits"),
    "text": (b"404 not found", "not an image", "begins with b'404 not "),
    "html": (b"\n<!DOCTYPE html><html><body>404</body></html>", "not an image", "HTML"),
    "svg": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "not an image", "SVG"),
    "postscript": (saved(PICTURE, "EPS"), "not an image", "PostScript"),  # Pillow would have Ghostscript run it
    "pdf": (saved(PICTURE, "PDF"), "not an image", "%PDF"),
    "random-bytes": (np.random.default_rng(5).bytes(500), "not an image", "begins with"),
    "head-of-a-jpeg": (JPEG[:3], "not an image", ""),
}  # fmt: skip
# Whether there is an embedding.
CAPTIONS = {
    "empty": ("", False),
    "blank": (" \t\r\n ", False),
    "nul": ("\0", False),
    "byte-order-mark": ("\ufeffa dog", True),
    "words-and-nul": ("a\0dog", True),
    "long": ("a very long caption " * 2000, True),
    "one-long-word": ("x" * 5000, True),
    "emoji": ("👩‍👩‍👧‍👦 🏳️‍🌈", True),
    "right-to-left": ("صورة قطة \u202e\u05d1\u05e2\u05d1\u05e8\u05d9\u05ea", True),
    "stacked-marks": ("z" + "\u0301" * 300, True),
    "special-tokens": ("<|endoftext|> <start_of_text>", True),
    "markup": ("<b>a &amp;amp; dog</b>", True),
    "lines": ("one\ntwo\r\nthree", True),
    "chinese": ("一只狗", True),
    "beyond-the-basic-plane": ("\U0010fffd \U00020000", True),
}


def options(folder, column, max_rejected=1.0):
    return EmbedRequest(encoder="", column=column, precision="fp32", batch_size=16, max_rejected=max_rejected)


@pytest.fixture(scope="module")
def pool(tmp_path_factory, make_tar):
    """Every image with a good caption, every caption with a good image, what handled images look like, and what import refuses."""
    folder = tmp_path_factory.mktemp("bad")
    members = []
    for name, (content, _) in HANDLED.items():
        members += [(f"h-{name}.jpg", content), (f"h-{name}.txt", b"a good caption")]
        members += [(f"s-{name}.jpg", saved(HANDLED[name][1].convert("RGB"), "PNG")), (f"s-{name}.txt", b"a dog")]
    for name, (content, _, _) in REJECTED.items():
        members += [(f"r-{name}.jpg", content), (f"r-{name}.txt", b"a good caption")]
    for name, (caption, _) in CAPTIONS.items():
        members += [(f"c-{name}.jpg", PNG), (f"c-{name}.txt", caption.encode())]
    members += [("l-not-utf8.jpg", PNG), ("l-not-utf8.txt", b"caf\xe9")]
    members += [("l-no-bytes.jpg", b""), ("l-no-bytes.txt", b"a dog")]
    make_tar(folder / "pool" / "0.tar", members)
    return folder


def imported(pool, target):
    return import_pool([str(pool / "pool")], target, workers=1).catalog


@pytest.fixture(scope="module")
def embedded(pool, clip_folder):
    """The catalog, its keys, and what the embedding reported; no warning came of it."""
    catalog = imported(pool, pool / "catalog")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        report = embed(
            catalog, replace(options(clip_folder, "both"), encoder=f"open_clip:local-dir:{clip_folder}", workers=1)
        )
    assert not [warning for warning in warned if "PIL" in warning.filename]
    keys = catalog.samples(catalog.parts()[0], ["key"]).column(0).to_pylist()
    rows = {
        name: dict(zip(keys, catalog.embedding(name, catalog.parts()[0]), strict=True)) for name in ("image", "text")
    }
    rejected = {row["key"]: row for row in catalog.rejected().to_pylist()}
    return rows, rejected, report


def test_there_are_many():
    assert len(HANDLED) + len(REJECTED) + len(CAPTIONS) > 60


@pytest.mark.parametrize("name", HANDLED)
def test_what_can_be_seen_is_seen_as_it_should_be(embedded, name):
    rows, rejected, _ = embedded
    found, expected = (rows["image"][f"{kind}-{name}"].astype(np.float64) for kind in "hs")
    assert f"h-{name}" not in rejected
    assert found @ expected > 0.9995
    if expected @ rows["image"]["s-png"] < 0.99:  # of another picture, so that this says something
        assert found @ rows["image"]["s-png"] < 0.995


@pytest.mark.parametrize("name", REJECTED)
def test_what_can_not_be_seen_is_rejected_with_a_reason(embedded, name):
    rows, rejected, _ = embedded
    _, reason, detail = REJECTED[name]
    assert not rows["image"][f"r-{name}"].any()
    assert rejected[f"r-{name}"]["reason"] == reason
    assert detail in rejected[f"r-{name}"]["detail"]
    assert rows["text"][f"r-{name}"].any()


@pytest.mark.parametrize("name", CAPTIONS)
def test_captions(embedded, name):
    rows, rejected, _ = embedded
    there = CAPTIONS[name][1]
    assert rows["text"][f"c-{name}"].any() == there
    assert np.isfinite(rows["text"][f"c-{name}"]).all()
    assert (f"c-{name}" in rejected) != there
    if not there:
        assert rejected[f"c-{name}"]["reason"] == "empty caption"
    assert rows["image"][f"c-{name}"].any()


def test_the_sums(embedded):
    rows, rejected, report = embedded
    total = 2 * len(HANDLED) + len(REJECTED) + len(CAPTIONS)
    assert len(rows["image"]) == total
    assert rejected["l-not-utf8"]["reason"] == "caption is not UTF-8"
    assert rejected["l-no-bytes"]["reason"] == "caption without image"
    from open_clip.tokenizer import _tokenizer

    image, text = report.columns
    empty = sum(not there for _, there in CAPTIONS.values())
    assert (image.embedded, image.lacking) == (total - len(REJECTED), total)
    assert (text.embedded, text.lacking) == (total - empty, total)
    assert text.truncated == sum(len(_tokenizer.encode(caption)) + 2 > 16 for caption, _ in CAPTIONS.values()) > 2
    assert report.rejections.counts["embed", "empty caption"] == empty
    assert sum(report.rejections.counts.values()) == len(REJECTED) + empty


def test_too_many_rejects_stop_it_and_what_is_finished_is_kept(pool, clip_folder, tmp_path, monkeypatch):
    catalog = imported(pool, tmp_path / "catalog")
    name = f"open_clip:local-dir:{clip_folder}"
    with pytest.raises(
        UserError, match=r"18 of 91 images \(19\.8%\) .*`max_rejected` 0\.19: not an image 7, .*first is r-truncated"
    ):
        embed(catalog, replace(options(clip_folder, "image", 0.19), encoder=name, workers=1))
    assert not list(catalog.embedding_folder("image").glob("part-*"))
    monkeypatch.setattr("tailwise.steps.embedding.tasks.normalise_rows", None)  # nothing is embedded again
    assert embed(catalog, replace(options(clip_folder, "image", 0.2), encoder=name, workers=1)).columns[0].samples == 0
    assert not (catalog.embedding_folder("image") / "unfinished").exists()


@pytest.mark.parametrize(
    ("column", "cause"), [("image", "not an image 2; the first is a "), ("text", "empty caption 2")]
)
def test_a_run_that_gives_nothing_names_the_cause(tmp_path, make_tar, clip_folder, column, cause):
    make_tar(tmp_path / "pool" / "0.tar", [(f"{key}.{kind}", b" ") for key in "ab" for kind in ("jpg", "txt")])
    catalog = imported(tmp_path, tmp_path / "catalog")
    name = f"open_clip:local-dir:{clip_folder}"
    with pytest.raises(UserError, match=rf"2 of 2 .*`max_rejected` 0\.9: {cause}"):
        embed(catalog, replace(options(clip_folder, column, 0.9), encoder=name, workers=1))
    with pytest.raises(UserError, match=f"not one of 2 samples got an {column} embedding: {cause}"):
        embed(catalog, replace(options(clip_folder, column), encoder=name, workers=1))
