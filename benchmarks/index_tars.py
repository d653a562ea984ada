"""Indexing tars: samples/s of one core, against the standard library's tarfile and webdataset, on the same tars, turn by turn.

All three have to find every sample and read its caption; ours also notes offsets and sizes, groups, checks and hashes.
usage: index_tars.py [FOLDER OF TARS]   (without one, a pool of 40,000 small samples is made)
"""

import io
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import webdataset
from common import print_header

from tailwise.shards.webdataset import read_shard

ROUNDS = 5


def make_tars(folder: Path) -> None:
    for shard in range(4):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in range(10_000):
                for suffix, content in (
                    ("jpg", bytes(2000)),
                    ("txt", b"a photo of a thing"),
                    ("json", b'{"width": 64}'),
                ):
                    info = tarfile.TarInfo(f"{shard:05d}{sample:04d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def ours(paths: list[Path]) -> int:
    return sum(read_shard(str(path)).samples.num_rows for path in paths)


def standard_library(paths: list[Path]) -> int:
    captions = 0
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".txt"):
                    captions += bool(tar.extractfile(member).read())
    return captions


def webdataset_pipeline(paths: list[Path]) -> int:
    return sum("txt" in sample for sample in webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))


def main() -> None:
    print_header("index_tars: samples/s on one core, medians of 5 rounds, files in the page cache", "webdataset")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary)
        if len(sys.argv) == 1:
            make_tars(folder)
        paths = sorted(folder.glob("*.tar"))
        rates: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for reader in (ours, standard_library, webdataset_pipeline):
                start = time.process_time()
                samples = reader(paths)
                rates.setdefault(reader.__name__, []).append(samples / (time.process_time() - start))
    median = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        ratio = median["ours"] / median[name]
        print(f"{name:20s} {median[name]:10,.0f}  ({min(values):,.0f} … {max(values):,.0f})  ours / this: {ratio:.1f}")


if __name__ == "__main__":
    main()
