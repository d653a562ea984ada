"""Pools on web servers that misbehave: import, embed, evaluate, train and export give the right bytes, or name the tar in one line."""

import io
import logging
import re
import socket
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow.parquet as pq
import pytest

from tailwise import Loader, PlanRequest, import_pool, make_plan
from tailwise.errors import UserError
from tailwise.evaluate.sets import find_set
from tailwise.export.shards import write_shards
from tailwise.requests import EmbedRequest, ExportRequest
from tailwise.steps.embedding.embed import embed
from tailwise.steps.embedding.read import ShardRows, read_batches
from tailwise.storage import remote

SIZES = (40, 30, 20)
TARS = [f"{number:05d}.tar" for number in range(len(SIZES))]


class Server(ThreadingHTTPServer):
    """A folder; `sick[name]` answers requests for that file in its own way."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.sick, self.asked, self.ranges = folder, {}, [], True
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        """Broken pipes are what these tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(405)

    def do_GET(self):
        name = self.path.rsplit("/", 1)[-1].split("?")[0]
        path = self.server.folder / name
        self.server.asked.append(name)
        sick = self.server.sick.get(name)
        content = path.read_bytes() if path.is_file() else None
        if sick and sick(self, content) is not False:
            return
        if content is None:
            self.answer(404)
            return
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if self.server.ranges else None
        if not found:
            self.answer(200, content)
            return
        start, stop = int(found[1]), min(int(found[2]) + 1, len(content))
        self.answer(206, content[start:stop], **{"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"})

    def answer(self, status, content=b"", length=True, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if length:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        if not length:
            self.cut()

    def cut(self):
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, make_tar, make_image):
    pytest.importorskip("aiohttp", reason="needs aiohttp, fsspec's http")
    for shard, size in enumerate(SIZES):
        keys = [f"{shard:05d}{number:04d}" for number in range(size)]
        members = [
            pair
            for key in keys
            for pair in ((f"{key}.jpg", make_image(seed=int(key))), (f"{key}.txt", f"caption {key}".encode()))
        ]
        make_tar(tmp_path / "pool" / TARS[shard], members)
    server = Server(tmp_path / "pool")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def be_patient(monkeypatch):
    """`be_patient(silence_seconds)` sets how long a request waits. By default, it waits for a busy machine, and is repeated at once."""

    def use(silence_seconds=50):
        patience = remote.Patience(4, 100, 0.01, connect_seconds=50, silence_seconds=silence_seconds)
        monkeypatch.setattr(remote, "PATIENCE", patience)
        remote.forget_failures()

    use()
    return use


def imported(server, folder, **options):
    return import_pool([f"{server.url}/{{00000..00002}}.tar"], folder, workers=1, **options)


