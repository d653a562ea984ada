"""A procedural long-tailed image-text pool in img2dataset's webdataset layout.

A concept is a shape in a colour on a background: "a red triangle on a striped navy background", or "a red triangle on navy
bricks" where backgrounds are crops of photographs. The few head concepts have most of the images, as in a crawl of the web.

Letters: s = side of the image, pixels. Coordinates run from -1 to 1 over the image, x to the right and y downwards.
"""

from __future__ import annotations

import heapq
import importlib.resources
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from tailwise.extras import require
from tailwise.shards.decode import decode_rgb

Plane: TypeAlias = npt.NDArray[np.floating[Any]]  # [s, s]
Shape: TypeAlias = Callable[[Plane, Plane], Plane]
Pattern: TypeAlias = Callable[[Plane, Plane, float], Plane]
Colour: TypeAlias = tuple[int, int, int]
Photographs: TypeAlias = Mapping[str, Image.Image]

SAMPLES_PER_SHARD_LIMIT = 10_000  # four digits of the key
SHARDS_LIMIT = 100_000  # five digits
SMALLEST_SIDE_PX = 16
# First spawn key of the seed's families of random streams.
SHUFFLE_STREAM, SAMPLE_STREAM, TEST_STREAM, SOURCE_STREAM, COPY_STREAM = range(5)

TEMPLATES = ("a photo of {}", "a picture showing {}", "an image of {}", "{}", "{}, seen from the front", "this is {}")


def _polygon(corners: int, inradius: float) -> Shape:
    angles = 2 * np.pi * np.arange(corners) / corners + np.pi / 2
    normals = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    return lambda u, v: np.max([a * u + b * v for a, b in normals], axis=0) - np.float32(inradius)


def _star(u: Plane, v: Plane) -> Plane:
    # Nearness to the direction of a point: 1 at each of five points, 0 at the notches between them.
    pointedness = np.abs((np.arctan2(u, -v) / (2 * np.pi) * 5) % 1 - 0.5) * 2
    return np.hypot(u, v) - (0.4 + 0.65 * pointedness**1.5)


def _cross(u: Plane, v: Plane) -> Plane:
    across, along = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(across - 0.28, along - 0.95), np.maximum(across - 0.95, along - 0.28))


# Signed distances to the outline, roughly: negative inside. Local coordinates: the shape fills the unit disc.
SHAPES: dict[str, Shape] = {
    "disc": lambda u, v: np.hypot(u, v) - 0.85,
    "triangle": _polygon(3, 0.55),
    "cross": _cross,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.75) - 0.2,
    "bar": lambda u, v: np.maximum(np.abs(u) - 1, np.abs(v) - 0.36),
    "star": _star,
    "square": _polygon(4, 0.75),
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.95, 0.75 - np.hypot(u - 0.5, v)),
}

COLOURS: dict[str, Colour] = {
    "red": (222, 32, 36),
    "blue": (38, 74, 228),
    "yellow": (248, 224, 24),
    "purple": (132, 38, 190),
    "green": (36, 172, 56),
    "pink": (255, 120, 196),
    "orange": (250, 132, 16),
    "turquoise": (28, 206, 206),
}


def _wave(phase: Plane) -> Plane:
    """Return a square wave of period 1 with edges soft enough not to alias, values in [0, 1]."""
    return np.asarray(np.clip(0.5 + 2 * np.sin(2 * np.pi * phase), 0, 1))


# Weight of the tint's second tone, 0 to 1. Arguments: x, y, and a random phase in [0, 1).
PATTERNS: dict[str, Pattern] = {
    "plain": lambda x, _y, _phase: np.zeros_like(x),
    "striped": lambda _x, y, phase: _wave(2 * y + phase),
    "dotted": lambda x, y, phase: _wave(2 * x + phase) * _wave(2 * y + phase),
    "hazy": lambda _x, y, _phase: (y + 1) / 2,
    "checked": lambda x, y, phase: np.abs(_wave(1.25 * x + phase) - _wave(1.25 * y + phase)),
    "rippled": lambda x, y, phase: _wave(2.5 * np.hypot(x, y) + phase),
    "barred": lambda x, _y, phase: _wave(2 * x + phase),
    "slanted": lambda x, y, phase: _wave(1.5 * (x + y) + phase),
}

