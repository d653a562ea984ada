"""Reading a share of the samples from an object store: single ranges, coalesced ranges (what RemoteShards decides), whole shards.

The store is an HTTP server with ranges on the loopback, in a process of its own, that waits before each answer and sends no connection
more than so many bytes a second. Samples to keep are drawn at random; the ranges of the next shards are wanted while these are read. Every
strategy begins with an empty cache, and auto without any estimate of the link.
usage: object_store.py [--latency-ms 20] [--connection-mb 100] [--tars 20] [--samples 1000] [--sample-kb 20]
"""

import argparse
import io
import multiprocessing
import re
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from common import print_header

from tailwise.shards.remote import CONNECTIONS, RemoteShards
from tailwise.shards.webdataset import read_shard
from tailwise.storage.spans import LinkEstimate

KEEP = (1.0, 0.5, 0.277, 0.1, 0.02)
SHARDS_AT_ONCE = 4
CHUNK_BYTES = 1 << 18


class Handler(BaseHTTPRequestHandler):
    """Answers a range after the latency, at the bandwidth."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else small answers wait 40 ms for an acknowledgement
    folder: Path
    latency_seconds: float
    connection_bytes: float

    def do_GET(self):  # noqa: D102
        path = self.folder / self.path[1:]
        size = path.stat().st_size if path.exists() else 0
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", f"bytes=0-{size}"))
        first, last = map(int, found.groups())
        time.sleep(self.latency_seconds)
        if not size:
            self.send_error(404)
            return
        with path.open("rb") as stream:
            stream.seek(first)
            content = stream.read(last + 1 - first)
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {first}-{first + len(content) - 1}/{size}")
        self.end_headers()
        began = time.monotonic()
        for at in range(0, len(content), CHUNK_BYTES):
            chunk = content[at : at + CHUNK_BYTES]
            self.wfile.write(chunk)
            time.sleep(max(0.0, began + (at + len(chunk)) / self.connection_bytes - time.monotonic()))

    def log_message(self, *_):  # noqa: D102
        pass


class Server(ThreadingHTTPServer):
    """Takes many connections at once."""

    request_queue_size = 128

    def handle_error(self, *_):  # noqa: D102  (clients end connections)
        pass


def serve(folder: Path, latency_seconds: float, connection_bytes: float, port: multiprocessing.SimpleQueue) -> None:
    Handler.folder, Handler.latency_seconds, Handler.connection_bytes = folder, latency_seconds, connection_bytes
    server = Server(("127.0.0.1", 0), Handler)
    port.put(server.server_port)
    server.serve_forever()


class Always(LinkEstimate):
    """A link on which a request is always worth the same number of bytes."""

    def __init__(self, request_bytes: float) -> None:
        super().__init__()
        self.worth = request_bytes

    @property
    def request_bytes(self) -> float:  # noqa: D102
        return self.worth


STRATEGIES = {
    "single ranges": lambda: Always(-1.0),
    "auto": LinkEstimate,
    "whole shards": lambda: Always(float(1 << 40)),
}


def make_tars(folder: Path, tars: int, samples: int, sample_bytes: int) -> None:
    generator = np.random.default_rng(0)
    for shard in range(tars):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in range(samples):
                size = int(sample_bytes * generator.uniform(0.5, 1.5))
                for suffix, content in (("jpg", generator.bytes(size)), ("txt", b"a photo of a thing")):
                    info = tarfile.TarInfo(f"{shard:05d}{sample:04d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def ranges_of(paths: list[Path]) -> np.ndarray:
    """All samples, image and caption together: int64 [n, 3]."""
    found = []
    for shard, path in enumerate(paths):
        table = read_shard(str(path)).samples
        start = table.column("image_offset").to_numpy()
        stop = table.column("caption_offset").to_numpy() + table.column("caption_bytes").to_numpy()
        found.append(np.stack([np.full(len(start), shard), start, stop], axis=1))
    return np.concatenate(found)


def blocks_of(wanted: np.ndarray) -> Iterator[np.ndarray]:
    """The wanted ranges of SHARDS_AT_ONCE shards at a time, shuffled."""
    generator = np.random.default_rng(2)
    for first in range(0, int(wanted[:, 0].max()) + 1, SHARDS_AT_ONCE):
        block = wanted[(wanted[:, 0] >= first) & (wanted[:, 0] < first + SHARDS_AT_ONCE)]
        yield generator.permutation(block)


def measure(urls: list[str], wanted: np.ndarray, link: LinkEstimate) -> tuple[float, int, int]:
    folder = Path(tempfile.mkdtemp())
    store = RemoteShards(urls, folder, 1 << 34)
    store._own.link = link
    blocks = list(blocks_of(wanted))
    start = time.perf_counter()
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if following is not None:
            store.want(following)
        if any(isinstance(content, OSError) for content in store.read_many(block)):
            raise SystemExit("a range could not be read")
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    return seconds, store.statistics["requests"], store.statistics["bytes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency-ms", type=float, default=20)
    parser.add_argument("--connection-mb", type=float, default=100)
    parser.add_argument("--tars", type=int, default=20)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--sample-kb", type=float, default=20)
    options = parser.parse_args()
    print_header(
        f"object_store: {options.tars} tars of {options.samples:,} samples of about {options.sample_kb:g} KB; "
        f"{options.latency_ms:g} ms a request, {options.connection_mb:g} MB/s a connection, {CONNECTIONS} connections",
        "fsspec",
        "aiohttp",
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_tars(folder, options.tars, options.samples, int(options.sample_kb * 1000))
        paths = sorted(folder.glob("*.tar"))
        ranges = ranges_of(paths)
        context = multiprocessing.get_context("spawn")
        port = context.SimpleQueue()
        arguments = (folder, options.latency_ms / 1000, options.connection_mb * 1e6, port)
        server = context.Process(target=serve, args=arguments, daemon=True)
        server.start()
        address = f"http://127.0.0.1:{port.get()}"
        urls = [f"{address}/{path.name}" for path in paths]
        measure(urls, ranges[:50], LinkEstimate())  # imports, event loop
        print(f"{'keep':>6}  {'strategy':14} {'wall s':>8} {'requests':>9} {'MB':>8}  wall / best")
        for keep in KEEP:
            wanted = ranges[np.random.default_rng(1).random(len(ranges)) < keep]
            found = {name: measure(urls, wanted, make()) for name, make in STRATEGIES.items()}
            best = min(seconds for seconds, _, _ in found.values())
            for name, (seconds, requests, size) in found.items():
                print(f"{keep:6.3f}  {name:14} {seconds:8.2f} {requests:9,} {size / 1e6:8.1f}  {seconds / best:.2f}")
        server.terminate()
        server.join()


if __name__ == "__main__":
    main()
