"""Remote files against a server on the loopback that misbehaves: right bytes, or one RemoteError within bounds."""

import asyncio
import io
import multiprocessing
import pickle
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from tailwise.errors import UserError
from tailwise.storage import remote
from tailwise.storage.errors import (
    NoRangesError,
    RemoteError,
    RemoteNotFoundError,
    RemoteUnsupportedError,
    translated,
)
from tailwise.storage.files import BLOCK_BYTES, open_binary
from tailwise.storage.remote import read_range, size_of
from tailwise.storage.spans import LinkEstimate
from tailwise.text import redacted

CONTENT = np.random.default_rng(0).bytes(300_000)
ATTEMPTS = 4


class Server(ThreadingHTTPServer):
    """One file by any name; `behave(handler, start, stop, count)` answers, or returns False for the usual answer."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave = lambda *_: False
        self.asked = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/0.tar"

    def handle_error(self, *_):
        """Broken pipes are what these tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(found[1]), min(int(found[2]) + 1, len(CONTENT))) if found else (0, len(CONTENT))
        self.server.asked.append((start, stop))
        if self.server.behave(self, start, stop, len(self.server.asked)) is False:
            self.part(start, stop)

    def part(self, start, stop, **headers):
        if "Range" not in self.headers:
            self.answer(200, CONTENT)
            return
        content = CONTENT[start:stop]
        usual = {"Content-Range": f"bytes {start}-{stop - 1}/{len(CONTENT)}", "Content-Length": len(content)}
        self.answer(206, content, **{**usual, **{name.replace("_", "-"): value for name, value in headers.items()}})

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        headers = {"Content-Length": len(content), **{name.replace("_", "-"): item for name, item in headers.items()}}
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, str(value))
        if headers["Content-Length"] is None:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def cut(self):
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    pytest.importorskip("aiohttp", reason="needs aiohttp, fsspec's http")
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def be_patient(monkeypatch):
    """`be_patient(**bounds)` sets the bounds of requests. By default they are repeated at once, and wait for a busy machine."""

    def use(seconds=100, connect_seconds=50, silence_seconds=50, **bounds):
        patience = remote.Patience(
            ATTEMPTS, seconds, 0.01, connect_seconds=connect_seconds, silence_seconds=silence_seconds, **bounds
        )
        monkeypatch.setattr(remote, "PATIENCE", patience)
        remote.forget_failures()

    use()
    return use


# --- what passes -----------------------------------------------------------------------------------------------------------


def once(status, **headers):
    return lambda handler, start, stop, count: handler.answer(status, b"oops", **headers) if count == 1 else False