# Photographs of the package scikit-image (subject: file), all CC0, in the public domain or without known copyright.
PHOTOGRAPHS = {
    "bricks": "brick.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "stars": "hubble_deep_field.jpg",
    "fur": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "veins": "retina.jpg",
}
PHOTOGRAPH_OF = dict(zip(PATTERNS, PHOTOGRAPHS, strict=True))  # the background in place of a pattern
PHOTOGRAPH_PX = 400  # longest side; crops have 60 pixels or more
CROP = (0.25, 0.6)  # bounds of the side of a random crop, as a share of the photograph's shorter side

# The background's colours, each in two tones. They differ from the shapes' colours, so that every shape stands out.
TINTS: dict[str, tuple[Colour, Colour]] = {
    "white": ((242, 242, 238), (196, 196, 200)),
    "navy": ((20, 30, 92), (64, 78, 148)),
    "cream": ((248, 230, 182), (206, 178, 120)),
    "black": ((16, 16, 18), (66, 66, 68)),
    "sky": ((178, 212, 246), (122, 162, 206)),
    "maroon": ((88, 14, 34), (142, 62, 80)),
    "grey": ((132, 132, 132), (92, 92, 92)),
    "forest": ((12, 66, 40), (60, 116, 84)),
}

CONCEPTS_LIMIT = 512  # beyond, concepts would share three of shape, colour, pattern and tint


def _turn(index: int) -> int:
    """Multiply by x in the field of eight elements; the code below needs a factor other than 0 and 1."""
    return (index << 1) ^ (0b1011 if index & 4 else 0)


def _looks(concept: int) -> tuple[str, str, str, str]:
    """Return shape, colour, pattern and tint of a concept.

    They are the words of an extended Reed-Solomon code over the field of eight elements: any two of the first 64 concepts share at most
    one of the four, any two of all 512 at most two. Consecutive concepts share none.
    """
    layer, row, column = concept // 64, concept // 8 % 8, concept % 8
    shape, colour = (column + 6 * row) % 8, (3 * column % 8) ^ row
    pattern, tint = shape ^ colour ^ _turn(layer), shape ^ _turn(colour) ^ layer
    return list(SHAPES)[shape], list(COLOURS)[colour], list(PATTERNS)[pattern], list(TINTS)[tint]


def concept_name(concept: int, *, photographs: bool = False) -> str:
    """Return the words of a concept in captions: "a red triangle on a striped navy background", or "... on navy bricks"."""
    shape, colour, pattern, tint = _looks(concept)
    article = "an" if colour == "orange" else "a"
    background = f"{tint} {PHOTOGRAPH_OF[pattern]}" if photographs else f"a {pattern} {tint} background"
    return f"{article} {colour} {shape} on {background}"


def read_photographs() -> dict[str, Image.Image]:
    """Return the photographs of scikit-image by subject, in grey, with the full range of tones."""
    require("demo", "skimage", purpose="the demo, whose backgrounds are scikit-image's,")
    folder = importlib.resources.files("skimage") / "data"
    photographs = {name: decode_rgb((folder / file).read_bytes()).convert("L") for name, file in PHOTOGRAPHS.items()}
    for photograph in photographs.values():
        photograph.thumbnail((PHOTOGRAPH_PX, PHOTOGRAPH_PX))
    return {name: ImageOps.autocontrast(photograph, cutoff=1) for name, photograph in photographs.items()}


def concept_counts(images: int, concepts: int) -> list[int]:
    """Return how many images each concept gets by Zipf's law with exponent 1: the i-th concept's count is proportional to 1/i.

    Every concept gets one image; each further one goes to the concept furthest below its share (Webster's method, exact in integers).
    Counts never increase. Raise a ValueError if there are fewer images than concepts, or no concept.
    """
    _check_range("concepts", concepts, 1)
    _check_range("images", images, concepts, remedy="give each concept an image or ask for fewer concepts")
    counts = [1] * concepts
    queue = [(3 * rank, rank) for rank in range(1, concepts + 1)]
    for _ in range(images - concepts):
        _, rank = queue[0]
        counts[rank - 1] += 1
        heapq.heapreplace(queue, ((2 * counts[rank - 1] + 1) * rank, rank))
    return counts


