"""hf:// against servers on the loopback that answer as the Hub and as its storage do; the client is the Hub's own."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailwise import Loader, PlanRequest, export_plan, import_pool, make_plan
from tailwise.errors import UserError
from tailwise.plan.plan import Plan
from tailwise.storage import remote
from tailwise.storage.errors import RemoteUnsupportedError
from tailwise.storage.remote import read_range, size_of

SIZES = (20, 12)
PAGE = 2  # entries that one request lists
COLUMNS = ["key", "caption", "image_offset", "image_bytes", "caption_offset", "caption_bytes"]


class Server(ThreadingHTTPServer):
    """The Hub, or the storage that its files are redirected to; `sick(handler)` may answer in its place."""

    daemon_threads = True

    def __init__(self, folder, storage=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.storage, self.asked, self.sick = folder, storage, [], lambda handler: False
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path, _, query = urllib.parse.unquote(self.path).partition("?")
        self.server.asked.append((path, self.headers.get("Authorization")))
        if self.server.sick(self):
            return
        if self.server.storage is None:
            self.part(path)
        elif self.headers.get("Authorization") != "Bearer hf_token":
            self.answer(401, b"{}", X_Error_Message="Invalid credentials")
        elif found := re.fullmatch(r"/datasets/some/pool/resolve/main/(.+)", path):
            there = (self.server.folder / found[1]).is_file()
            self.answer(302 if there else 404, Location=f"{self.server.storage.url}/{found[1]}")
        elif found := re.fullmatch(r"/api/datasets/some/pool/tree/main(/.*)?", path):
            self.listing((found[1] or "").strip("/"), query)
        elif re.fullmatch(r"/api/datasets/some/pool(/revision/main)?", path):
            self.answer(200, json.dumps({"id": "some/pool", "sha": "0" * 40, "siblings": []}).encode())
        elif path == "/api/datasets/some/pool/commits/main":  # of older versions, for the root
            commit = {"id": "0" * 40, "title": "", "message": "", "date": "2025-01-01T00:00:00.000Z", "authors": []}
            self.answer(200, json.dumps([commit]).encode())
        else:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")

    def do_POST(self):
        """The client of older versions looks names up one by one."""
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        paths = json.loads(body)["paths"] if body.startswith("{") else urllib.parse.parse_qs(body)["paths"]
        if self.server.sick(self):
            return
        if self.headers.get("Authorization") != "Bearer hf_token":
            self.answer(401, b"{}", X_Error_Message="Invalid credentials")
            return
        there = [path for path in (self.server.folder / name for name in paths) if path.exists()]
        self.answer(200, json.dumps([self.entry(path) for path in there]).encode())

    def entry(self, path):
        kind = {"type": "directory"} if path.is_dir() else {"type": "file", "size": path.stat().st_size}
        return {"path": path.relative_to(self.server.folder).as_posix(), "oid": "0" * 40, **kind}

    def listing(self, folder, query):
        there = self.server.folder / folder
        if not there.is_dir():
            return self.answer(404, b"{}", X_Error_Code="EntryNotFound")
        cursor = int(urllib.parse.parse_qs(query).get("cursor", ["0"])[0])
        names = sorted(there.iterdir())
        items = [self.entry(item) for item in names[cursor : cursor + PAGE]]
        more = {"Link": f'<{self.server.url}{self.path.split("?")[0]}?cursor={cursor + PAGE}>; rel="next"'}
        return self.answer(200, json.dumps(items).encode(), **(more if cursor + PAGE < len(names) else {}))

    def part(self, path):
        content = (self.server.folder / path.strip("/")).read_bytes()
        if "Range" not in self.headers:
            return self.answer(200, content)
        start, stop = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        stop = min(stop + 1, len(content))
        return self.answer(206, content[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{len(content)}")

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def once(**answer):
    left = [answer]
    return lambda handler: left and (handler.answer(**left.pop()) or True)


@pytest.fixture
def pool(tmp_path, make_pool):
    make_pool(tmp_path / "pool" / "data", SIZES)
    for name in ("README.md", "a.txt", "b.txt"):  # more than a page
        (tmp_path / "pool" / "data" / name).write_text("")
    return tmp_path / "pool"


@pytest.fixture
def hub(monkeypatch, pool):
    """The Hub and its storage, which the client of this process and of its children finds."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs huggingface_hub")
    pytest.importorskip("aiohttp", reason="needs aiohttp, fsspec's http")
    storage = Server(pool)
    hub = Server(pool, storage)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    for owner in (
        constants,
        importlib.import_module("huggingface_hub.file_download"),
    ):  # the second one's in old versions
        monkeypatch.setattr(owner, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    for name, value in {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_token", "HF_HUB_DISABLE_TELEMETRY": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "PATIENCE", remote.Patience(4, 100, 0.01, connect_seconds=50, silence_seconds=50))
    monkeypatch.setattr(remote, "_own", remote._Process({}))
    importlib.import_module("huggingface_hub").HfFileSystem.clear_instance_cache()
    yield hub
    for server in (hub, storage):
        server.shutdown()
        server.server_close()


def samples(catalog):
    return [catalog.samples(part, COLUMNS) for part in catalog.parts()]


def test_a_command_imports_from_the_hub(hub, pool, tmp_path):
    command = [sys.executable, "-m", "tailwise", "import", "hf://datasets/some/pool/data", str(tmp_path / "there")]
    made = subprocess.run([*command, "--workers", "1"], capture_output=True, text=True, check=False, env=os.environ)
    assert made.returncode == 0, made.stderr
    from tailwise.catalog.catalog import Catalog

    there, here = Catalog.open(tmp_path / "there"), import_pool(str(pool), tmp_path / "here", workers=1).catalog
    assert samples(there) == samples(here)
    paths = there.shards().column("path").to_pylist()
    assert paths == [f"hf://datasets/some/pool/data/{number:05d}.tar" for number in range(len(SIZES))]
    assert {token for _, token in hub.storage.asked} == {None}  # the token is the Hub's alone


@pytest.mark.parametrize("source", ["data/{00000..00001}.tar", "data/*.tar", "", "@main/data/00000.tar"])
def test_sources(hub, tmp_path, source):
    url = f"hf://datasets/some/pool{'' if source.startswith('@') or not source else '/'}{source}"
    report = import_pool(url, tmp_path / "catalog", workers=1)
    assert report.new_samples == (SIZES[0] if "00000.tar" in source else sum(SIZES))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_reads_ranges_past_short_troubles(hub, pool, tmp_path, workers):
    expected = batches_of(str(pool), tmp_path / "here", workers)
    hub.sick, hub.storage.sick = once(status=429, Retry_After="0"), once(status=503)
    assert batches_of("hf://datasets/some/pool/data", tmp_path / "there", workers) == expected
    assert {token for _, token in hub.storage.asked} == {None}


def batches_of(source, folder, workers=0):
    catalog = import_pool(source, folder / "catalog", workers=1).catalog
    plan = make_plan(catalog, "p", PlanRequest("random", keep=0.5))
    loader = Loader(plan, batch_size=4, lanes=2, workers=workers, cache_folder=folder / "cache")
    try:
        return [(batch.images, batch.texts) for batch in loader.epoch(0)]
    finally:
        loader.close()


def test_parquet_files_with_images_are_read_from_the_hub(hub, pool, tmp_path, make_image):
    images = [{"bytes": make_image(seed=number), "path": f"{number}.jpg"} for number in range(30)]
    (pool / "parquet").mkdir()
    table = pa.table({"image": images, "caption": [f"caption {number}" for number in range(30)]})
    pq.write_table(table, pool / "parquet" / "train-0.parquet", row_group_size=8)
    there = batches_of("hf://datasets/some/pool/parquet", tmp_path / "there")
    assert there == batches_of(str(pool / "parquet"), tmp_path / "here") and len(there) == 3


def test_lists_of_urls_are_read_from_the_hub(hub, pool, tmp_path):
    (pool / "laion").mkdir()
    for number in range(2):
        table = pa.table(
            {"SAMPLE_ID": range(9), "URL": [f"https://{number}/{row}" for row in range(9)], "TEXT": ["a"] * 9}
        )
        pq.write_table(table, pool / "laion" / f"{number}.parquet")
    catalog = import_pool("hf://datasets/some/pool/laion", tmp_path / "there", workers=1).catalog
    here = import_pool(pool / "laion", tmp_path / "here", workers=1).catalog
    assert samples(catalog) == samples(here)
    assert catalog.shards()["index_checksum"] == here.shards()["index_checksum"]
    plan = make_plan(catalog, "p", PlanRequest("random", keep=1.0))
    assert export_plan(plan, "urls", tmp_path / "urls.parquet") == 18
    assert pq.read_table(tmp_path / "urls.parquet")["url"].to_pylist()[9:11] == ["https://1/0", "https://1/1"]


@pytest.mark.parametrize("folder", ["", "/plans/one"])
def test_plan_bundles_are_read_from_the_hub(hub, pool, tmp_path, run_tailwise, folder):
    catalog = import_pool(str(pool / "data"), tmp_path / "catalog", workers=1).catalog
    plan = make_plan(catalog, "p", PlanRequest("random", keep=0.5, seed=3))
    export_plan(plan, "plan-bundle", tmp_path / "bundle")
    shutil.copytree(tmp_path / "bundle", pool / folder.strip("/"), dirs_exist_ok=True)
    hub.sick, hub.storage.sick = once(status=429, Retry_After="0"), once(status=503)
    source = f"hf://datasets/some/pool{folder}"
    shown = run_tailwise("plan", catalog.folder, "theirs", "--from", source).stdout
    assert "no sample of the bundle is missing" in shown
    assert (Plan(catalog, "theirs").draw(4) == plan.draw(4)).all()
    assert source in run_tailwise("plan", catalog.folder, "x", "--from", f"{source}/no", code=2).stderr
    record = pool / folder.strip("/") / "plan.json"
    record.write_text(record.read_text().replace('"seed": 3', '"seed": 4'))
    (record.parent / "plan.parquet").write_bytes(b"PAR1")
    assert "is missing, or not the file" in run_tailwise("plan", catalog.folder, "x", "--from", source, code=2).stderr


def test_reads_are_ranges_of_no_more_than_was_asked_for(hub, pool):
    url, content = "hf://datasets/some/pool/data/00000.tar", (pool / "data" / "00000.tar").read_bytes()
    assert size_of(url) == len(content)
    assert read_range(url, 700, 900).content == content[700:900]
    assert read_range(url, 900, 10**6).content == content[900:]
    assert len(hub.storage.asked) == 2


@pytest.mark.parametrize("url", ["hf://datasets/some/pool/data", "hf://datasets/other/pool/data"])
def test_without_a_token_the_remedy_is_named(hub, tmp_path, monkeypatch, url):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"HTTP 401 Unauthorized .*hf auth login") as caught:
        import_pool(url, tmp_path / "catalog", workers=1)
    assert "hf_wrong" not in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_not_there_is_named(hub, tmp_path):
    for name in ("other/pool/data", "some/pool/nowhere", "some/pool/data/9.tar"):
        with pytest.raises(UserError, match=name):
            import_pool(f"hf://datasets/{name}", tmp_path / "catalog", workers=1)


def test_a_sick_hub_is_no_empty_one(hub, tmp_path):
    hub.sick = lambda handler: handler.answer(400, b"{}") or True
    with pytest.raises(UserError, match="HTTP 400 Bad Request"):
        import_pool("hf://datasets/some/pool/data", tmp_path / "catalog", workers=1)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(remote, "_own", remote._Process({}))
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "hf", raising=False)
    for package, url, command in (
        ("huggingface_hub", "hf://datasets/some/pool/0.tar", r"pip install .*(huggingface.hub|\.\[hub)"),
        ("gcsfs", "gs://b/0.tar", "pip install gcsfs"),
        ("adlfs", "az://b/0.tar", "pip install adlfs"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(RemoteUnsupportedError, match=command):
            size_of(url)