def cut_in_half(handler, start, stop, count):
    """Breaks off each response that has more than 1000 bytes."""
    if stop - start < 1000:
        return handler.part(start, stop)
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(CONTENT)}")
    handler.send_header("Content-Length", str(stop - start))
    handler.end_headers()
    handler.wfile.write(CONTENT[start : (start + stop) // 2])
    return handler.cut()


def no_answer_once(handler, start, stop, count):
    return handler.cut() if count == 1 else False


def moved(handler, start, stop, count):
    return handler.answer(302, Location="/elsewhere/1.tar") if handler.path == "/0.tar" else False


def other_bytes_once(handler, start, stop, count):
    part = f"bytes 7-{6 + stop - start}/{len(CONTENT)}"
    return handler.answer(206, bytes(stop - start), Content_Range=part) if count == 1 else False


def too_many_bytes_once(handler, start, stop, count):
    return handler.answer(206, CONTENT, Content_Range=None) if count == 1 else False


PASSING = {
    "well": lambda *_: False,
    "500 once": once(500),
    "503 with Retry-After": once(503, Retry_After="0"),
    "429 with a date": once(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
    "408": once(408),
    "cut in half": cut_in_half,
    "no answer once": no_answer_once,
    "redirect": moved,
    "fewer bytes": lambda handler, start, stop, count: handler.part(start, min(stop, start + 50_000)),
    "no Content-Range": lambda handler, start, stop, count: handler.part(start, stop, Content_Range=None),
    "no total": lambda handler, start, stop, count: handler.part(
        start, stop, Content_Range=f"bytes {start}-{stop - 1}/*"
    ),
    "no Content-Length": lambda handler, start, stop, count: handler.part(start, stop, Content_Length=None),
    "other bytes once": other_bytes_once,
    "too many bytes once": too_many_bytes_once,
}


@pytest.mark.parametrize("behave", PASSING.values(), ids=PASSING)
def test_the_right_bytes_come(server, behave):
    server.behave = behave
    assert read_range(server.url, 1000, 200_000).content == CONTENT[1000:200_000]
    server.asked.clear()
    with open_binary(server.url) as stream:
        assert stream.seek(0, 2) == len(CONTENT)
        for start, size in ((299_990, 50), (0, 3), (100_000, 150_000), (5, 0)):
            stream.seek(start)
            assert stream.read(size) == CONTENT[start : start + size]
        stream.seek(0)
        assert stream.read() == CONTENT


def whole(handler, start, stop, count):
    handler.answer(200, CONTENT)


def whole_without_length(handler, start, stop, count):
    handler.answer(200, CONTENT, Content_Length=None)
    handler.cut()


@pytest.mark.parametrize("behave", [whole, whole_without_length])
def test_a_server_without_ranges_sends_the_whole_file(server, behave):
    server.behave = behave
    with pytest.raises(NoRangesError, match=r"0\.tar: its server doesn't answer requests for ranges"):
        read_range(server.url, 1000, 2000)
    assert size_of(server.url) == (len(CONTENT) if behave is whole else None)
    with open_binary(server.url) as stream:
        assert stream.read() == CONTENT
        stream.seek(77)
        assert stream.read(9) == CONTENT[77:86]
    asked = len(server.asked)
    assert asked < 6  # no failure that is repeated, nor remembered


def test_small_and_empty_files(server):
    server.behave = lambda handler, start, stop, count: handler.answer(200, b"few")
    with open_binary(server.url) as stream:
        assert stream.read() == b"few"
    assert len(server.asked) == 1
    server.behave = lambda handler, start, stop, count: handler.answer(416, Content_Range="bytes */0")
    with open_binary(server.url) as stream:
        assert (stream.seek(0, 2), stream.read()) == (0, b"")


def test_few_requests_read_much(server):
    assert len(CONTENT) < BLOCK_BYTES
    with open_binary(server.url) as stream:
        for start in range(0, len(CONTENT), 5000):
            stream.seek(start)
            assert stream.read(512) == CONTENT[start : start + 512]
    assert len(server.asked) == 2


def test_far_bytes_are_passed_over_and_near_ones_are_not(server, monkeypatch):
    monkeypatch.setattr(LinkEstimate, "request_bytes", 1000.0)
    with open_binary(server.url) as stream:
        for start, asked in (
            (200_000, (200_000, 265_536)),
            (70_000, (70_000, 135_536)),
            (136_500, (136_500, len(CONTENT))),
        ):
            stream.seek(start)
            assert stream.read(100) == CONTENT[start : start + 100]
            assert server.asked[-1] == asked
        assert len(server.asked) == 4


def test_what_is_kept_or_fetched_is_not_asked_for_again(server, monkeypatch):
    monkeypatch.setattr(LinkEstimate, "request_bytes", 1000.0)
    spans = [(start, start + 50) for start in range(100_000, 200_000, 500)] + [(250_000, 251_000)]
    with open_binary(server.url) as stream:
        stream.keep(lambda: [(10, 30), (65_530, 65_540)])  # the second one ends behind the block
        stream.seek(150_000)
        assert stream.read(5) == CONTENT[150_000:150_005]
        stream.fetch(spans)
        assert sorted(server.asked[2:]) == [(100_000, 199_550), (250_000, 251_000)]
        for start, stop in [*spans, (10, 30), (10, 20)]:
            stream.seek(start)
            assert stream.read(stop - start) == CONTENT[start:stop]
        assert len(server.asked) == 4
        stream.seek(65_530)
        assert stream.read(10) == CONTENT[65_530:65_540] and len(server.asked) == 5


# --- what is given up ------------------------------------------------------------------------------------------------------


def drip(handler, start, stop, count):
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(CONTENT)}")
    handler.send_header("Content-Length", str(stop - start))
    handler.end_headers()
    for at in range(start, stop):
        handler.wfile.write(CONTENT[at : at + 1])
        handler.wfile.flush()
        time.sleep(0.05)


REPEATED = {  # behaviour and what the message says
    "503": (
        lambda handler, *_: handler.answer(503),
        f"HTTP 503 Service Unavailable \\({ATTEMPTS} attempts in \\d+ s\\)",
    ),
    "500": (lambda handler, *_: handler.answer(500), "HTTP 500"),
    "599": (lambda handler, *_: handler.answer(599), "HTTP 599"),
    "429 for an hour": (lambda handler, *_: handler.answer(429, Retry_After="3600"), "HTTP 429 Too Many Requests"),
    "other bytes": (
        lambda handler, start, stop, count: handler.answer(
            206, bytes(stop - start), Content_Range=f"bytes 7-{6 + stop - start}/{len(CONTENT)}"
        ),
        "bytes from 7 on came, from 1,000 on were asked for",
    ),
    "too many bytes": (
        lambda handler, *_: handler.answer(206, CONTENT, Content_Range=None),
        "more than the 1,000 bytes",
    ),
    "no answer": (lambda handler, *_: handler.cut(), "Disconnected"),
    "silence": (lambda handler, *_: time.sleep(5), "time-out"),
    "drip": (drip, "too slow"),
    "nothing comes": (
        lambda handler, start, *_: handler.answer(206, b"", Content_Range=f"bytes {start}-{start}/{len(CONTENT)}"),
        "empty response",
    ),
}
FINAL = {
    "404": (lambda handler, *_: handler.answer(404), "HTTP 404 Not Found$"),
    "403": (lambda handler, *_: handler.answer(403), "HTTP 403 Forbidden$"),
    "401": (lambda handler, *_: handler.answer(401), "HTTP 401 Unauthorized$"),
    "501": (lambda handler, *_: handler.answer(501), "HTTP 501"),
    "compressed": (lambda handler, *_: handler.answer(200, b"\x1f\x8b", Content_Encoding="gzip"), "compressed .*gzip"),
    "compressed part": (
        lambda handler, start, stop, count: handler.part(start, stop, Content_Encoding="gzip"),
        "compressed .*gzip",
    ),
    "several ranges": (
        lambda handler, start, stop, count: handler.answer(206, b"--x", Content_Type="multipart/byteranges"),
        "several ranges",
    ),
    "redirect to itself": (lambda handler, *_: handler.answer(302, Location="/0.tar"), "TooManyRedirects"),
}


@pytest.mark.parametrize(("behave", "says"), REPEATED.values(), ids=REPEATED)
def test_failures_are_repeated_within_bounds_and_remembered(server, caplog, be_patient, behave, says):
    server.behave = behave
    if says in {"HTTP 429 Too Many Requests", "time-out", "too slow"}:
        be_patient(seconds=3, silence_seconds=0.5, least_bytes_per_second=1e6)
    began = time.monotonic()
    with pytest.raises(RemoteError, match=rf"^{server.url}: .*{says}") as caught:
        read_range(server.url, 1000, 2000)
    assert time.monotonic() - began < 60  # of 3,600 that a server asks for
    assert 2 <= len(server.asked) <= 12 and not caught.value.retry
    assert sum("given up" in record.message and server.url in record.message for record in caplog.records) == 1
    asked = len(server.asked)
    for read in (lambda: read_range(server.url, 5000, 6000), lambda: size_of(server.url)):
        with pytest.raises(RemoteError, match=says):
            read()
    with pytest.raises(RemoteError, match=says), open_binary(server.url):
        pass
    assert len(server.asked) == asked
    server.behave = lambda *_: False
    remote.forget_failures()
    assert read_range(server.url, 1000, 2000).content == CONTENT[1000:2000]


@pytest.mark.parametrize(("behave", "says"), FINAL.values(), ids=FINAL)
def test_what_cannot_get_better_is_asked_once(server, behave, says):
    server.behave = behave
    for _ in range(2):
        with pytest.raises(RemoteError, match=rf"^{server.url}: .*{says}") as caught:
            read_range(server.url, 1000, 2000)
        assert isinstance(caught.value, FileNotFoundError) == (says == "HTTP 404 Not Found$")
    assert len(server.asked) == (10 if "Redirects" in says else 1)


def test_a_file_of_another_size_is_no_file_of_the_catalog(server):
    with pytest.raises(RemoteError, match="it has 300,000 bytes now, not 299,999"):
        read_range(server.url, 0, 10, 299_999)


def test_threads_share_one_bound(server):
    server.behave = REPEATED["503"][0]
    errors = []

    def read(start):
        try:
            read_range(server.url, start, start + 10)
        except RemoteError as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(start,)) for start in range(0, 1600, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert len(errors) == 16
    assert len(server.asked) <= 16 + ATTEMPTS


def test_many_dead_files_of_a_server_wear_patience_out(server):
    server.behave = REPEATED["503"][0]
    base, full = server.url.removesuffix("0.tar"), remote.PATIENCE.full_for
    for number in range(full + 5):
        with pytest.raises(RemoteError):
            read_range(f"{base}{number}.tar", 0, 10)
    assert len(server.asked) == full * ATTEMPTS + 5 * remote.PATIENCE.short_attempts


def test_a_server_that_is_not_there_fails_for_all_its_files(caplog, watched):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(RemoteError, match="Connect") as caught:
            read_range(f"{base}/0.tar", 0, 10)
        assert caught.value.host_wide
        with watched(remote, "_size_once") as requests:
            for number in range(1, 50):
                with pytest.raises(RemoteError, match=rf"/{number}\.tar: .*Connect"):
                    size_of(f"{base}/{number}.tar")
        assert len(requests) <= 1
    assert f"nor are other files of {base}" in caplog.text


def test_a_name_that_no_server_has():
    with pytest.raises(RemoteError, match=r"^http://nowhere\.invalid/0\.tar: ") as caught:
        size_of("http://nowhere.invalid/0.tar")
    assert caught.value.host_wide


def content_or_error(url, start):
    try:
        return read_range(url, start, start + 10).content
    except RemoteError as error:
        return str(error)


def read_in_child(url, sender):
    sender.send([content_or_error(url, start) for start in (0, 5000)])


def test_forked_processes_read_on_and_know_what_was_given_up(server):
    assert read_range(server.url, 0, 10).content == CONTENT[:10]
    sick = server.url.replace("0.tar", "sick.tar")
    server.behave = lambda handler, *_: handler.answer(503) if "sick" in handler.path else False
    with pytest.raises(RemoteError):
        read_range(sick, 0, 10)
    asked = len(server.asked)
    context = multiprocessing.get_context("fork")
    for url in (server.url, sick):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=read_in_child, args=(url, sender))
        process.start()
        assert receiver.poll(60)
        good = [CONTENT[:10], CONTENT[5000:5010]]
        found = receiver.recv()
        assert found == good if url == server.url else all("HTTP 503" in item for item in found)
        process.join(60)
        assert process.exitcode == 0
    assert len(server.asked) == asked + 2


# --- errors of all kinds ---------------------------------------------------------------------------------------------------


def caused(error, cause):
    error.__cause__ = cause
    return error


def of_status(status):
    error = ValueError("no details")
    error.response = {"ResponseMetadata": {"HTTPStatusCode": status}}
    return error


ERRORS = [  # exception, worth a retry, of the whole server, text
    (asyncio.TimeoutError(), True, False, "time-out"),
    (socket.gaierror(-2, "Name or service not known"), True, True, "Name or service not known"),
    (ConnectionRefusedError(111, "refused"), True, True, "refused"),
    (ConnectionResetError(), True, False, "ConnectionResetError"),
    (OSError("pipe"), True, False, "pipe"),
    (FileNotFoundError("x"), False, False, "not found"),
    (caused(FileNotFoundError("http://h/0.tar"), of_status(503)), True, False, "HTTP 503 Service Unavailable"),
    (PermissionError("Access Denied"), False, False, "Access Denied"),
    (ImportError("install s3fs"), False, False, "install s3fs"),
    (ValueError("what"), False, False, "what"),
    (of_status(403), False, False, "HTTP 403 Forbidden (no details)"),
    (of_status(404), False, False, "HTTP 404 Not Found"),
    (type("NoCredentialsError", (Exception,), {})("Unable to locate credentials"), False, True, "locate credentials"),
    (type("OfflineModeIsEnabled", (ConnectionError,), {})("offline"), False, True, "offline"),
    (type("Unheard", (Exception,), {})("of"), True, False, "Unheard: of"),
]


@pytest.mark.parametrize(("error", "retry", "host_wide", "text"), ERRORS, ids=lambda item: type(item).__name__)
def test_every_library_error_becomes_one(error, retry, host_wide, text):
    found = translated(error, "https://user:secret@h/0.tar?X-Amz-Signature=secret")
    assert (found.retry, found.host_wide) == (retry, host_wide)
    assert str(found).startswith("https://h/0.tar?…: ") and text in str(found) and "secret" not in str(found)
    assert isinstance(found, FileNotFoundError) == ("ound" in text and "Name" not in text)
    again = pickle.loads(pickle.dumps(found))
    assert (type(again), str(again), again.retry) == (type(found), str(found), found.retry)


def test_real_exceptions_of_botocore():
    exceptions = pytest.importorskip("botocore.exceptions", reason="needs botocore")
    denied = exceptions.ClientError(
        {"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": 403}}, "HeadObject"
    )
    for error, retry, text in (
        (exceptions.NoCredentialsError(), False, "Unable to locate credentials"),
        (denied, False, "HTTP 403 Forbidden"),
        (
            exceptions.EndpointConnectionError(endpoint_url="https://h/b?X-Amz-Signature=secret"),
            True,
            "Could not connect",
        ),
        (exceptions.ReadTimeoutError(endpoint_url="https://h"), True, "ReadTimeoutError"),
    ):
        found = translated(error, "s3://b/0.tar")
        assert found.retry == retry and text in str(found) and "secret" not in str(found)


