"""An S3 server on the loopback."""

import http.client
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


@pytest.fixture
def server(monkeypatch):
    """Address of a real S3 server with a bucket `pool`; the environment names it."""
    pytest.importorskip("obstore", reason="needs the extra s3: obstore")
    running = pytest.importorskip("moto.server", reason="needs moto[server]").ThreadedMotoServer("127.0.0.1", port=0)
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
    yield address
    running.stop()


@pytest.fixture
def object_store(server, tmp_path):
    from tailwise.storage import object_store

    object_store._opened.cache_clear()
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
        self.wfile.write(content)

    def log_message(self, *_):
        """Say nothing."""


for method in ("GET", "PUT", "HEAD", "DELETE", "POST"):
    setattr(_Proxy, f"do_{method}", _Proxy._pass_on)


@pytest.fixture
def faults(server, monkeypatch):
    """`faults[:] = ["lose", "refuse", …]`: what the next puts meet on the way to the server, and the requests that were seen."""
    waiting = []
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _Proxy)
    proxy.upstream = server
    proxy.fault = lambda method, _: waiting.pop(0) if method == "PUT" and waiting else None
    proxy.handle_error = lambda *_: None  # connections that are cut on purpose
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
    yield waiting
    proxy.shutdown()
    proxy.server_close()
