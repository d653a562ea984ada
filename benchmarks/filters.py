"""Scores and filters: samples/s of each score on the real pool and on a made-up catalog, and of the filters that follow.

Neither pool has text embeddings: both get random ones near their image embeddings, which cost what real ones cost. The real pool's image
embeddings are its own (384 dimensions); the made-up catalog's are random, with made-up captions and sizes. CLIPLoss and NormSim∞ take
time in proportion to batch size and target size, so that they are measured on fewer samples. `--samples N` makes it smaller.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from common import append_shards, print_header
from pools import REAL

from tailwise.catalog.catalog import Catalog
from tailwise.catalog.embeddings import normalise_rows, open_column, write_part
from tailwise.catalog.files import file_digest, write_record, write_table
from tailwise.catalog.schema import SAMPLE_SCHEMA
from tailwise.requests import FilterRequest, ScoreRequest
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.scoring.filter import filter_samples
from tailwise.steps.scoring.scores import score_parts

PART_ROWS, CHUNK_ROWS, DIMENSION, TARGETS = 1_000_000, 65_536, 512, 2048
SLOW_SAMPLES = 65_536


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2_000_000)
    samples = parser.parse_args().samples
    print_header("scores and filters", "torch", "numba", "pyarrow")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        warm_up(folder)
        if REAL.is_dir():
            catalog = import_pool([REAL / "train", REAL / "embeddings"], folder / "real").catalog
            add_texts(catalog)
            measure("the real pool", catalog, fast=True, slow=True)
        measure("made-up", made_up(folder / "large", samples), fast=True, slow=False)
        measure("made-up", made_up(folder / "small", min(samples, SLOW_SAMPLES)), fast=False, slow=True)


def warm_up(folder: Path) -> None:
    """Compiles what is compiled."""
    catalog = made_up(folder / "warm", 2000)
    for request in requests(catalog, fast=True, slow=True):
        list(score_parts(catalog, catalog.snapshot(), request))


def requests(catalog: Catalog, *, fast: bool, slow: bool) -> Iterator[ScoreRequest]:
    target = catalog.folder / "target.npy"
    np.save(target, np.asarray(catalog.embedding("image", catalog.parts()[0])[:TARGETS]))
    if fast:
        names = ["caption-characters", "caption-words", "image-bytes", "pixels", "aspect-ratio", "clip-score"]
        yield from map(ScoreRequest, names)
        yield ScoreRequest("normsim", {"target": str(target), "norm": "2"})
    if slow:
        yield ScoreRequest("normsim", {"target": str(target), "norm": "inf"})
        for size in (4096, 32_768):
            yield ScoreRequest("cliploss", {"batch_size": size, "repetitions": 1})


def measure(title: str, catalog: Catalog, *, fast: bool, slow: bool) -> None:
    snapshot = catalog.snapshot()
    rows, dimension = snapshot.rows, catalog.embedding("image", catalog.parts()[0]).shape[1]
    print(f"{title}: {rows:,} samples, {dimension} dimensions, target set {min(rows, TARGETS):,} rows")
    for request in requests(catalog, fast=fast, slow=slow):
        options = ", ".join(f"{name} {value}" for name, value in request.options.items() if name != "target")
        start = time.perf_counter()
        list(score_parts(catalog, snapshot, request))
        seconds = time.perf_counter() - start
        print(f"  {request.name:<20} {options:<34} {rows / seconds:>14,.0f} samples/s")
    if fast:
        for number, (label, rule) in enumerate(
            {"top share": {"keep": 0.3}, "bounds": {"minimum": 0.1, "maximum": 0.9}}.items()
        ):
            start = time.perf_counter()
            filter_samples(catalog, FilterRequest("clip-score", **rule, name=f"filter-{number}"))
            seconds = time.perf_counter() - start
            print(f"  {'filter, score kept':<20} {label:<34} {rows / seconds:>14,.0f} samples/s")


def made_up(folder: Path, rows: int) -> Catalog:
    """A catalog of shards that aren't there, one a part."""
    catalog = Catalog.create(folder)
    sizes = [min(PART_ROWS, rows - first) for first in range(0, rows, PART_ROWS)]
    for number, size in enumerate(sizes):
        path = catalog.samples_path(number)
        write_table(path, samples_table(number, size))
        write_record(path.with_suffix(".json"), {"tars": [], "shards": [], "digest": file_digest(path)})
    append_shards(catalog, sizes)
    open_column(catalog, "image", DIMENSION, "made up")
    for part in catalog.parts():
        write_part(catalog, "image", part, DIMENSION, random_rows(part.number, part.rows))
    add_texts(catalog)
    return catalog


def samples_table(shard: int, rows: int) -> pa.Table:
    random = np.random.default_rng([shard, 1])
    words = np.array(
        [
            "a",
            "photo",
            "of",
            "the",
            "small",
            "red",
            "dog",
            "on",
            "green",
            "grass",
            "in",
            "front",
            "of",
            "an",
            "old",
            "house",
        ]
    )
    captions = [" ".join(words[:count]) for count in random.integers(1, len(words), rows)]
    numbers = np.arange(rows)
    columns = {
        "shard": np.full(rows, shard),
        "key": [f"{number:09d}" for number in numbers],
        "uid": [bytes(random.bytes(16)) for _ in numbers],
        "caption": captions,
        "image_extension": ["jpg"] * rows,
        "width": random.integers(64, 2048, rows),
        "height": random.integers(64, 2048, rows),
    }
    rest = {item.name: random.integers(0, 1 << 18, rows) for item in SAMPLE_SCHEMA if item.name not in columns}
    return pa.table({**columns, **rest}, schema=SAMPLE_SCHEMA)


def random_rows(seed: int, rows: int) -> Iterator[npt.NDArray[np.float16]]:
    random = np.random.default_rng([seed, 2])
    for first in range(0, rows, CHUNK_ROWS):
        yield normalise_rows(random.standard_normal((min(CHUNK_ROWS, rows - first), DIMENSION), np.float32))[0]


def add_texts(catalog: Catalog) -> None:
    """Text embeddings at a cosine of about 0.3 to the images': noise of norm 3 on rows of norm 1."""
    for part in catalog.parts():
        image = catalog.embedding("image", part)
        dimension = image.shape[1]
        open_column(catalog, "text", dimension, "made up")
        random = np.random.default_rng([part.number, 3])

        def chunks(image=image, random=random) -> Iterator[npt.NDArray[np.float16]]:
            for first in range(0, len(image), CHUNK_ROWS):
                rows = image[first : first + CHUNK_ROWS].astype(np.float32)
                noise = random.standard_normal(rows.shape, np.float32) * (3 / np.sqrt(rows.shape[1]))
                yield normalise_rows(rows + noise)[0]

        write_part(catalog, "text", part, dimension, chunks())


if __name__ == "__main__":
    main()
