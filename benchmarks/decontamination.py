"""Decontamination: copies of evaluation images are planted into a pool; how many does `dedup --against` find, by kind of change?

`--images` images of the evaluation set are drawn; each is planted once for each kind of change. Recall: share of the planted copies of a
kind that are dropped, with the image that they were made from as the most similar one. Other drops are samples of the pool itself: real
look-alikes, or mistakes; look at them with `--list FILE`. The second table compares with mirror images too.
usage: decontamination.py TARS EVALUATION_SET [--images 300] [--encoder lite0] [--of-tars 5] [--list FILE]
"""

import argparse
import io
import shutil
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
from common import print_header
from PIL import Image, ImageEnhance, ImageOps

import tailwise
from tailwise.catalog import Catalog
from tailwise.catalog.drops import DropList
from tailwise.context import Context
from tailwise.evaluate.sets import find_images
from tailwise.progress import bars
from tailwise.requests import DedupRequest, EmbedRequest
from tailwise.shards.decode import decode_rgb

EPSILONS = (0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)


def save(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def cropped(image: Image.Image, share: float) -> Image.Image:
    """Return the middle of an image: this share of each side."""
    width, height = image.size
    left, top = round(width * (1 - share) / 2), round(height * (1 - share) / 2)
    return image.crop((left, top, width - left, height - top))


# Kind of change → a copy of an image.
CHANGES: dict[str, Callable[[Image.Image], bytes]] = {
    "same pixels, as PNG": save,
    "JPEG, quality 75": lambda image: save(image, "JPEG", quality=75),
    "JPEG, quality 30": lambda image: save(image, "JPEG", quality=30),
    "half the size": lambda image: save(image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)),
    "twice the size": lambda image: save(image.resize((image.width * 2, image.height * 2), Image.Resampling.BICUBIC)),
    "brightness +20 %": lambda image: save(ImageEnhance.Brightness(image).enhance(1.2), "JPEG", quality=90),
    "brightness −20 %": lambda image: save(ImageEnhance.Brightness(image).enhance(0.8), "JPEG", quality=90),
    "grey": lambda image: save(image.convert("L"), "JPEG", quality=90),
    "cropped to 95 %": lambda image: save(cropped(image, 0.95), "JPEG", quality=90),
    "cropped to 80 %": lambda image: save(cropped(image, 0.8), "JPEG", quality=90),
    "border of 10 %": lambda image: save(ImageOps.expand(image, image.width // 10, "white"), "JPEG", quality=90),
    "mirrored": lambda image: save(ImageOps.mirror(image), "JPEG", quality=90),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tars", type=Path)
    parser.add_argument("set", type=Path)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--encoder", default="lite0")
    parser.add_argument("--of-tars", type=int, default=5, help="tars of the pool")
    parser.add_argument("--list", type=Path, help="CSV of drops that were not planted, at the greatest epsilon")
    asked = parser.parse_args()
    print_header("decontamination: planted copies of evaluation images", "torch", "pillow")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "pool").mkdir()
        for tar in sorted(asked.tars.glob("*.tar"))[: asked.of_tars]:
            shutil.copy(tar, folder / "pool")
        planted = plant(asked.set, asked.images, folder / "pool" / "planted.tar")
        catalog = tailwise.import_pool([folder / "pool"], folder / "catalog").catalog
        start = time.perf_counter()
        tailwise.embed(catalog, EmbedRequest(encoder=asked.encoder), Context(bars))
        rows = catalog.snapshot().rows
        print(
            f"{rows:,} samples, {planted:,} of them planted; embedded in {time.perf_counter() - start:.0f} s by {asked.encoder}"
        )
        print_pixels(catalog, asked.set, asked.images)
        for mirrored in (False, True):
            print_recall(catalog, asked.set, asked.images, mirrored=mirrored)
        if asked.list is not None:
            write_others(catalog, DropList(catalog, f"False-{EPSILONS[-1]}"), asked.list)


def plant(place: Path, images: int, path: Path) -> int:
    """Write the copies of some images of a set, with keys NUMBER-KIND; return how many there are."""
    contents = [
        content for shard in find_images(str(place))[1] for content, _ in shard.samples() if isinstance(content, bytes)
    ]
    chosen = np.sort(np.random.default_rng(0).permutation(len(contents))[:images]).tolist()
    with tarfile.open(path, "w") as tar:
        for number in chosen:
            image = decode_rgb(contents[number])
            copies = [contents[number], *(change(image) for change in CHANGES.values())]
            for kind, copy in enumerate(copies):
                for extension, content in (("jpg", copy), ("txt", b"planted")):
                    info = tarfile.TarInfo(f"planted-{number:07d}-{kind:02d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return len(chosen) * (1 + len(CHANGES))


def found_by_kind(catalog: Catalog, drops: DropList) -> tuple[Counter[int], int]:
    """Return how many planted copies of each kind are dropped for the right image, and the number of all other drops."""
    found, others = Counter[int](), 0
    for part in catalog.parts():
        table = drops.tables(part.span)
        keys = (
            catalog.samples(part, ["key"])["key"].take(pa.array(table["row"].to_numpy() - part.first_row)).to_pylist()
        )
        for key, number in zip(keys, table["number"].to_pylist(), strict=True):
            _, image, kind = key.split("-") if key.startswith("planted-") else ("", "-1", "-1")
            if int(image) == number:
                found[int(kind)] += 1
            else:
                others += 1
    return found, others


def print_pixels(catalog: Catalog, place: Path, images: int) -> None:
    start = time.perf_counter()
    tailwise.dedup(catalog, DedupRequest(against=(str(place),), exact="pixels", mirrored=True, name="pixels"))
    found, others = found_by_kind(catalog, DropList(catalog, "pixels"))
    names = ["identical file", *CHANGES]
    shares = ", ".join(f"{names[kind]} {count / images:.1%}" for kind, count in sorted(found.items()))
    print(f"--exact pixels --mirrored: {shares}; {others} other drops; {time.perf_counter() - start:.1f} s")


def print_recall(catalog: Catalog, place: Path, images: int, *, mirrored: bool) -> None:
    """Print recall in % by kind and ε."""
    columns = []
    start = time.perf_counter()
    for epsilon in EPSILONS:
        name = f"{mirrored}-{epsilon}"
        tailwise.dedup(catalog, DedupRequest(against=(str(place),), epsilon=epsilon, mirrored=mirrored, name=name))
        columns.append(found_by_kind(catalog, DropList(catalog, name)))
        if epsilon == EPSILONS[0]:
            seconds = time.perf_counter() - start
    print(
        f"\nrecall in %{', with --mirrored' * mirrored}; the first epsilon took {seconds:.1f} s, all {time.perf_counter() - start:.1f} s"
    )
    print(f"{'epsilon':<22}" + "".join(f"{epsilon:>8g}" for epsilon in EPSILONS))
    for kind, name in enumerate(["identical file", *CHANGES]):
        print(f"{name:<22}" + "".join(f"{100 * found[kind] / images:>8.1f}" for found, _ in columns))
    print(f"{'other drops':<22}" + "".join(f"{others:>8,}" for _, others in columns))
    planted = [found.total() for found, _ in columns]
    shares = [count / max(count + others, 1) for count, (_, others) in zip(planted, columns, strict=True)]
    print(f"{'planted among drops':<22}" + "".join(f"{100 * share:>8.1f}" for share in shares))


def write_others(catalog: Catalog, drops: DropList, path: Path) -> None:
    """Write the drops that were not planted: key, number, similarity."""
    tables = []
    for part in catalog.parts():
        table = drops.tables(part.span)
        keys = catalog.samples(part, ["key"])["key"].take(pa.array(table["row"].to_numpy() - part.first_row))
        table = pa.table({"key": keys, "number": table["number"], "similarity": table["similarity"]})
        tables.append(table.filter(pa.compute.invert(pa.compute.starts_with(keys, "planted-"))))
    pa.csv.write_csv(pa.concat_tables(tables).sort_by([("similarity", "descending")]), path)


if __name__ == "__main__":
    main()
