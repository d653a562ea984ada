"""Every stage of curation: samples/s, wall time and growth of peak memory, on the pool of tars and on a made-up one.

The made-up pool is DataComp metadata: `--rows` rows with short captions, a score, and float16 embeddings of 64 dimensions around
`rows / 400` centres, 10 % of them near-copies of others. Stages run one after the other in one process; memory is the process's peak
so far, so that only its growth says something of a stage.
usage: stages.py [--rows 2000000]
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pools
import pyarrow as pa
import pyarrow.parquet as pq
from common import print_header

import tailwise
from tailwise.requests import ClusterRequest, DedupRequest, EmbedRequest, FilterRequest, GroupRequest
from tailwise.steps.grouping.group import group

DIMENSION, FILE_ROWS = 64, 250_000
WORDS = np.array(
    [
        "a",
        "the",
        "red",
        "blue",
        "dog",
        "cat",
        "house",
        "car",
        "tree",
        "on",
        "under",
        "old",
        "new",
        "small",
        "photo",
        "of",
    ]
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    rows = parser.parse_args().rows
    print_header(
        f"stages: {pools.pool_name()}; {rows:,} made-up rows of {DIMENSION} dimensions", "torch", "numba", "pyarrow"
    )
    with tempfile.TemporaryDirectory() as folder:
        tars = pools.source(Path(folder))
        embeddings = tars.parent / "embeddings"
        sources = [str(tars), str(embeddings)] if embeddings.is_dir() else [str(tars)]
        run("pool of tars", sources, Path(folder) / "tars", 400, 100, embeddings.is_dir())
        run("made-up", [str(make_metadata(Path(folder) / "metadata", rows))], Path(folder) / "made", 2000, 500, True)


def make_metadata(folder: Path, rows: int, dimension: int = DIMENSION, file_rows: int = FILE_ROWS) -> Path:
    random = np.random.default_rng(0)
    centres = random.normal(size=(rows // 400, dimension)).astype(np.float32)
    folder.mkdir()
    for number, first in enumerate(range(0, rows, file_rows)):
        count = min(file_rows, rows - first)
        image = centres[random.integers(0, len(centres), count)] + 0.7 * random.normal(size=(count, dimension))
        copies = random.integers(0, count, count // 10)
        image[copies] = image[(copies + 1) % count] + 0.05 * random.normal(size=(len(copies), dimension))
        text = image + random.normal(size=image.shape)
        unit = [(each / np.linalg.norm(each, axis=1, keepdims=True)).astype(np.float16) for each in (image, text)]
        np.savez(folder / f"{number:04d}.npz", l14_img=unit[0], l14_txt=unit[1])
        table = {
            "uid": [f"{first + at:032x}" for at in range(count)],
            "text": [" ".join(words) for words in WORDS[random.integers(0, len(WORDS), (count, 6))].tolist()],
            "original_width": random.integers(100, 2000, count),
            "original_height": random.integers(100, 2000, count),
            "clip_l14_similarity_score": random.normal(0.2, 0.05, count),
        }
        pq.write_table(pa.table(table), folder / f"{number:04d}.parquet")
    return folder


def run(title: str, sources: list[str], folder: Path, fine: int, coarse: int, embedded: bool) -> None:
    print(f"\n{title}")
    catalog = timed("import", lambda: tailwise.import_pool(sources, folder / "catalog").catalog)
    if not embedded:
        timed("embed pixels", lambda: tailwise.embed(catalog, EmbedRequest(encoder="pixels")), catalog)
    made_up = title == "made-up"
    steps: dict[str, Callable[[], Any]] = {
        f"cluster K={fine}, 5 iterations": lambda: tailwise.cluster(
            catalog, ClusterRequest(k=fine, name="fine", iterations=5)
        ),
        "dedup ε=0.05, greedy": lambda: tailwise.dedup(catalog, DedupRequest(epsilon=0.05, clustering="fine")),
        "dedup ε=0.1, any-earlier (compared already)": lambda: tailwise.dedup(
            catalog, DedupRequest(epsilon=0.1, clustering="fine", rule="any-earlier", name="again")
        ),
        "filter caption-words": lambda: tailwise.filter_samples(
            catalog, FilterRequest("caption-words", minimum=1, without=["duplicates"], name="words")
        ),
    }
    if made_up:
        steps |= {
            "filter clip-score, top half": lambda: tailwise.filter_samples(
                catalog, FilterRequest("clip-score", keep=0.5, name="clip")
            ),
            "filter cliploss, top half, 1 repetition": lambda: tailwise.filter_samples(
                catalog,
                FilterRequest(tailwise.ScoreRequest("cliploss", {"repetitions": 1, "batch_size": 4096}), keep=0.5),
            ),
        }
    steps |= {
        f"cluster K={coarse}, 5 iterations": lambda: tailwise.cluster(
            catalog, ClusterRequest(k=coarse, iterations=5, without=["duplicates"])
        ),
        "group by shard": lambda: group(catalog, GroupRequest("shard")),
        "plan dbp": lambda: tailwise.make_plan(catalog, "dbp", tailwise.PlanRequest("dbp", keep=0.277)),
        "plan dynamics": lambda: tailwise.make_plan(catalog, "epochs", tailwise.PlanRequest("dynamics", keep=0.5)),
        "plan top-score": lambda: tailwise.make_plan(
            catalog,
            "top",
            tailwise.PlanRequest("top-score", keep=0.3, score=tailwise.ScoreRequest("caption-characters")),
        ),
        "draw epoch 1": lambda: tailwise.Plan(catalog, "epochs").draw(1),
        **{
            f"export {name}": lambda name=name: tailwise.export_plan(
                tailwise.Plan(catalog, "epochs"), name, folder / name, epoch=1
            )
            for name in ("parquet", "rates-json", "datacomp" if made_up else "shards")
        },
    }
    for name, step in steps.items():
        timed(name, step, catalog)


def timed(name: str, step: Callable[[], Any], catalog: tailwise.Catalog | None = None) -> Any:
    before, start = peak_bytes(), time.perf_counter()
    made = step()
    seconds = time.perf_counter() - start
    rows = (catalog or made).snapshot().rows
    grown = (peak_bytes() - before) / 1e6
    print(
        f"    {name:46s} {seconds:8.2f} s {rows / seconds:13,.0f} samples/s   peak memory +{grown:,.0f} MB", flush=True
    )
    return made


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
