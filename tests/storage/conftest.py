"""An S3 server on the loopback."""

import http.client
import logging
import threading
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tailwise.storage import remote


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Address of a real S3 server with a bucket `pool`; the environment names it, and a cache of this test."""
    pytest.importorskip("obstore", reason="needs the extra s3: obstore")
    running = pytest.importorskip("moto.server", reason="needs moto[server]").ThreadedMotoServer("127.0.0.1", port=0)
    responses = pytest.importorskip("moto.s3.responses").S3Response
    put, one_at_a_time = responses._key_response_put, threading.RLock()

    def atomic(self, *args, **options):
        """S3 looks and writes at once; moto looks first, so that two threads could both find nothing."""
        conditional = self.headers.get("If-None-Match") or self.headers.get("If-Match")
        with one_at_a_time if conditional else nullcontext():
            return put(self, *args, **options)

    monkeypatch.setattr(responses, "_key_response_put", atomic)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    running.start()
    address = "{}:{}".format(*running.get_host_and_port())
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{address}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "very-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    for path, method in (("moto-api/reset", "POST"), ("pool", "PUT")):
        urllib.request.urlopen(urllib.request.Request(f"http://{address}/{path}", method=method))
    monkeypatch.setenv("TAILWISE_CACHE", str(tmp_path / "files"))
    _forget()
    yield address
    running.stop()


@pytest.fixture
def forget_servers():
    """`forget_servers()` forgets the servers of other tests."""
    return _forget


def _forget():
    """Forget the servers of other tests, which had files at the same URLs."""
    import s3fs

    from tailwise.storage import object_store, remote, store_path

    s3fs.S3FileSystem.clear_instance_cache()
    remote._own.filesystems.clear()
    object_store._opened.cache_clear()
    store_path._settled.clear()


@pytest.fixture
def object_store(server, tmp_path):
    from tailwise.storage import object_store

    return object_store.ObjectStore("s3://pool/catalog", tmp_path / "cache", 10_000_000)


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _pass_on(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.fault(self.command, self.path)
        if fault != "refuse":
            upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            content = answer.read()
        if fault == "lose":  # what was asked for is done, and nobody hears of it
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(503 if fault == "refuse" else answer.status)
        for name, value in [] if fault == "refuse" else answer.getheaders():
            if name.lower() not in {"content-length", "connection", "transfer-encoding", "date", "server"}:
                self.send_header(name, value)
        content = b"" if fault == "refuse" else content
        length = answer.getheader("Content-Length", "0") if self.command == "HEAD" and not fault else len(content)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
        self.close_connection = fault == "cut"

    def log_message(self, *_):
        """Say nothing."""


for method in ("GET", "PUT", "HEAD", "DELETE", "POST"):
    setattr(_Proxy, f"do_{method}", _Proxy._pass_on)


@contextmanager
def _between(server, monkeypatch, fault):
    """Put a proxy before the server: `fault(method, path)` is None, "refuse", "lose" or "cut"."""
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _Proxy)
    proxy.upstream, proxy.fault = server, fault
    proxy.handle_error = lambda *_: None  # connections that are cut on purpose
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
    _forget()
    yield
    proxy.shutdown()
    proxy.server_close()


@pytest.fixture
def between(server, monkeypatch):
    """`with between(fault):` the server is behind a proxy; see `_between`. s3fs and obstore are told."""

    @contextmanager
    def use(fault):
        with monkeypatch.context() as patch, _between(server, patch, fault):
            remote._own = remote._Process({})
            yield
        _forget()
        remote._own = remote._Process({})

    return use


@pytest.fixture
def faults(server, monkeypatch):
    """`faults[:] = ["lose", "refuse", …]`: what the next puts meet on the way to the server."""
    waiting = []
    with _between(server, monkeypatch, lambda method, _: waiting.pop(0) if method == "PUT" and waiting else None):
        yield waiting


@pytest.fixture
def requests(server, monkeypatch):
    """Counts of requests by method: all that go to the server."""
    counts = Counter()
    with _between(server, monkeypatch, lambda method, _: counts.update([method])):
        yield counts


@pytest.fixture
def sick_server(server, monkeypatch):
    """Let one request in 50 fail, and the response of one in 200 get lost; all take 20 ms longer. Return counts of what they met."""
    counts = Counter()

    def fault(*_):
        time.sleep(0.02)
        number = counts.total()
        met = "lose" if number % 200 == 150 else "refuse" if number % 50 == 30 else None
        counts[met] += 1
        return met

    with _between(server, monkeypatch, fault):
        yield counts
