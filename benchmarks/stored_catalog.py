"""A catalog in an object store against one on the local disk: seconds of each step, and requests to the store.

The store is moto's S3 server on the loopback, in a process of its own; each request of tailwise waits `--latency-ms` before it is sent.
The last row says what another node pays: a draw with an empty cache. The pool is made up, as in
stages.py; a small pool goes through all steps first. Needs `pip install 'tailwise[s3]' 'moto[server]'`.
usage: stored_catalog.py [--rows 1000000] [--part-rows 100000] [--latency-ms 20]
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import stages
from common import print_header

import tailwise
from tailwise.requests import ClusterRequest, DedupRequest, FilterRequest
from tailwise.storage.object_store import ObjectStore

WARM_UP_ROWS = 4_000
SERVER = """
import logging, sys, time
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer("127.0.0.1", port=0)
server.start()
print("http://{}:{}".format(*server.get_host_and_port()), file=sys.stderr, flush=True)
time.sleep(1e6)
"""
sent = [0]  # requests


@contextmanager
def serving() -> Iterator[None]:
    """Run the server; the environment names it."""
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        address = server.stderr.readline().strip()
        os.environ |= {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
        urllib.request.urlopen(urllib.request.Request(f"{address}/pool", method="PUT"))
        yield
        server.kill()


def count_requests(latency_seconds: float) -> None:
    """Count the requests of this process, and let each wait."""
    real = ObjectStore._requests

    def counted(store: ObjectStore, key: str | None) -> Any:
        sent[0] += 1
        time.sleep(latency_seconds)
        return real(store, key)

    ObjectStore._requests = counted


def run_steps(place: str, output: Path, source: Path, rows: int, part_rows: int) -> dict[str, tuple[float, int]]:
    """Run all steps over a new catalog; return seconds and requests by step."""
    output.mkdir()
    catalog = partial(tailwise.Catalog.open, place)
    plan = tailwise.PlanRequest("dynamics", keep=0.5, without=["duplicates"])
    work: dict[str, Callable[[], Any]] = {
        "import": lambda: tailwise.import_pool(source, place, part_rows=part_rows, workers=1),
        f"cluster, K = {rows // 400:,}": lambda: tailwise.cluster(catalog(), ClusterRequest(k=rows // 400)),
        "dedup, ε = 0.05": lambda: tailwise.dedup(catalog(), DedupRequest(epsilon=0.05)),
        "filter by CLIP score": lambda: tailwise.filter_samples(
            catalog(), FilterRequest("clip-score", keep=0.5, name="clip")
        ),
        "plan, dynamics": lambda: tailwise.make_plan(catalog(), "epochs", plan),
        "draw of an epoch": lambda: tailwise.Plan(catalog(), "epochs").draw(1),
        "export to parquet": lambda: tailwise.export_plan(
            tailwise.Plan(catalog(), "epochs"), "parquet", output / "epoch.parquet", epoch=1
        ),
        "draw, empty cache": lambda: (forget_copies(), tailwise.Plan(catalog(), "epochs").draw(1)),
    }
    return {name: timed(step) for name, step in work.items()}


def forget_copies() -> None:
    for path in Path(os.environ["TAILWISE_CACHE"]).glob("*"):
        path.unlink()


def timed(step: Callable[[], Any]) -> tuple[float, int]:
    before = time.perf_counter(), sent[0]
    step()
    return time.perf_counter() - before[0], sent[0] - before[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--part-rows", type=int, default=100_000)
    parser.add_argument("--latency-ms", type=float, default=20.0)
    asked = parser.parse_args()
    shape = f"{asked.rows:,} made-up rows of {stages.DIMENSION} dimensions, parts of {asked.part_rows:,}"
    print_header(f"stored_catalog: {shape}; {asked.latency_ms:g} ms a request", "obstore", "moto", "torch", "numba")
    with tempfile.TemporaryDirectory() as temporary, serving():
        folder = Path(temporary)
        os.environ["TAILWISE_CACHE"] = str(folder / "cache")
        (folder / "cache").mkdir()
        count_requests(asked.latency_ms / 1000)
        found = {}
        for rows in (WARM_UP_ROWS, asked.rows):
            part_rows = min(asked.part_rows, rows // 2)
            source = stages.make_metadata(folder / f"metadata-{rows}", rows, file_rows=part_rows)
            for name, place in (("local", str(folder / f"{rows}")), ("store", f"s3://pool/{rows}")):
                found[name] = run_steps(place, folder / f"{name}-{rows}", source, rows, part_rows)
                shutil.rmtree(folder / f"{name}-{rows}")
        print(f"{'step':24} {'local':>10} {'store':>10} {'more':>9} {'requests':>9} {'wait for latency':>17}")
        for name, (seconds, _) in found["local"].items():
            stored, count = found["store"][name]
            wait = count * asked.latency_ms / 1000
            print(f"{name:24} {seconds:8.2f} s {stored:8.2f} s {stored - seconds:7.2f} s {count:9,} {wait:15.2f} s")
        print(f"load of the machine: {os.getloadavg()[1]:.1f}")


if __name__ == "__main__":
    main()