def draw_image(
    concept: int, size_px: int, random: np.random.Generator, photographs: Photographs | None = None
) -> Image.Image:
    """Draw one image of a concept: RGB, `size_px` pixels a side.

    Position, scale, rotation, the background's phase or crop, shifts of colours and brightness, and noise are random. With `photographs`
    (see `read_photographs`), the background is a crop of one, in the concept's tint.
    """
    shape, colour, pattern, tint = _looks(concept)
    axis = (np.arange(size_px, dtype=np.float32) + 0.5) * (2 / size_px) - 1
    x, y = np.meshgrid(axis, axis)

    centre_x, centre_y, angle = random.uniform(-1, 1, 3) * (0.18, 0.18, 0.3)
    radius = random.uniform(0.52, 0.68)
    cosine, sine = np.float32(np.cos(angle) / radius), np.float32(np.sin(angle) / radius)
    u = (x - np.float32(centre_x)) * cosine + (y - np.float32(centre_y)) * sine
    v = (y - np.float32(centre_y)) * cosine - (x - np.float32(centre_x)) * sine
    inside = np.clip(0.5 - SHAPES[shape](u, v) * np.float32(radius * size_px / 2), 0, 1)  # an edge one pixel wide

    palette = np.array([*TINTS[tint], COLOURS[colour]], np.float32) + random.normal(0, 7, (3, 3)).astype(np.float32)
    if photographs is None:
        weight = PATTERNS[pattern](x, y, random.uniform())
    else:
        weight = _crop(photographs[PHOTOGRAPH_OF[pattern]], size_px, random)
    pixels = palette[0] + (palette[1] - palette[0]) * weight[..., None]
    pixels += (palette[2] - pixels) * inside[..., None]
    pixels *= np.float32(random.uniform(0.92, 1.05))
    pixels += random.standard_normal(pixels.shape, dtype=np.float32) * np.float32(random.uniform(2, 9))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _crop(photograph: Image.Image, size_px: int, random: np.random.Generator) -> Plane:
    """Return a random square of a photograph, values in [0, 1]."""
    side = random.uniform(*CROP) * min(photograph.size)
    left, top = random.uniform(0, np.array(photograph.size) - side)
    box = (left, top, left + side, top + side)
    crop = photograph.resize((size_px, size_px), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
    return np.asarray(crop, np.float32) / 255


def make_pool(
    folder: Path,
    *,
    images: int = 6400,  # without near-duplicates, at least one for each concept
    concepts: int = 64,  # at most 512; concept 0 is the most frequent
    shards: int = 8,  # tars; they share the shuffled images evenly
    size_px: int = 64,  # side of an image, pixels
    duplicates: int = 0,  # near-duplicates: copies of random images at a lower JPEG quality, with another caption
    seed: int = 0,  # changes images and order; concepts and counts stay
    photographs: Photographs | None = None,  # backgrounds, see `read_photographs`; without them, patterns are drawn
    copy_quality: tuple[int, int] = (70, 89),  # bounds of the JPEG quality of near-duplicates; other images have 90
) -> None:
    """Write a pool of drawn images: `00000.tar`, `00001.tar`, … and `concepts.tsv`. The same arguments give the same bytes.

    The tars have img2dataset's layout: `{key}.jpg`, `{key}.txt`, `{key}.json`, where a key is five digits of the shard and four of the
    sample. `concepts.tsv` has the concept of each key (columns key, concept, name); no command reads this truth. With near-duplicates,
    `duplicates.tsv` has the original of each (columns key, duplicate_of).

    Raises:
        ValueError: a number is out of bounds.
        FileExistsError: the folder holds tars that would not be part of this pool.
    """
    _check_range("concepts", concepts, 1, CONCEPTS_LIMIT)
    counts = concept_counts(images, concepts)
    _check_range("duplicates", duplicates, 0)
    total = images + duplicates
    _check_range("shards", shards, 1, min(total, SHARDS_LIMIT))
    _check_range("images per shard", -(-total // shards), 1, SAMPLES_PER_SHARD_LIMIT, remedy="ask for more shards")
    _check_range("size_px", size_px, SMALLEST_SIDE_PX)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{shard:05d}.tar" for shard in range(shards)]
    if foreign := sorted({path.name for path in folder.glob("*.tar")} - {*names}):
        known = f"not one of this pool's {shards} shards"
        raise FileExistsError(f"{folder} holds {foreign[0]}, {known}: give an empty folder")

    # Samples from `images` on are copies; `source_of` has the number of the original.
    copied = _stream(seed, SOURCE_STREAM).integers(images, size=duplicates)
    source_of = np.concatenate([np.arange(images), copied])
    concept_of = np.repeat(np.arange(concepts), counts)[source_of].tolist()
    order = _stream(seed, SHUFFLE_STREAM).permutation(total)
    words = [concept_name(concept, photographs=photographs is not None) for concept in range(concepts)]
    keys = [""] * total
    for shard, members in enumerate(np.array_split(order, shards)):
        with tarfile.open(folder / names[shard], "w", format=tarfile.USTAR_FORMAT) as tar:
            for position, sample in enumerate(members.tolist()):
                key = keys[sample] = f"{shard:05d}{position:04d}"
                random, concept = _stream(seed, SAMPLE_STREAM, int(source_of[sample])), concept_of[sample]
                template = TEMPLATES[random.integers(len(TEMPLATES))]
                jpeg = _jpeg(draw_image(concept, size_px, random, photographs))
                if sample >= images:
                    random = _stream(seed, COPY_STREAM, sample)
                    template = TEMPLATES[random.integers(len(TEMPLATES))]
                    jpeg = _jpeg(decode_rgb(jpeg), quality=int(random.integers(*copy_quality, endpoint=True)))
                caption = template.format(words[concept])
                about = {"key": key, "caption": caption, "width": size_px, "height": size_px, "status": "success"}
                _add_members(tar, key, jpg=jpeg, txt=caption.encode(), json=json.dumps(about).encode())
    lines = [f"{keys[sample]}\t{concept_of[sample]}\t{words[concept_of[sample]]}" for sample in order]
    _write_lines(folder / "concepts.tsv", ["key\tconcept\tname", *lines])
    if duplicates:
        lines = [f"{keys[sample]}\t{keys[source_of[sample]]}" for sample in range(images, total)]
        _write_lines(folder / "duplicates.tsv", ["key\tduplicate_of", *lines])


def make_test_set(
    folder: Path, *, concepts: int, each: int, size_px: int, seed: int = 0, photographs: Photographs | None = None
) -> None:
    """Write a balanced test set for `make_pool`'s concepts, in clip_benchmark's layout: `each` images of each concept.

    No image is in the pool of the same seed. The classes have the concepts' names. The other parameters are those of `make_pool`.
    """
    (folder / "test").mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "test" / "0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in range(concepts * each):
            concept = sample // each
            image = draw_image(concept, size_px, _stream(seed, TEST_STREAM, sample), photographs)
            _add_members(tar, f"{sample:06d}", jpg=_jpeg(image), cls=str(concept).encode())
    _write_lines(folder / "test" / "nshards.txt", ["1"])
    names = [concept_name(concept, photographs=photographs is not None) for concept in range(concepts)]
    _write_lines(folder / "classnames.txt", names)
    _write_lines(folder / "zeroshot_classification_templates.txt", [text.format("{c}") for text in TEMPLATES])


def _stream(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def _check_range(name: str, value: int, least: int, most: int | None = None, remedy: str = "") -> None:
    if value < least or (most is not None and value > most):
        bound = f"at least {least}" if value < least else f"at most {most}"
        raise ValueError(f"{name} is {value}, but must be {bound}" + (f": {remedy}" if remedy else ""))


def _jpeg(image: Image.Image, quality: int = 90) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def _add_members(tar: tarfile.TarFile, key: str, **members: bytes) -> None:
    for extension, content in members.items():
        member = tarfile.TarInfo(f"{key}.{extension}")  # mtime 0 and no owner: the bytes depend on the content only
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