def test_unknown_protocols_and_missing_packages():
    for url, text in (("nowhere://b/0.tar", "Protocol not known"), ("gs://b/0.tar", "gcsfs")):
        with pytest.raises(RemoteUnsupportedError, match=text) as caught:
            size_of(url)
        assert isinstance(caught.value, UserError) and isinstance(caught.value, RemoteError)


def test_secrets_stay_out_of_messages():
    text = "https://me:pass@h/0.tar?X-Amz-Signature=abc&x=1 and s3://b/0000?.tar and 'http://h/a?token=t'"
    assert redacted(text) == "https://h/0.tar?… and s3://b/0000?.tar and 'http://h/a?…'"
    assert "pass" not in str(UserError("no http://me:pass@h/0.tar"))


def test_a_download_is_bounded(server):
    server.behave = whole_without_length
    with pytest.raises(RemoteError, match="more than 1,000 bytes"):
        remote.download(server.url, io.BytesIO(), 1000)


def test_other_file_systems(tmp_path):
    import fsspec

    with fsspec.open("memory://storage/0.tar", "wb") as stream:
        stream.write(CONTENT)
    url = "memory://storage/0.tar"
    assert size_of(url) == len(CONTENT)
    assert read_range(url, 299_000, 301_000).content == CONTENT[299_000:]
    with open_binary(url) as stream:
        assert stream.read() == CONTENT
    with (
        pytest.raises(RemoteNotFoundError, match=r"memory://storage/1\.tar: not found"),
        open_binary("memory://storage/1.tar"),
    ):
        pass
    path = tmp_path / "0 [1].tar"
    path.write_bytes(CONTENT)
    for name in (str(path), f"file://{path}", f"local://{path}"):
        with open_binary(name) as stream:
            assert stream.fileno() and stream.read() == CONTENT


def test_bounds_are_below_a_minute_by_default():
    """A stall is told within a minute, and over within two."""
    patience = remote.Patience()
    waits = sum(1.25 * patience.backoff_seconds * 2**number for number in range(patience.attempts - 1))
    assert waits < 60 and patience.seconds <= 60
    assert patience.seconds + patience.silence_seconds + patience.connect_seconds < 90