def refused(catalog):
    found = [row for path in (catalog.folder / "rejected").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    return {row["file"].rsplit("/", 1)[-1]: f"{row['reason']}: {row['detail']}" for row in found}


def once(sick):
    left = [1]
    return lambda handler, content: sick(handler, content) if left and left.pop() else False


def half(handler, content):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    handler.cut()


def status(code, **headers):
    return lambda handler, content: handler.answer(code, b"oops", **headers)


def elsewhere(handler, content):
    if handler.path.startswith("/elsewhere/"):
        return False
    handler.answer(302, Location=f"/elsewhere{handler.path}")
    return True


def slowly(handler, content):
    time.sleep(0.1)
    return False


def portal(handler, content):
    handler.answer(200, b"<html>sign in</html>" * 4500, **{"Content-Type": "text/html"})


def small_portal(handler, content):
    handler.answer(200, b"<html>log in</html>", **{"Content-Type": "text/html"})


def half_without_length(handler, content):
    handler.answer(200, content[: len(content) // 2], length=False)


# --- import ----------------------------------------------------------------------------------------------------------------

HARMLESS = {  # made for each test: some pass once
    "no ranges": lambda: lambda handler, content: handler.answer(200, content),
    "500 once": lambda: once(status(500)),
    "503 once": lambda: once(status(503, **{"Retry-After": "0"})),
    "429 once": lambda: once(status(429, **{"Retry-After": "0"})),
    "redirect": lambda: elsewhere,
    "slow": lambda: slowly,
    "cut once": lambda: once(half),
    "no answer once": lambda: once(lambda handler, content: handler.cut()),
    "no ranges, no length": lambda: lambda handler, content: handler.answer(200, content, length=False),
}
FOR_GOOD = {
    "503": (status(503), "unreadable tar: .*HTTP 503 Service Unavailable"),
    "403": (status(403), "unreadable tar: .*HTTP 403 Forbidden"),
    "401": (status(401), "unreadable tar: .*HTTP 401"),
    "cut": (half, "unreadable tar: "),
    "silence": (lambda handler, content: time.sleep(3), "unreadable tar: .*time-out"),
    "compressed": (status(200, **{"Content-Encoding": "gzip"}), "unreadable tar: .*compressed"),
    "portal": (portal, "not a tar"),
    "small portal": (small_portal, "not a tar"),
    "half, as if whole": (half_without_length, "tar without an end"),
}


@pytest.mark.parametrize("sick", HARMLESS)
def test_import_gets_all(server, tmp_path, sick):
    server.sick["00001.tar"] = HARMLESS[sick]()
    report = imported(server, tmp_path / "catalog")
    assert (report.new_samples, refused(report.catalog)) == (sum(SIZES), {})
    here = import_pool([str(tmp_path / "pool")], tmp_path / "here", workers=1).catalog
    columns = ["key", "caption", "image_offset", "image_bytes", "caption_offset", "caption_bytes"]
    for part in here.parts():
        assert report.catalog.samples(part, columns) == here.samples(part, columns)


@pytest.mark.parametrize(("sick", "reason"), FOR_GOOD.values(), ids=FOR_GOOD)
def test_import_rejects_what_fails_for_good_and_tries_it_again_next_time(server, tmp_path, be_patient, sick, reason):
    server.sick["00001.tar"] = sick
    if "time-out" in reason:
        be_patient(silence_seconds=0.5)
    began = time.monotonic()
    report = imported(server, tmp_path / "catalog")
    assert time.monotonic() - began < 60
    found = refused(report.catalog)
    assert set(found) == {"00001.tar"} and re.match(reason, found["00001.tar"])
    assert server.asked.count("00001.tar") <= 10
    kept = SIZES[0] + SIZES[2]
    if "without an end" in reason:
        assert kept < report.new_samples < sum(SIZES)  # what came of it is kept, as of any tar that is cut off
        return
    assert report.new_samples == kept
    server.sick.clear()
    again = imported(server, tmp_path / "catalog")
    assert (again.new_samples, again.snapshot.rows) == (SIZES[1], sum(SIZES))


def test_a_rerun_needs_no_tar_that_is_there_already(server, tmp_path):
    imported(server, tmp_path / "catalog")
    server.sick["00001.tar"] = status(503)
    assert imported(server, tmp_path / "catalog").new_samples == 0


@pytest.mark.parametrize(
    ("sick", "says"), [(status(503), "HTTP 503"), (status(403), "HTTP 403"), (half, "00000.tar"), (portal, "not a tar")]
)
def test_nothing_that_can_be_read_is_one_line(server, tmp_path, sick, says):
    server.sick = dict.fromkeys(TARS, sick)
    with pytest.raises(UserError, match=says) as caught:
        imported(server, tmp_path / "catalog")
    assert "00000.tar" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_tar_is_named(server, tmp_path):
    with pytest.raises(UserError, match=r"9\.tar"):
        import_pool([f"{server.url}/9.tar"], tmp_path / "catalog", workers=1)


def test_sidecars_that_fail_are_counted(server, tmp_path):
    server.sick["00001.parquet"] = status(503)
    server.sick["00002.parquet"] = status(403)
    report = imported(server, tmp_path / "catalog")
    assert report.new_samples == sum(SIZES)
    found = refused(report.catalog)
    assert "HTTP 503" in found["00001.parquet"] and "HTTP 403" in found["00002.parquet"]
    assert all("unreadable sidecar" in text for text in found.values())


def test_passwords_are_not_told(server, tmp_path, caplog):
    server.sick["00001.tar"] = status(503)
    url = server.url.replace("//", "//user:secret@")
    report = import_pool([f"{url}/{{00000..00002}}.tar"], tmp_path / "catalog", workers=1)
    assert report.new_samples == SIZES[0] + SIZES[2]
    assert "00001.tar" in caplog.text and "secret" not in caplog.text
    assert "secret" not in refused(report.catalog)["00001.tar"]
    with pytest.raises(UserError) as caught:
        import_pool([f"{url}/00001.tar"], tmp_path / "other", workers=1)
    assert "HTTP 503" in str(caught.value) and "secret" not in str(caught.value)


# --- training --------------------------------------------------------------------------------------------------------------


def all_rows(plan, tmp_path, workers=0, **options):
    loader = Loader(plan, batch_size=6, lanes=2, workers=workers, cache_folder=tmp_path / "cache", **options)
    try:
        return [(batch.texts, batch.replaced) for batch in loader.epoch(0)]
    finally:
        loader.close()


@pytest.fixture
def plan(server, tmp_path):
    return make_plan(imported(server, tmp_path / "catalog").catalog, "p", PlanRequest("random", keep=0.9))


def test_a_server_without_ranges_trains_the_same(server, tmp_path, plan):
    expected = all_rows(plan, tmp_path)
    server.ranges = False
    server.asked.clear()
    for workers in (0, 2):
        assert all_rows(plan, tmp_path / str(workers), workers) == expected
    assert len(server.asked) < 200


@pytest.mark.parametrize("sick", [status(503), status(403), half, portal, status(404)])
def test_a_tar_that_fails_while_training_is_named_or_replaced(server, tmp_path, plan, caplog, sick):
    server.sick["00001.tar"] = sick
    with pytest.raises(UserError, match=r"00001\.tar"):
        all_rows(plan, tmp_path, check="none")
    server.asked.clear()
    began = time.monotonic()
    batches = all_rows(plan, tmp_path, check="none", on_damaged="replace", max_replaced=1.0)
    assert time.monotonic() - began < 60
    replaced = [item for _, items in batches for item in items]
    assert replaced and all("00001.tar" in item.reason for item in replaced)
    assert not any("caption 00001" in text for texts, _ in batches for text in texts)
    assert server.asked.count("00001.tar") < 25
    assert any("00001.tar" in record.message for record in caplog.records if record.levelno >= logging.WARNING)


@pytest.mark.parametrize("sick", HARMLESS)
def test_the_loader_reads_past_what_passes(server, tmp_path, plan, sick):
    expected = all_rows(plan, tmp_path)
    server.sick = {"00000.tar": HARMLESS[sick](), "00002.tar": once(half)}
    assert all_rows(plan, tmp_path / "other") == expected
    assert server.asked.count("00000.tar") > 1


def test_export_of_shards_names_or_leaves_out(server, tmp_path, plan):
    server.sick["00001.tar"] = status(503)
    with pytest.raises(UserError, match=r"00001\.tar.*HTTP 503"):
        write_shards(plan, 0, tmp_path / "out", ExportRequest(workers=1))
    written = write_shards(plan, 0, tmp_path / "out", ExportRequest(workers=1, max_rejected=1.0))
    assert written.rejected["unreadable"] > 0 and written.samples > 0


# --- embed and evaluate ----------------------------------------------------------------------------------------------------


def embedded(catalog):
    from tailwise.encoders.encoder import Inputs

    shards = [ShardRows(shard, 0, sum(SIZES[:shard]), SIZES[shard]) for shard in range(3)]
    seen = []

    def prepare(items):
        seen.extend(items)
        return Inputs({}, {})

    for _ in read_batches(catalog.folder, "image", prepare, shards, 16, workers=1):
        pass
    return seen


def test_embedding_reads_all_or_names_the_tar(server, tmp_path):
    catalog = imported(server, tmp_path / "catalog").catalog
    expected = embedded(catalog)
    assert len(expected) == sum(SIZES)
    server.sick = {name: once(sick) for name, sick in zip(TARS, (status(500), half, status(429)), strict=True)}
    assert embedded(catalog) == expected
    server.ranges = False
    assert embedded(catalog) == expected
    for sick, says in (
        (status(503), "HTTP 503"),
        (status(404), "HTTP 404"),
        (half, "payload"),
        (portal, "90,000 bytes"),
    ):
        server.sick["00001.tar"] = sick
        with pytest.raises(UserError, match=rf"the shard .*00001\.tar can't be read \(.*{says}"):
            embedded(catalog)


def evaluation_set(folder, image):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for number in range(5):
            for name, content in ((f"{number}.jpg", image), (f"{number}.cls", b"0")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    (folder / "set.tar").write_bytes(stream.getvalue())
    (folder / "classnames.txt").write_text("cat\ndog\n")


def test_evaluation_sets(server, tmp_path, make_image):
    evaluation_set(server.folder, make_image())
    for ranges in (True, False):
        server.ranges = ranges
        server.sick = {"set.tar": once(status(500)), "classnames.txt": once(half)}
        found = find_set(f"{server.url}/set.tar")
        assert found.classes == ("cat", "dog") and len(list(found.shards[0].samples())) == 5
    server.sick["classnames.txt"] = status(503)
    with pytest.raises(UserError, match=r"classnames\.txt can't be read \(HTTP 503"):
        find_set(f"{server.url}/set.tar")
    server.sick = {"set.tar": status(503)}
    with pytest.raises(UserError, match=r"set\.tar can't be read \(HTTP 503"):
        list(find_set(f"{server.url}/set.tar").shards[0].samples())


def test_a_tar_that_a_server_has_replaced(server, tmp_path, make_tar, make_image):
    """A cut download whose rest came later: images before the cut keep their embeddings, others are read from the server."""
    members = [
        (f"k{row:02d}.{suffix}", content)
        for row in range(60)
        for suffix, content in (("jpg", make_image(row) + bytes(5000)), ("txt", b"a caption"))
    ]
    whole = make_tar(tmp_path / "pool" / TARS[1], members).read_bytes()
    (tmp_path / "pool" / TARS[1]).write_bytes(whole[: len(whole) // 2])
    catalog = imported(server, tmp_path / "catalog").catalog
    request = EmbedRequest(encoder="pixels", workers=1)
    embed(catalog, request)
    before = catalog.snapshot().rows
    (tmp_path / "pool" / TARS[1]).write_bytes(whole)
    remote.forget_failures()
    assert imported(server, tmp_path / "catalog").changed == [f"{server.url}/{TARS[1]}"]
    server.asked.clear()
    report = imported(server, tmp_path / "catalog", update=True)
    assert (report.new_shards, report.new_samples, report.changed) == (1, 60, [])
    embed(catalog, request)
    other = imported(server, tmp_path / "other").catalog
    embed(other, request)
    images, wanted = (
        np.concatenate(one.embedding_parts("image", one.snapshot())).tobytes() for one in (catalog, other)
    )
    rows = len(wanted) // other.snapshot().rows  # bytes of each
    assert images[before * rows :] == wanted[SIZES[0] * rows : (SIZES[0] + 60) * rows]
    plan = make_plan(catalog, "p", PlanRequest("random", keep=0.9))
    assert not next(iter(Loader(plan, batch_size=20, cache_folder=tmp_path / "cache"))).replaced
