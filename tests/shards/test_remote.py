"""Remote stores against servers on the loopback: right bytes, few requests, a cache that several processes share and none can break."""

import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
import weakref
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from tailwise.errors import UserError
from tailwise.shards.fingerprint import ChangedShardError, blocks_of_stream, read_fingerprint
from tailwise.shards.remote import CONNECTIONS, RemoteShards
from tailwise.storage import remote
from tailwise.storage.files import open_binary
from tailwise.storage.range_cache import RangeCache
from tailwise.storage.spans import PRIOR_BYTES_PER_SECOND, PRIOR_LATENCY_SECONDS, LinkEstimate

SIZE = 200_000


class Server(ThreadingHTTPServer):
    """Objects by path, with ranges. Notes the (path, start, stop) of each request for bytes."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects = {}
        self.ranges = []
        self.failures = 0  # so many requests are answered with 503
        self.latency_seconds = 0.0
        self.with_ranges = True
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def put(self, name, content):
        self.objects[f"/{name}"] = content
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, content = self.server, self.server.objects.get(self.path)
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(found[1]), int(found[2]) + 1) if found else (0, len(content or b""))
        server.ranges.append((self.path, start, stop))
        time.sleep(server.latency_seconds)
        if server.failures > 0:
            server.failures -= 1
            return self.answer(503, b"")
        if content is None:
            return self.answer(404, b"")
        if not server.with_ranges:
            return self.answer(200, content)
        return self.answer(206, content[start:stop]) if start < len(content) else self.answer(416, b"")

    def answer(self, status, content):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    pytest.importorskip("aiohttp", reason="needs aiohttp, fsspec's http")
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def contents():
    return [np.random.default_rng(number).bytes(SIZE) for number in range(3)]


@pytest.fixture
def urls(server, contents):
    return [server.put(f"{number}.tar", content) for number, content in enumerate(contents)]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(remote, "PATIENCE", replace(remote.PATIENCE, backoff_seconds=0.01))
    remote.forget_failures()


def some_ranges(count=40, width=500, seed=0, shards=3):
    """Ranges that don't overlap, in random order: int64 [count, 3]."""
    generator = np.random.default_rng(seed)
    places = generator.choice(shards * (SIZE // 1000), count, replace=False)
    starts = places % (SIZE // 1000) * 1000
    return np.stack([places // (SIZE // 1000), starts, starts + width], axis=1)


def sliced(contents, ranges):
    return [contents[shard][start:stop] for shard, start, stop in ranges.tolist()]


def used_bytes(folder):
    """Bytes below FOLDER/ranges; a file that is renamed or deleted meanwhile counts as nothing."""
    total = 0
    for path in (folder / "ranges").rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


# --- one process ----------------------------------------------------------------------------------------------------------


def test_reads_are_fetched_once(server, urls, contents, tmp_path):
    store = RemoteShards(urls, tmp_path, 10**6)
    for _ in range(2):
        assert store.read(1, 100, 900) == contents[1][100:900]
    assert store.read(1, 150, 200) == contents[1][150:200]
    assert store.read(1, 7, 7) == b""
    assert server.ranges == [("/1.tar", 100, 900)]
    found = store.statistics
    assert (found["requests"], found["bytes"], found["retries"]) == (1, 800, 0)
    assert RemoteShards(urls, tmp_path, 10**6).read(1, 100, 900) == contents[1][100:900]
    assert len(server.ranges) == 1


@pytest.fixture
def request_costs(monkeypatch):
    """`request_costs(size)`: a request takes as long as this many bytes, whatever this machine's loopback is worth."""
    return lambda size: monkeypatch.setattr(LinkEstimate, "request_bytes", size)


def test_where_requests_are_dear_all_comes_in_one(server, urls, contents, tmp_path, request_costs):
    request_costs(1e6)
    store = RemoteShards(urls, tmp_path, 10**8)
    ranges = some_ranges(300)
    assert list(store.read_many(ranges)) == sliced(contents, ranges)
    assert len(server.ranges) == 3
    assert list(store.read_many(ranges)) == sliced(contents, ranges)
    assert len(server.ranges) == 3


def test_where_requests_cost_little_ranges_are_fetched_singly(server, urls, contents, tmp_path, request_costs):
    request_costs(998.0)
    store = RemoteShards(urls, tmp_path, 10**8)
    ranges = some_ranges(50)
    assert list(store.read_many(ranges)) == sliced(contents, ranges)
    asked = sorted((f"/{shard}.tar", start, stop) for shard, start, stop in ranges.tolist())
    assert sorted(server.ranges) == asked


def test_hints_are_fetched_behind_the_scenes(server, urls, contents, tmp_path, wait_until):
    store = RemoteShards(urls, tmp_path, 10**8)
    ranges = some_ranges(100)
    store.want(ranges[:50])
    store.want(ranges[50:])
    wait_until(lambda: used_bytes(tmp_path) and not list(tmp_path.rglob("*.claim")) and not store._own.hints)
    wait_until(lambda: len({shard for shard, *_ in server.ranges}) == 3)
    assert list(store.read_many(ranges)) == sliced(contents, ranges)
    asked = len(server.ranges)
    assert [store.read(*one) for one in ranges.tolist()] == sliced(contents, ranges)
    assert len(server.ranges) == asked
    store.close()
    assert store.read(0, 5, 6) == contents[0][5:6]


def own_threads():
    return [thread for thread in threading.enumerate() if getattr(thread, "_target", None) and is_ours(thread._target)]


def is_ours(target):
    return getattr(target, "__module__", None) == "tailwise.shards.remote"


def test_threads_end_with_the_work(server, urls, contents, tmp_path, wait_until):
    """None idles: a store that nobody closes leaves nothing behind."""
    store = RemoteShards(urls, tmp_path, 10**8)
    ranges = some_ranges(100)
    server.latency_seconds = 0.01
    store.want(ranges[:50])
    wait_until(lambda: len(own_threads()) > 2)
    assert list(store.read_many(ranges)) == sliced(contents, ranges)
    wait_until(lambda: not own_threads())
    gone = weakref.ref(store)
    del store
    assert gone() is None


def test_closing_ends_what_hints_began(server, urls, contents, tmp_path, request_costs, wait_until):
    request_costs(998.0)  # each range by a request of its own
    server.latency_seconds = 0.2
    store = RemoteShards(urls, tmp_path, 10**8)
    ranges = some_ranges(500)
    store.want(ranges[:400])
    wait_until(lambda: len(server.ranges) >= CONNECTIONS)
    store.want(ranges[400:])
    store.close()
    wait_until(lambda: not own_threads())
    asked = len(server.ranges)
    assert asked <= 6 * CONNECTIONS  # what was under way
    assert not list(tmp_path.rglob("*.claim"))
    server.latency_seconds = 0
    assert list(store.read_many(ranges)) == sliced(contents, ranges)  # and it goes on as if new
    store.want(ranges)
    wait_until(lambda: not own_threads())
    assert len(server.ranges) == len(ranges)


def test_hints_keep_errors_to_themselves(urls, server, tmp_path, wait_until):
    store = RemoteShards([*urls, server.put("gone.tar", b"")[:-1]], tmp_path, 10**6)
    store.want(np.array([[3, 0, 10], [0, SIZE - 5, SIZE + 5]]))
    wait_until(lambda: len(server.ranges) >= 2 and not list(tmp_path.rglob("*.claim")))
    with pytest.raises(OSError, match=r"gone\.ta: HTTP 404 Not Found"):
        store.read(3, 0, 10)
    with pytest.raises(OSError, match=r"0\.tar ends at byte 200,000; bytes 199,995 … 200,005"):
        store.read(0, SIZE - 5, SIZE + 5)
    assert used_bytes(tmp_path) == 0


def test_one_bad_range_spoils_no_other(urls, contents, tmp_path):
    store = RemoteShards(urls, tmp_path, 10**6)
    ranges = np.array([[0, 0, 10], [0, SIZE - 5, SIZE + 5], [1, 3, 8]])
    good, bad, also_good = store.read_many(ranges)
    assert (good, also_good) == (contents[0][:10], contents[1][3:8])
    assert isinstance(bad, OSError)


def test_transient_failures_are_repeated(server, urls, contents, tmp_path):
    store = RemoteShards(urls, tmp_path, 10**6)
    attempts = remote.PATIENCE.attempts
    server.failures = attempts - 1
    assert store.read(0, 0, 100) == contents[0][:100]
    assert store.statistics["retries"] == attempts - 1
    server.failures = attempts + 5
    for start in (200, 300):  # the tar is given up: its other ranges are not asked for
        with pytest.raises(OSError, match=rf"{re.escape(urls[0])}: HTTP 503 Service Unavailable \({attempts} attempts"):
            store.read(0, start, start + 100)
    assert server.failures == 5
    server.failures = 0
    assert store.read(1, 200, 300) == contents[1][200:300]


def test_a_server_without_ranges_is_found_out(server, urls, tmp_path):
    server.with_ranges = False
    with pytest.raises(OSError, match="doesn't answer requests for ranges"):
        RemoteShards(urls, tmp_path, 10**6).read(0, 0, 100)


def test_a_server_without_ranges_is_compared_with_the_fingerprints(server, urls, contents, tmp_path):
    server.with_ranges = False
    fingerprints = []
    for url, content in zip(urls, contents, strict=True):
        with open_binary(url) as stream:
            fingerprints.append(read_fingerprint(url, SIZE, blocks_of_stream(url, stream)))
        assert fingerprints[-1] == read_fingerprint(
            url, SIZE, lambda ranges, whole=content: [whole[slice(*at)] for at in ranges]
        )
    server.put("1.tar", contents[1][:-1] + b"?")

    def store():
        return RemoteShards(urls, tmp_path, 10**7, sizes=[SIZE] * 3, fingerprints=fingerprints)

    assert store().read(0, 10, 20) == contents[0][10:20]
    assert store().read(2, 0, SIZE) == contents[2]
    for changed in (store(), store()):
        for start, stop in ((10, 20), (0, SIZE), (10, 20)):
            with pytest.raises(ChangedShardError, match="other content than when it was imported"):
                changed.read(1, start, stop)


def test_another_version_is_fetched_anew(server, urls, contents, tmp_path):
    assert RemoteShards(urls, tmp_path, 10**6, ["a", "a", "a"]).read(0, 0, 9) == contents[0][:9]
    server.put("0.tar", bytes(SIZE))
    assert RemoteShards(urls, tmp_path, 10**6, ["a", "a", "a"]).read(0, 0, 9) == contents[0][:9]
    assert RemoteShards(urls, tmp_path, 10**6, ["b", "a", "a"]).read(0, 0, 9) == bytes(9)


def test_unknown_file_system(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        RemoteShards(["nowhere://bucket/0.tar"], tmp_path, 10**6).read(0, 0, 9)


def test_folders_and_bounds_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="name another"):
        RemoteShards([], tmp_path / "file", 10)
    with pytest.raises(UserError, match="at least"):
        RemoteShards([], tmp_path / "cache", 0)


def test_pickled_and_forked(server, urls, contents, tmp_path):
    store = RemoteShards(urls, tmp_path, 10**6)
    assert store.read(0, 0, 9) == contents[0][:9]
    store.want(some_ranges(3))
    assert pickle.loads(pickle.dumps(store)).read(1, 0, 9) == contents[1][:9]
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child():
        store.want(some_ranges(20, seed=5))
        found = list(store.read_many(some_ranges(20, seed=4)))
        sender.send((store.read(0, 0, 9), store.read(2, 5, 50), found))

    process = context.Process(target=child)
    process.start()
    assert receiver.poll(60)
    assert receiver.recv() == (contents[0][:9], contents[2][5:50], sliced(contents, some_ranges(20, seed=4)))
    process.join(60)
    assert process.exitcode == 0


# --- the bound ------------------------------------------------------------------------------------------------------------


def test_the_bound_is_never_exceeded(server, urls, contents, tmp_path):
    bound = 10_000
    store = RemoteShards(urls, tmp_path, bound)
    stop = threading.Event()
    most = [0]

    def watch():
        while not stop.is_set():
            with store.cache._locked():  # else one file is counted, and then what took its place
                most[0] = max(most[0], used_bytes(tmp_path))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for seed in range(6):
        ranges = some_ranges(60, seed=seed)
        store.want(ranges[30:])
        assert list(store.read_many(ranges)) == sliced(contents, ranges)
    stop.set()
    watcher.join()
    assert 0 < most[0] <= bound
    assert store.cache.evictions > 0


def test_the_least_recently_used_goes(server, urls, contents, tmp_path):
    first = RemoteShards(urls, tmp_path, 3500)
    for start in (0, 1000, 2000):
        first.read(0, start, start + 1000)
        time.sleep(0.02)
    RemoteShards(urls, tmp_path, 3500).read(0, 0, 1000)  # used again
    first.read(0, 3000, 4000)
    asked = len(server.ranges)
    assert first.read(0, 0, 1000) == contents[0][:1000]
    assert len(server.ranges) == asked
    assert first.read(0, 1000, 2000) == contents[0][1000:2000]
    assert len(server.ranges) == asked + 1


def test_what_is_larger_than_the_cache_is_read_past_it(server, urls, contents, tmp_path):
    store = RemoteShards(urls, tmp_path, 1000)
    assert store.read(0, 0, 5000) == contents[0][:5000]
    assert list(store.read_many(np.array([[0, 0, 5000], [1, 0, 10]]))) == [contents[0][:5000], contents[1][:10]]
    assert used_bytes(tmp_path) <= 1000


def test_a_lost_ledger_is_counted_anew(urls, contents, tmp_path):
    store = RemoteShards(urls, tmp_path, 3000)
    for start in (0, 1000, 2000):
        store.read(0, start, start + 1000)
    (tmp_path / "lock").write_bytes(b"")
    for start in range(3000, 9000, 1000):
        assert store.read(0, start, start + 1000) == contents[0][start : start + 1000]
        assert used_bytes(tmp_path) <= 3000


def test_a_cut_file_is_fetched_again(server, urls, contents, tmp_path):
    RemoteShards(urls, tmp_path, 10**6).read(0, 0, 1000)
    (file,) = [path for path in (tmp_path / "ranges").rglob("*") if path.is_file()]
    file.write_bytes(b"")  # as after a loss of power
    store = RemoteShards(urls, tmp_path, 10**6)
    for _ in range(2):
        assert store.read(0, 0, 1000) == contents[0][:1000]
    assert len(server.ranges) == 2


def test_the_whole_folder_may_go_while_it_is_in_use(urls, contents, tmp_path):
    import shutil

    store = RemoteShards(urls, tmp_path / "cache", 10**6)
    store.read(0, 0, 1000)
    shutil.rmtree(tmp_path / "cache")
    assert store.read(0, 0, 1000) == contents[0][:1000]  # still open
    assert store.read(0, 1000, 2000) == contents[0][1000:2000]


# --- several processes ----------------------------------------------------------------------------------------------------

READER = """
import sys
import numpy as np
from tailwise.shards.remote import RemoteShards
urls, folder, ranges, hint = sys.argv[4:], sys.argv[1], np.load(sys.argv[2]), sys.argv[3] == "want"
store = RemoteShards(urls, folder, 10**8)
print("ready", flush=True)
sys.stdin.readline()
if hint:
    store.want(ranges)
contents = [one if isinstance(one, bytes) else b"" for one in store.read_many(ranges)]
sys.stdout.flush()
sys.stdout.buffer.write(b"".join(contents))
"""


def start_reader(urls, folder, ranges, tmp_path, hint):
    np.save(tmp_path / f"ranges-{hint}.npy", ranges)
    arguments = [str(folder), str(tmp_path / f"ranges-{hint}.npy"), hint, *urls]
    command = [sys.executable, "-c", READER, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.slow
@pytest.mark.parametrize("hints", [("want", "read"), ("read", "read")])
def test_two_processes_fetch_nothing_twice(server, urls, contents, tmp_path, hints):
    server.latency_seconds = 0.05
    ranges = some_ranges(200)
    readers = [start_reader(urls, tmp_path / "cache", ranges, tmp_path, hint) for hint in hints]
    for reader in readers:
        reader.stdin.write(b"go\n")
        reader.stdin.flush()
    expected = b"".join(sliced(contents, ranges))
    assert [reader.communicate(timeout=300)[0] == expected for reader in readers] == [True, True]
    for shard, start, stop in ranges.tolist():
        holding = [one for one in server.ranges if one[0] == f"/{shard}.tar" and one[1] < stop and start < one[2]]
        assert len(holding) == 1


def test_a_killed_fetch_leaves_nothing_behind(server, urls, contents, tmp_path, wait_until):
    folder = tmp_path / "cache"
    server.latency_seconds = 60
    reader = start_reader(urls, folder, some_ranges(30), tmp_path, "read")
    reader.stdin.write(b"go\n")
    reader.stdin.flush()
    wait_until(lambda: len(server.ranges) == 3)
    os.kill(reader.pid, signal.SIGKILL)
    reader.communicate()
    assert len(list(folder.rglob("*.claim"))) == 3
    server.latency_seconds = 0
    store = RemoteShards(urls, folder, 10**8)
    assert list(store.read_many(some_ranges(30))) == sliced(contents, some_ranges(30))
    assert not list(folder.rglob("*.claim"))
    assert int.from_bytes((folder / "lock").read_bytes(), "little") == used_bytes(folder)


def test_leftovers_of_other_objects_make_room(urls, contents, tmp_path):
    """A claim that died stays counted until its place is needed."""
    dead = tmp_path / "ranges" / "another"
    cache = RangeCache(tmp_path, 3000)
    (claim,) = cache.claim("another", lambda *_: [(0, 2500)])
    cache._let_go(claim)
    assert (dead / "0-2500.claim").exists()
    store = RemoteShards(urls, tmp_path, 3000)
    assert store.read(0, 0, 1000) == contents[0][:1000]
    assert not (dead / "0-2500.claim").exists()
    assert int.from_bytes((tmp_path / "lock").read_bytes(), "little") == 1000


def test_who_waits_for_a_failed_fetch_fetches(urls, contents, tmp_path):
    store = RemoteShards(urls, tmp_path, 10**6)
    (claim,) = store.cache.claim(store._key(0), lambda *_: [(0, 1000)])
    found = []
    reader = threading.Thread(target=lambda: found.append(store.read(0, 10, 20)))
    reader.start()
    time.sleep(0.1)
    assert found == []
    store.cache.abandon(claim)
    reader.join(300)
    assert found == [contents[0][10:20]]


def test_a_claim_that_fails_midway_is_taken_back(tmp_path):
    cache = RangeCache(tmp_path, 10**6)

    def plan(*_):
        yield (0, 10)
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        cache.claim("key", plan)
    assert not list(tmp_path.rglob("*.claim"))
    assert int.from_bytes((tmp_path / "lock").read_bytes(), "little") == 0


# --- the estimate ---------------------------------------------------------------------------------------------------------


def test_estimates_begin_at_the_prior_and_follow_the_link():
    link = LinkEstimate()
    assert link.fit() == pytest.approx((PRIOR_LATENCY_SECONDS, PRIOR_BYTES_PER_SECOND))
    for size in np.random.default_rng(0).integers(1, 10**7, 500).tolist():
        link.observe(size, 0.002 + size / 200e6)
    assert link.fit() == pytest.approx((0.002, 200e6), rel=0.1)


@pytest.mark.parametrize("sizes", [[0], [1000], [10**9], [1000, 2000]])
def test_estimates_stay_finite(sizes):
    link = LinkEstimate()
    for size in sizes * 300:
        link.observe(size, 0.02 - size * 1e-12)
    latency, bandwidth = link.fit()
    assert 0 < latency <= 10
    assert 1e5 <= bandwidth <= 1e10


# --- s3 -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch, contents):
    """URLs of the contents on a real S3 server."""
    pytest.importorskip("s3fs", reason="needs s3fs")
    server = pytest.importorskip("moto.server", reason="needs moto[server]").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    filesystem, name = s3fs.S3FileSystem(), uuid.uuid4().hex  # clients of other tests' buckets live on in this process
    filesystem.mkdir(name)
    for number, content in enumerate(contents):
        filesystem.pipe(f"{name}/{number}.tar", content)
    yield [f"s3://{name}/{number}.tar" for number in range(3)]
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_s3(bucket, contents, tmp_path):
    store = RemoteShards([*bucket, bucket[0].replace("0.tar", "gone.tar")], tmp_path, 10**7)
    ranges = some_ranges(60)
    store.want(ranges)
    assert list(store.read_many(ranges)) == sliced(contents, ranges)
    assert store.read(2, 17, 4000) == contents[2][17:4000]
    with pytest.raises(OSError, match="ends at byte 200,000"):
        store.read(0, SIZE - 5, SIZE + 5)
    with pytest.raises(OSError, match=r"s3://[0-9a-f]{32}/gone\.tar"):
        store.read(3, 0, 10)
