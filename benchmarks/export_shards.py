"""New shards of a pool, its samples up to four times: samples/s and MB/s, against a plain copy of the same bytes and webdataset's way.

The plain copy writes the new tars once more, from the page cache, and flushes each: what the disk takes. The peer is what one writes
without tailwise: tarfile_to_samples, a dict of copies by key, a shuffle buffer, ShardWriter; one process, since ShardWriter is one. It
shuffles within its buffer only, and flushes nothing. Files are in the page cache; turns alternate, medians of the rounds; seconds of CPU
are of all processes, and tell most where others use the machine too.
usage: export_shards.py [--side 64 256] [--rounds 2]
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

from common import print_header

import tailwise

IMAGES = {64: 1 << 30, 256: 8000}  # of the pool, by side
BUFFER = 1000


def main() -> None:
    import pools  # here, as all that is heavy: workers import this file anew

    parser = argparse.ArgumentParser()
    parser.add_argument("--side", type=int, nargs="+", default=[64, 256], choices=IMAGES)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    print_header(
        f"new shards by 2,000 of {pools.pool_name()}, each up to four times, twice on average", "webdataset", "pyarrow"
    )
    for side in options.side:
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), side, options.rounds)


def measure(folder: Path, side: int, rounds: int) -> None:
    import pools

    from tailwise.export.shards import write_shards
    from tailwise.requests import ExportRequest

    source = pools.source(folder)
    samples = ((key, pools.enlarged(image, side), text) for key, image, text in pools.read_samples(source))
    tars = pools.write_tars(islice(samples, IMAGES[side]), folder / "pool", 2000)
    catalog = pools.clustered(tars, folder / "catalog")
    plan = tailwise.make_plan(catalog, "p", tailwise.PlanRequest("dynamics", keep=2.0, max_repeats=4))
    table = copies_by_key(plan)
    ways = {
        "tailwise, 1 worker": lambda out: write_shards(plan, 0, out, ExportRequest(2000, workers=1)).samples,
        "tailwise, 2 workers": lambda out: write_shards(plan, 0, out, ExportRequest(2000, workers=2)).samples,
        "webdataset, ShardWriter": lambda out: peer(tars, table, out),
        "plain copy": lambda out: copy(folder / "new", out),
    }
    total = ways["tailwise, 1 worker"](folder / "new")  # warms up, and gives the copy its source
    size_bytes = sum(path.stat().st_size for path in (folder / "new").glob("*.tar"))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start, cpu = time.perf_counter(), sum(os.times()[:4])
            assert way(folder / "out") in {total, None}
            seconds[name].append((time.perf_counter() - start, sum(os.times()[:4]) - cpu))
            shutil.rmtree(folder / "out")
    print(f"\n{side} px: {total:,} samples, {size_bytes / 1e6:.0f} MB in tars")
    best = statistics.median(spent for spent, _ in seconds["webdataset, ShardWriter"])
    for name, times in seconds.items():
        spent, cpu = (statistics.median(column) for column in zip(*times, strict=True))
        rates = f"{total / spent:9,.0f} samples/s {size_bytes / spent / 1e6:6.0f} MB/s"
        print(f"{name:<24} {spent:6.2f} s {rates}   × {best / spent:.2f} of webdataset   {cpu:5.2f} s of CPU")


def copies_by_key(plan: tailwise.Plan) -> dict[str, int]:
    keys = [key for part in plan.catalog.parts() for key in plan.catalog.samples(part, ["key"]).column(0).to_pylist()]
    return dict(zip(keys, plan.draw(0).tolist(), strict=True))


def peer(tars: Path, table: dict[str, int], out: Path) -> int:
    import webdataset as wds

    out.mkdir()
    reader = wds.DataPipeline(wds.SimpleShardList(sorted(map(str, tars.glob("*.tar")))), wds.tarfile_to_samples())
    kept = ((sample, copy) for sample in reader for copy in range(table[sample["__key__"]]))
    written = 0
    with wds.ShardWriter(str(out / "%08d.tar"), maxcount=2000, verbose=0) as writer:
        for sample, copy in wds.filters._shuffle(kept, BUFFER, BUFFER):
            writer.write({**sample, "__key__": f"{sample['__key__']}-{copy}"})
            written += 1
    return written


def copy(source: Path, out: Path) -> None:
    out.mkdir()
    for path in source.glob("*.tar"):
        with path.open("rb") as old, (out / path.name).open("wb") as new:
            shutil.copyfileobj(old, new, 1 << 20)
            new.flush()
            os.fsync(new.fileno())


if __name__ == "__main__":
    main()
