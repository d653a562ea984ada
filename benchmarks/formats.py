"""One pool as tars and as Parquet files with images, on disk, behind HTTP and in S3: one plan, one draw, the same batches.

The Parquet files are made from the tars: a file a tar, the same rows in the same order. Each epoch is read once, without decoding, in this
process; the page cache is warm, tailwise's own cache is empty at first. Bytes: those that the HTTP server sends; on disk, those that the
process reads (tailwise's cache of Parquet files included). The peers read the same samples, filtered by key: webdataset the tars,
`datasets` the Parquet files as a stream. Servers run in processes of their own; HTTP waits --latency-ms before each answer.
usage: formats.py TARS [--keep 1 0.5 0.1] [--group 500] [--latency-ms 5] [--no-s3]
"""

import argparse
import atexit
import hashlib
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset as wds
from common import print_header

import tailwise

BATCH = 512
IMAGES = ("jpg", "png", "jpeg", "webp")
Samples = Iterator[tuple[bytes, bytes]]


class Handler(SimpleHTTPRequestHandler):
    """Files, whole or by range, after a wait; counts the bytes that it sends."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    latency_seconds = 0.0
    sent: "multiprocessing.sharedctypes.Synchronized[int]"

    def do_GET(self) -> None:  # noqa: D102
        time.sleep(self.latency_seconds)
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(asked[1]), min(int(asked[2] or size - 1), size - 1)) if asked else (0, size - 1)
        with path.open("rb") as stream:
            stream.seek(first)
            content = b"" if self.command == "HEAD" else stream.read(last + 1 - first)
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last + 1 - first))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        self.wfile.write(content)
        with self.sent.get_lock():
            self.sent.value += len(content)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:  # noqa: D102
        pass


class Server(ThreadingHTTPServer):
    """Says nothing of clients that hang up."""

    request_queue_size = 128

    def handle_error(self, *_: object) -> None:  # noqa: D102
        pass


def serve(folder: str, latency_seconds: float, sent: object, port: object) -> None:
    Handler.latency_seconds, Handler.sent = latency_seconds, sent
    server = Server(("127.0.0.1", 0), lambda *args: Handler(*args, directory=folder))
    port.value = server.server_port
    server.serve_forever()


def make_parquet(tars: list[Path], folder: Path, group: int) -> None:
    """Write the samples of each tar, in the order of their images, to a Parquet file as `datasets` writes it."""
    for path in tars:
        rows: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.split(".", 1)
                rows.setdefault(key, {})[extension] = tar.extractfile(member).read()
        images = [{"bytes": next(row[name] for name in IMAGES if name in row), "path": None} for row in rows.values()]
        captions = [row["txt"].decode() for row in rows.values()]
        table = pa.table({"key": list(rows), "image": images, "caption": captions})
        pq.write_table(table, folder / f"{path.stem}.parquet", row_group_size=group, compression="zstd")


class Result(NamedTuple):
    """One epoch that was read."""

    samples: int
    seconds: float
    cpu_seconds: float
    read_bytes: int
    content: str  # hash of all samples, in order


def measure(epoch: Callable[[], Samples], sent: "multiprocessing.sharedctypes.Synchronized[int] | None") -> Result:
    before, began, cpu, digest, count = read_so_far(sent), time.perf_counter(), cpu_seconds(), hashlib.sha256(), 0
    for image, caption in epoch():
        digest.update(image)
        digest.update(caption)
        count += 1
    seconds, used = time.perf_counter() - began, cpu_seconds() - cpu
    return Result(count, seconds, used, read_so_far(sent) - before, digest.hexdigest()[:16])


def cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system


def read_so_far(sent: "multiprocessing.sharedctypes.Synchronized[int] | None") -> int:
    if sent is not None:
        return sent.value
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def of_loader(plan: tailwise.Plan, cache: Path) -> Callable[[], Samples]:
    def epoch() -> Samples:
        loader = tailwise.Loader(plan, batch_size=BATCH, cache_folder=cache)
        for batch in loader.epoch(0):
            yield from ((image, text.encode()) for image, text in zip(batch.images, batch.texts, strict=True))
        loader.close()

    return epoch


def of_webdataset(urls: list[str], keys: set[str]) -> Callable[[], Samples]:
    def epoch() -> Samples:
        kept = wds.WebDataset(urls, shardshuffle=False).select(lambda row: row["__key__"] in keys)
        for row in kept.shuffle(1000):
            yield next(row[name] for name in IMAGES if name in row), row["txt"]

    return epoch


def of_datasets(urls: list[str], keys: set[str]) -> Callable[[], Samples]:
    def epoch() -> Samples:
        found = datasets.load_dataset("parquet", data_files=urls, split="train", streaming=True)
        kept = found.filter(lambda key: key in keys, input_columns="key")
        for row in kept.shuffle(buffer_size=1000):
            yield row["image"]["bytes"], row["caption"].encode()

    return epoch


def keys_of(plan: tailwise.Plan) -> set[str]:
    drawn, keys = plan.draw(0), []
    for part in plan.catalog.parts():
        keys += plan.catalog.samples(part, ["key"])["key"].to_pylist()
    return {key for key, copies in zip(keys, drawn.tolist(), strict=True) if copies}


def start_s3(folder: Path, tars: list[Path]) -> str:
    """Start moto's server with all files in a bucket; return its URL."""
    code = (
        "from moto.server import ThreadedMotoServer; server = ThreadedMotoServer(port=0, verbose=False); server.start(); "
        "print(server.get_host_and_port()[1], flush=True); server._thread.join()"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    atexit.register(server.kill)
    os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    fsspec.config.conf["s3"] = {"endpoint_url": f"http://127.0.0.1:{int(server.stdout.readline())}"}
    files = fsspec.filesystem("s3")
    files.mkdir("pool")
    for path in tars:
        files.put(str(path), f"pool/{path.name}")
        files.put(str(folder / f"{path.stem}.parquet"), f"pool/{path.stem}.parquet")
    return "s3://pool"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tars", type=Path)
    parser.add_argument("--keep", type=float, nargs="+", default=[1.0, 0.5, 0.1])
    parser.add_argument("--group", type=int, default=500, help="rows of a row group")
    parser.add_argument("--latency-ms", type=float, default=5)
    parser.add_argument("--no-s3", action="store_true")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    print_header(
        f"formats: row groups of {asked.group:,} rows, HTTP after {asked.latency_ms:g} ms, batches of {BATCH}",
        *("torch", "pyarrow", "datasets", "webdataset", "fsspec"),
    )
    tars = sorted(asked.tars.glob("*.tar"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        served = folder / "files"
        served.mkdir()
        make_parquet(tars, served, asked.group)
        for path in tars:
            (served / path.name).symlink_to(path.absolute())
        context = multiprocessing.get_context("spawn")
        sent, port = context.Value("q", 0), context.Value("i", 0)
        context.Process(target=serve, args=(name + "/files", asked.latency_ms / 1000, sent, port), daemon=True).start()
        while not port.value:
            time.sleep(0.05)
        places = {"disk": (str(served), None), "HTTP": (f"http://127.0.0.1:{port.value}", sent)}
        if not asked.no_s3:
            places["S3"] = start_s3(served, tars), None
        run(places, [path.stem for path in tars], asked.keep, folder)


def run(places: dict[str, tuple[str, object]], stems: list[str], keeps: Iterable[float], folder: Path) -> None:
    catalogs = {}
    for place, (root, _) in places.items():
        for suffix in ("tar", "parquet"):
            sources = [f"{root}/{stem}.{suffix}" for stem in stems]
            for at, source in enumerate(sources):
                if suffix == "parquet" and place == "disk":  # beside a tar it would be taken for its sidecar
                    alone = folder / "alone" / f"{stems[at]}.parquet"
                    alone.parent.mkdir(exist_ok=True)
                    alone.hardlink_to(source)
                    sources[at] = str(alone)
            began = time.perf_counter()
            catalogs[place, suffix] = tailwise.import_pool(sources, folder / f"{place}-{suffix}", workers=1).catalog
            print(f"import from {place}, {suffix}: {time.perf_counter() - began:.1f} s")
    for keep in keeps:
        print(f"\nkeep {keep:g}\n{'':34}samples/s  CPU us/sample  bytes/sample  same batches")
        wanted = None
        for (place, suffix), catalog in catalogs.items():
            root, sent = places[place]
            plan = tailwise.make_plan(catalog, f"keep-{keep:g}", tailwise.PlanRequest("random", keep=keep))
            result = measure(of_loader(plan, folder / f"cache-{place}-{suffix}-{keep:g}"), sent)
            wanted = wanted or result.content
            print_row(f"tailwise, {place}, {suffix}", result, "yes" if result.content == wanted else "NO", place)
            keys, urls = keys_of(plan), [f"{root}/{stem}.{suffix}" for stem in stems]
            if place == "S3":  # datasets 5.2 hands s3fs 2026.9 options that it does not take
                continue
            if suffix == "parquet":
                print_row(f"datasets, {place}", measure(of_datasets(urls, keys), sent), "", place)
            else:
                print_row(f"webdataset, {place}", measure(of_webdataset(urls, keys), sent), "", place)


def print_row(name: str, result: Result, same: str, place: str) -> None:
    count = max(1, result.samples)
    size = "" if place == "S3" else f"{result.read_bytes / count:,.0f}"
    print(
        f"{name:34}{count / result.seconds:9,.0f}{1e6 * result.cpu_seconds / count:15.0f}{size:>14}  {same}", flush=True
    )


if __name__ == "__main__":
    main()
