"""From embeddings to a file of rates: tailwise's commands against five plain steps on faiss, each way in processes of its own.

The pool is DataComp metadata with made-up embeddings (those of kernels.py). The plain way follows the published steps of DynamiCS,
written independently: (1) read all embeddings into a float32 matrix and fit spherical k-means on it, 10 iterations; (2) merge
centroids, one search per centroid; (3) assign all rows; (4) count members and compute rates; (5) write keys and clusters as TSV and
rates as JSON. Ours: import, cluster, plan, export. Seconds are wall times of the processes, memory is the greatest peak among them.

The steps import, plan and export are also compared with their floor: the seconds to read the files that the step opens in pieces of
8 MB, plus the seconds to write as many bytes as the step leaves. Compressed arrays are inflated. The floor follows right after the step,
on the same disk. Both find the files in the page cache and nothing unwritten (sync), and both write to the disk (fsync). The step is a
process of its own, the floor is not: the seconds of an empty command are printed beside it and not subtracted.
usage: pipeline.py [--rows 1000000] [--dimension 512] [--k 2000] [--rounds 1] [--compressed] [--ours]
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import print_header

FILE_ROWS, ITERATIONS, MERGE, ALPHA, KEEP = 262_144, 10, 0.7, 0.2, 0.5
SPEED_GOAL, MEMORY_GOAL, FLOOR_GOAL = 3.0, 1 / 3, 2.0
PIECE_BYTES = 8 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--k", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--compressed", action="store_true", help="the arrays of the .npz files")
    parser.add_argument("--ours", action="store_true", help="leave out the plain way")
    parser.add_argument("--plain", nargs=2, type=Path, metavar=("METADATA", "OUTPUT"), help="run the plain way alone")
    arguments = parser.parse_args()
    if arguments.plain:
        plain(*arguments.plain, arguments.k)
        return
    print_header("pipeline: embeddings to rates", "torch", "numba", "faiss-cpu", "pandas")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        what = (folder / "metadata", arguments.rows, arguments.dimension, arguments.compressed)
        maker = multiprocessing.get_context("spawn").Process(target=write_metadata, args=what)  # see `run`
        maker.start()
        maker.join()
        if maker.exitcode:
            sys.exit("failed: the made-up pool")
        for number in range(arguments.rounds):
            compare(folder, arguments.k, number, peer=not arguments.ours)


def write_metadata(folder: Path, rows: int, dimension: int, compressed: bool) -> None:
    from kernels import made_up_chunks  # torch

    folder.mkdir()
    chunks, save = made_up_chunks(rows, dimension), np.savez_compressed if compressed else np.savez
    for number, first in enumerate(range(0, rows, FILE_ROWS)):
        count, pieces = min(FILE_ROWS, rows - first), list[np.ndarray]()
        while sum(map(len, pieces)) < count:
            pieces.append(next(chunks).astype(np.float16))
        save(folder / f"{number:04d}.npz", l14_img=np.concatenate(pieces))
        words = [f"a photograph of thing {at % 9973} in place {at % 7919}" for at in range(first, first + count)]
        table = {"uid": [f"{at * 2654435761 % 2**64:032x}" for at in range(first, first + count)], "text": words}
        pq.write_table(pa.table(table), folder / f"{number:04d}.parquet")


def compare(folder: Path, k: int, number: int, *, peer: bool) -> None:
    catalog, rates = folder / f"catalog-{number}", folder / f"rates-{number}.json"
    steps = {
        "import": ["import", folder / "metadata", catalog],
        "cluster": ["cluster", catalog, "--k", k, "--iterations", ITERATIONS, "--merge", MERGE],
        "plan": ["plan", catalog, "epochs", "--method", "dynamics", "--alpha", ALPHA, "--keep", KEEP],
        "export": ["export", catalog, "epochs", "--to", "rates-json", "--output", rates],
    }
    clusters, plan = catalog / "clusters" / "main", catalog / "plans" / "epochs"
    files = {  # that the step reads; that it leaves
        "import": ([(folder / "metadata", "*")], (catalog, "**/*")),
        "plan": ([(clusters, "label-*"), (clusters, "clusters.parquet")], (plan, "*")),
        "export": ([(catalog, "samples/*.parquet"), (plan, "group*")], (folder, rates.name)),
    }
    os.sync()
    command = [sys.executable, "-m", "tailwise"]
    print(f"  empty      {run([*command, '--version'])[0]:7.2f} s   (tailwise --version)")
    ours = {}
    for name, step in steps.items():
        seconds, peak = ours[name] = run([*command, *map(str, step)])
        print(f"  {name:10s} {seconds:7.2f} s   {peak / 1e9:.2f} GB", end="", flush=True)
        if name in files:
            read, (place, left) = files[name]
            left_bytes = sum(path.stat().st_size for path in place.glob(left) if path.is_file())
            reading = seconds_to_read(path for place, pattern in read for path in sorted(place.glob(pattern)))
            writing = seconds_to_write(folder / "floor", left_bytes)
            times = seconds / (reading + writing)
            print(f" = {times:.1f} times reading and writing its bytes ({reading:.3f} + {writing:.3f} s)", end="")
            print(f" [goal {FLOOR_GOAL:g}: {'reached' if times <= FLOOR_GOAL else 'NOT reached'}]", end="")
        print(flush=True)
    seconds, peak = sum(value for value, _ in ours.values()), max(value for _, value in ours.values())
    print(f"  ours       {seconds:7.1f} s   {peak / 1e9:.2f} GB")
    if not peer:
        return
    plain_rates = folder / f"plain-{number}.json"
    script = [sys.executable, __file__, "--plain", str(folder / "metadata"), str(plain_rates), "--k", str(k)]
    theirs = run(script, show=True)
    print(f"  plain      {theirs[0]:7.1f} s   {theirs[1] / 1e9:.2f} GB")
    for what, path in (("ours", rates), ("plain", plain_rates)):
        values = np.fromiter(json.loads(path.read_text()).values(), float)
        print(f"  rates of {what}: {len(values):,}, mean {values.mean():.4f}, {len(np.unique(values)):,} values")
    faster, smaller = theirs[0] / seconds, peak / theirs[1]
    print(
        f"  {faster:.2f} times as fast [goal ≥ {SPEED_GOAL:g}: {'reached' if faster >= SPEED_GOAL else 'NOT reached'}], "
        f"{smaller:.2f} of the memory [goal ≤ {MEMORY_GOAL:.2f}: {'reached' if smaller <= MEMORY_GOAL else 'NOT reached'}]",
        flush=True,
    )


def seconds_to_read(paths: Iterable[Path]) -> float:
    start = time.perf_counter()
    for path in paths:
        arrays = zipfile.ZipFile(path) if path.suffix == ".npz" else None
        packed = [each for each in arrays.infolist() if each.compress_type] if arrays else []
        for stream in [arrays.open(each) for each in packed] if packed else [path.open("rb", buffering=0)]:
            with stream:
                while stream.read(PIECE_BYTES):
                    pass
    return time.perf_counter() - start


def seconds_to_write(path: Path, size: int) -> float:
    piece = memoryview(os.urandom(PIECE_BYTES))
    start = time.perf_counter()
    with path.open("wb", buffering=0) as stream:
        for at in range(0, size, PIECE_BYTES):
            stream.write(piece[: size - at])
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def run(command: list[str], *, show: bool = False) -> tuple[float, int]:
    """Wall seconds of a process, and its peak resident memory in bytes, or this process's where that is greater (Linux)."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=None if show else subprocess.DEVNULL, stderr=None if show else subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def plain(metadata: Path, output: Path, k: int) -> None:
    """The published steps, plainly."""
    import faiss
    import pandas as pd

    start = time.perf_counter()

    def tell(step: str) -> None:
        print(f"    plain, {time.perf_counter() - start:6.1f} s: {step}", flush=True)

    files = sorted(metadata.glob("*.npz"))
    keys = np.concatenate(
        [pq.read_table(file.with_suffix(".parquet"), columns=["uid"])["uid"].to_numpy() for file in files]
    )
    x = np.concatenate([np.load(file)["l14_img"].astype(np.float32) for file in files])
    faiss.normalize_L2(x)
    tell("read")
    kmeans = faiss.Kmeans(x.shape[1], k, niter=ITERATIONS, spherical=True, max_points_per_centroid=1000, seed=1)
    kmeans.train(x)
    tell("k-means")
    kept = faiss.IndexFlatIP(x.shape[1])
    for centroid in kmeans.centroids:
        if not kept.ntotal or kept.search(centroid[None], 1)[0][0, 0] < MERGE:
            kept.add(centroid[None])
    tell(f"merged, {kept.ntotal:,} centroids")
    labels = kept.search(x, 1)[1][:, 0]
    tell("assigned")
    frame = pd.DataFrame({"key": keys, "cluster": labels})
    sizes = frame["cluster"].value_counts()
    quota = sizes**ALPHA
    rates = quota / quota.sum() * KEEP * len(frame) / sizes
    frame["rate"] = frame["cluster"].map(rates)
    frame.to_csv(output.with_suffix(".tsv"), sep="\t", index=False)
    output.write_text(json.dumps(dict(zip(frame["key"], frame["rate"], strict=True))))
    tell("written")


if __name__ == "__main__":
    main()
