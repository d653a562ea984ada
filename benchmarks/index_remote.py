"""Indexing remote tars: seconds and bytes, without and with DALI's index, against a download and against tarfile over fsspec.

The store is that of object_store.py: an HTTP server with ranges on the loopback, in a process of its own, that waits before each answer
and sends no connection more than so many bytes a second. All find every sample and its caption, one tar after the other, in one process.
usage: index_remote.py [--latency-ms 20] [--connection-mb 100] [--tar-mb 100]
"""

import argparse
import multiprocessing
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
from common import print_header
from object_store import make_tars, serve

from tailwise.shards.webdataset import read_shard
from tailwise.storage import files
from tailwise.storage.remote import download

TARS = 2
SAMPLE_KB = (20, 300, 4000)


def write_dali_index(tar: Path) -> None:
    lines: dict[str, list[str]] = {}
    with tarfile.open(tar) as archive:
        for item in archive:
            key, _, extension = item.name.partition(".")
            lines.setdefault(key, []).append(f"{extension} {item.offset_data} {item.size} {item.name}")
    tar.with_suffix(".idx").write_text(
        "".join(["v1.2 ", f"{len(lines)}\n", *(f"{' '.join(line)}\n" for line in lines.values())])
    )


def ours(url: str) -> tuple[int, int]:
    moved, real = 0, files.read_range

    def counted(*arguments: object) -> object:
        nonlocal moved
        found = real(*arguments)
        moved += len(found.content)
        return found

    files.read_range = counted
    try:
        return read_shard(url).samples.num_rows, moved
    finally:
        files.read_range = real


def downloaded(url: str) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".tar") as target:
        download(url, target, 1 << 40)
        target.flush()
        return read_shard(target.name).samples.num_rows, target.tell()


def standard_library(url: str) -> tuple[int, int]:
    captions = 0
    with fsspec.open(url, "rb") as stream, tarfile.open(fileobj=stream) as tar:
        for member in tar:
            if member.name.endswith(".txt"):
                captions += bool(tar.extractfile(member).read())
        return captions, stream.cache.total_requested_bytes


def measure(run: Callable[[str], tuple[int, int]], urls: list[str], expected: int) -> str:
    began = time.perf_counter()
    counts = [run(url) for url in urls]
    seconds = time.perf_counter() - began
    if sum(samples for samples, _ in counts) != expected:
        raise SystemExit(f"{run.__name__} found other samples")
    return f"{seconds:8.2f} s {sum(moved for _, moved in counts) / 1e6:8.1f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"latency-ms": 20.0, "connection-mb": 100.0, "tar-mb": 100}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    asked = parser.parse_args()
    print_header(
        f"index_remote: {TARS} tars of {asked.tar_mb} MB, {asked.latency_ms:g} ms, {asked.connection_mb:g} MB/s a connection",
        "fsspec",
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder, port = Path(temporary), multiprocessing.SimpleQueue()
        arguments = folder, asked.latency_ms / 1000, asked.connection_mb * 1e6, port
        server = multiprocessing.Process(target=serve, args=arguments, daemon=True)
        server.start()
        base = f"http://127.0.0.1:{port.get()}"
        for size in SAMPLE_KB:
            samples = max(1, asked.tar_mb * 1000 // size)
            place = folder / str(size)
            place.mkdir()
            make_tars(place, TARS, samples, size * 1000)
            urls = [f"{base}/{size}/{number:05d}.tar" for number in range(TARS)]
            print(f"samples of {size} KB, {samples * TARS:,} in all")
            expected = samples * TARS
            print("  tarfile over fsspec   ", measure(standard_library, urls, expected))
            print("  download, then index  ", measure(downloaded, urls, expected))
            print("  tailwise              ", measure(ours, urls, expected))
            for number in range(TARS):
                write_dali_index(place / f"{number:05d}.tar")
            print("  tailwise, DALI's index", measure(ours, urls, expected))
        server.terminate()


if __name__ == "__main__":
    main()
