"""Fixtures for all tests: small tars, pools, embeddings and catalogs, made anew; nothing is downloaded.

Fixtures named `make_…` return functions, since with `--import-mode=importlib` tests can't import from each other. All of them are
session-scoped and without state, so that hypothesis tests may use them.
"""

from __future__ import annotations

import gc
import io
import itertools
import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import settings
from PIL import EpsImagePlugin, Image

from tailwise.catalog import Catalog
from tailwise.cli import main
from tailwise.kernels.grid import unit_rows_on_grid
from tailwise.kernels.keyed import random_below, stream_key
from tailwise.log import LOGGER
from tailwise.steps.importing.pool import import_pool

settings.register_profile("tests", deadline=None)  # seconds say nothing about what is tested
settings.load_profile("tests")

# Compiled modules are kept, whatever the environment says: tests start hundreds of processes.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Files of tests are in memory where the system has room for them: commands flush some forty files a test to the disk.
MEMORY = Path("/dev/shm")
if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    # Each of these processes keeps to one processor: threads of two on one processor wait for each other, and a command that starts a
    # worker for each processor pays for the start of the workers.
    PROCESSORS = sorted(os.sched_getaffinity(0))
    NUMBER = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    os.sched_setaffinity(0, {PROCESSORS[NUMBER % len(PROCESSORS)]})
    IDLE = dict.fromkeys(PROCESSORS, 0)  # hundredths of a second, when the last test began

    def pytest_runtest_setup():
        """A process beyond the number of processors moves to the one that was idle most since its last test."""
        if len(PROCESSORS) <= NUMBER:
            fields = map(str.split, re.findall(r"^cpu(\d.*)", Path("/proc/stat").read_text(), re.MULTILINE))
            now = {int(number): int(idle) for number, _, _, _, idle, *_ in fields}
            gained = {number: now[number] - IDLE[number] for number in PROCESSORS}
            if max(gained.values()) - min(gained.values()) > 10:
                os.sched_setaffinity(0, {max(gained, key=gained.get)})
            IDLE.update(now)


PRELOADED = [
    "torch",
    "numba",
    "tailwise.cli",
    "tailwise.loader.loader",
    "tailwise.train.launch",
    "open_clip_train.main",
]
SERVER = "TAILWISE_TESTS_FORK_SERVER"  # its address


def pytest_configure(config):
    """Forks begin with what is preloaded. It takes seconds: processes of pytest-xdist share the fork server of the one that starts them."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    server = forkserver._forkserver
    if SERVER in os.environ:
        server._forkserver_address = os.environ[SERVER]
        server._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)
        server.ensure_running = lambda: None
    elif getattr(config.option, "numprocesses", None) and sys.version_info < (3, 14):  # which asks for a secret, too
        server.ensure_running()
        os.environ[SERVER] = server._forkserver_address


# Files of tests that share what takes long to make: a Ray cluster, models, a process that runs commands.
TOGETHER = ("tests/report/", "tests/encoders/", "tests/execution/", "tests/soak/")
# Those that take longest begin first: no process then ends long after the others.
LONGEST = (
    *(
        "soak/",
        "execution/",
        "storage/test_catalogs",
        "encoders/",
        "train/test_resume",
        "end_to_end/test_demo",
        "loader/test_loader",
    ),
    *(
        "report/",
        "end_to_end/",
        "faults/",
        "train/",
        "compare/",
        "export/test_shards",
        "test_compare_installations",
        "loader/",
    ),
    *("steps/embedding", "steps/importing", "steps/dedup", "evaluate/test_evaluate", "kernels/"),
)


def pytest_collection_modifyitems(items):
    def rank(item):
        place = item.nodeid.removeprefix("tests/")
        return next((number for number, name in enumerate(LONGEST) if place.startswith(name)), len(LONGEST))

    items.sort(key=rank)


def pytest_collection_finish():
    """What is there now stays: the garbage collector need not look at it in each test, nor forked processes copy it."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A process of pytest-xdist runs whole files, so that fixtures of a file are made once; in `make soak`, single tests."""
    if "TAILWISE_SOAK" in os.environ:
        return None
    from xdist.scheduler import LoadScopeScheduling

    class WholeFiles(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return next((name for name in TOGETHER if nodeid.startswith(name)), nodeid.partition("::")[0])

    config.option.loadscopereorder = False  # by the number of tests
    return WholeFiles(config, log)


def image_bytes(seed=0, kind="JPEG", side=8):
    """An encoded image of `side` × `side` random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def tar_bytes(members, tar_format=tarfile.USTAR_FORMAT, end=True, pax_headers=None):
    """A tar of (name, content) or (TarInfo, content) pairs; `end=False` leaves out the closing zero blocks."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tar_format, pax_headers=pax_headers) as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg():
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        data_bytes = tar.offset
    return stream.getvalue() if end else stream.getvalue()[:data_bytes]


@pytest.fixture(scope="session")
def make_image():
    """`make_image(seed=0, kind="JPEG", side=8)` → the bytes of a small random image."""
    return image_bytes


@pytest.fixture
def postscript(tmp_path, monkeypatch):
    """The bytes of an EPS that Pillow hands to Ghostscript, and a path that exists once any "gs" was started."""
    started = tmp_path / "ghostscript was started"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch '{started}'\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # it is looked up once
    return image_bytes(kind="EPS", side=40), started


@pytest.fixture(scope="session")
def make_tar_bytes():
    """`make_tar_bytes(members, tar_format=…, end=True, pax_headers=None)` → the bytes of a tar of (name or TarInfo, content)."""
    return tar_bytes


@pytest.fixture(scope="session")
def make_tar():
    """`make_tar(path, members, **as_make_tar_bytes)` writes a tar, with its folders → the path."""

    def write(path, members, **options):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tar_bytes(members, **options))
        return path

    return write


@pytest.fixture(scope="session")
def run_tailwise():
    """`run_tailwise(*words, code=0)` runs a command in this process, and asserts its exit code → as of `subprocess.run`.

    It calls the function that the program calls, and restores the state of this process. Output of worker processes is not captured.
    """

    def run(*words, code=0):
        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
        command = ["tailwise", *map(str, words)]
        with _as_before(), pytest.MonkeyPatch.context() as patch:
            for name, value in (("argv", command), ("stdout", out), ("stderr", err)):
                patch.setattr(sys, name, value)
            with pytest.raises(SystemExit) as end:
                main()
        told, wrong = (stream.buffer.getvalue().decode() for stream in (out, err))
        returned = int(end.value.code or 0)
        assert returned == code, told + wrong
        return subprocess.CompletedProcess(command, returned, told, wrong)

    return run


FORKED = """
import gc, multiprocessing, os, sys
gc.freeze()  # of the server
os.sched_setaffinity(0, processors)
multiprocessing.set_start_method(None, force=True)  # as in a program; this process's own way was the fork server
for number, path in enumerate(streams, 1):
    with open(path, "ab") as stream:
        os.dup2(stream.fileno(), number)
os.setsid()
os.environ.clear()
os.environ.update(environment)
sys.modules["torch"].set_num_threads(1)
sys.argv = arguments
exec(compile(code, "forked program", "exec"), {"__name__": "__main__"})
"""


BEGIN = """
import gc, os
gc.freeze()  # of the server
os.sched_setaffinity(0, processors)
os.environ.clear()
os.environ.update(environment)
initializer(*initargs)
"""


@pytest.fixture(scope="session", autouse=True)
def _warm_workers():
    """Worker processes of the local executor are forks of the server. tests/execution and commands in real processes spawn them."""

    def start(workers, mp_context, initializer, initargs):
        names = {"environment": dict(os.environ), "processors": os.sched_getaffinity(0)}
        names |= {"initializer": initializer, "initargs": initargs}
        context = multiprocessing.get_context("forkserver")
        return ProcessPoolExecutor(workers, context, initializer=exec, initargs=(BEGIN, names))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tailwise.execution.local.ProcessPoolExecutor", start)
        yield


@pytest.fixture(scope="session")
def fork_python():
    """`fork_python(code, *arguments, out, err=None, **environment)` starts a program in a process of its own → of `multiprocessing`.

    The process is the fork of one that has imported torch, numba and open_clip's trainer: it starts at once, where `python -c` takes
    seconds. It has a session of its own and computes with one thread. None removes a variable from its environment. Its output is
    appended to the file `out`, and its errors to the file `err`, or to `out` too.
    """
    context = multiprocessing.get_context("forkserver")

    def start(code, *arguments, out, err=None, **environment):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
        names = {
            "code": code,
            "streams": [str(out), str(err or out)],
            "environment": {name: value for name, value in environment.items() if value is not None},
            "arguments": ["tailwise", *map(str, arguments)],
            "processors": os.sched_getaffinity(0),
        }
        Path(out).touch()
        process = context.Process(target=exec, args=(FORKED, names))
        process.start()
        started.append(process)
        return process

    started = []
    yield start
    for process in started:  # those of a test that failed; the interpreter would wait for them
        process.kill()


@pytest.fixture(scope="session")
def forked_commands(fork_python):
    """`forked_commands(real=0)`: what stands for `subprocess` where `python -m tailwise …` is started, to start forks.

    So many commands, the first ones, are started as they are for a user.
    """

    def make(real=0):
        left = [real]

        def start(command, stdout, **options):
            left[0] -= 1
            if left[0] >= 0:
                return subprocess.Popen(command, stdout=stdout, **options)
            assert command[:3] == [sys.executable, "-m", "tailwise"]
            process = fork_python("from tailwise.cli import main; main()", *command[3:], out=stdout.name)
            return SimpleNamespace(
                pid=process.pid,
                poll=lambda: None if process.is_alive() else process.exitcode,
                wait=lambda timeout=None: process.join(timeout) or process.exitcode,
            )

        return SimpleNamespace(Popen=start, STDOUT=subprocess.STDOUT, TimeoutExpired=subprocess.TimeoutExpired)

    return make


@pytest.fixture(scope="session")
def wait_until():
    """`wait_until(condition, alive=…, log=None)` waits until a condition is true: for minutes, unless `alive()` is false.

    A failure shows the end of the file `log`.
    """

    def wait(condition, alive=lambda: True, log=None):
        deadline = time.monotonic() + 300  # of a busy machine
        while not condition():
            if time.monotonic() > deadline or not (alive() or condition()):
                pytest.fail(log.read_text()[-5000:] if log else "waited in vain")
            time.sleep(0.0005)

    return wait


@pytest.fixture(scope="session")
def descendants():
    """`descendants(pid)` → the processes begun by a process, by those, and so on; the outermost first."""

    def find(pid):
        parents = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):  # it has ended meanwhile
                    parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        found = [child for child, parent in parents.items() if parent == pid]
        return found + [later for child in found for later in find(child)]

    return find


@pytest.fixture(scope="session")
def running():
    """`running(pid)`: whether a process is still there, other than as an entry that nobody has asked about."""

    def check(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    return check


# Rows or bytes at a time, on which no result depends: small and odd ones.
PIECES = {
    **{f"steps.importing.joining.{name}_ROWS": 101 for name in ("CHUNK", "FILL")},
    "steps.clustering.tasks.CHUNK_ROWS": 37,
    "kernels.kmeans.CHUNK_ROWS": 53,
    **{f"kernels.{module}.TILE_ROWS": 19 for module in ("assign", "lloyd", "seeding")},
    **{f"kernels.{module}.TILE_CENTROIDS": 7 for module in ("assign", "lloyd", "seeding")},
    "kernels.density.TILE_ROWS": 23,
    "kernels.density.TILE_CENTROIDS": 5,
    "kernels.similarity.TILE_ROWS": 5,
    "kernels.duplicates.SCAN_SCORES": 11,
    "kernels.heads.BLOCK_NUMBERS": 100,
    "steps.dedup.members.RUN_BYTES": 37 * 21,
    "steps.scoring.makers.CHUNK_ROWS": 37,
    "steps.scoring.target.TARGET_ROWS": 11,
    "plan.plan.CHUNK_ROWS": 300,
}


@pytest.fixture(scope="session")
def small_pieces():
    """`with small_pieces(scale=1):` all steps work in small pieces, `scale` times PIECES, and with another number of threads."""

    @contextmanager
    def use(scale=1):
        import torch

        threads = torch.get_num_threads()
        with pytest.MonkeyPatch.context() as patch:
            for name, size in PIECES.items():
                patch.setattr(f"tailwise.{name}", scale * size)
            torch.set_num_threads(1 if threads > 1 else 2)
            try:
                yield
            finally:
                torch.set_num_threads(threads)

    return use


@pytest.fixture(scope="session")
def watched():
    """`with watched(owner, name, before=None) as calls:` lists the calls of a function, as tuples of arguments; the function runs.

    `before` is called first, with the same arguments; it may raise.
    """

    @contextmanager
    def watch(owner, name, before=None):
        real, calls = getattr(owner, name), []

        def noted(*arguments, **options):
            calls.append(arguments)
            if before:
                before(*arguments, **options)
            return real(*arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, noted)
            yield calls

    return watch


@pytest.fixture(scope="session")
def interrupted(watched):
    """`with interrupted(owner, name, when=…) as calls:` the block is interrupted, as by Control-C, in a call of a function.

    It is the first call for whose arguments `when` is true: by default, the first of all.
    """

    @contextmanager
    def run(owner, name, when=lambda *_, **__: True):
        def before(*arguments, **options):
            if when(*arguments, **options):
                raise KeyboardInterrupt

        with watched(owner, name, before) as calls, pytest.raises(KeyboardInterrupt):
            yield calls

    return run


@contextmanager
def _as_before():
    """Restore what the command line sets for its whole process: signals, the log, warnings, the environment, the number of open files."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    log, level, propagates, environment = LOGGER.handlers[:], LOGGER.level, LOGGER.propagate, dict(os.environ)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    hook, factory, form = sys.excepthook, logging.getLogRecordFactory(), warnings.formatwarning
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        LOGGER.handlers[:], LOGGER.propagate = log, propagates
        LOGGER.setLevel(level)
        os.environ.clear()
        os.environ.update(environment)
        resource.setrlimit(resource.RLIMIT_NOFILE, files)
        sys.excepthook, warnings.formatwarning = hook, form
        logging.setLogRecordFactory(factory)


@pytest.fixture(scope="session")
def forget_fingerprints():
    """`forget_fingerprints(catalog)`: a tar that changes in place is read sample by sample."""

    def run(catalog):
        path = catalog.folder / "shards.parquet"
        table = pq.read_table(path)
        nulls = pa.nulls(table.num_rows, pa.string())
        table = table.set_column(table.schema.get_field_index("fingerprint"), "fingerprint", nulls)
        pq.write_table(table.replace_schema_metadata(None), path)

    return run


@pytest.fixture(scope="session")
def make_pool(make_tar):
    """`make_pool(folder, sizes, first_shard=0, extension="jpg")` writes img2dataset-like shards.

    Shard s has `sizes[s]` samples `{s:05d}{i:04d}.jpg` and `.txt` ("caption of KEY"). Returns {path of the tar: its keys}.
    """

    def write(folder, sizes, first_shard=0, extension="jpg"):
        image = image_bytes()
        pool = {}
        for shard, size in enumerate(sizes, first_shard):
            keys = [f"{shard:05d}{sample:04d}" for sample in range(size)]
            members = [
                member
                for key in keys
                for member in ((f"{key}.{extension}", image), (f"{key}.txt", f"caption of {key}".encode()))
            ]
            pool[make_tar(folder / f"{shard:05d}.tar", members)] = keys
        return pool

    return write


@pytest.fixture(scope="session")
def make_partition():
    """`make_partition(folder, number, keys, rows, column="image")` writes one clip-retrieval partition as given, good or bad."""

    def write(folder, number, keys, rows, column="image"):
        name = {"image": "img_emb", "text": "text_emb"}[column]
        for part in (name, "metadata"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        np.save(folder / name / f"{name}_{number}.npy", np.asarray(rows))
        table = pa.table({"image_path": pa.array(list(keys), pa.string()), "caption": ["…"] * len(keys)})
        pq.write_table(table, folder / "metadata" / f"metadata_{number}.parquet")

    return write


@pytest.fixture(scope="session")
def make_vectors():
    """`make_vectors(keys, dimension=8, seed=0)` → {key: float32 [dimension]}; a key's vector depends on nothing but key and seed."""

    def draw(keys, dimension=8, seed=0):
        return {
            key: np.random.default_rng([seed, *key.encode()]).normal(size=dimension).astype(np.float32) for key in keys
        }

    return draw


@pytest.fixture(scope="session")
def make_embeddings(make_partition):
    """`make_embeddings(folder, vectors, partitions=1, dtype="float16", column="image")` writes {key: vector} in clip-retrieval layout.

    Keys are dealt out to the partitions in turn, so that every partition mixes tars.
    """

    def write(folder, vectors, partitions=1, dtype="float16", column="image"):
        keys = list(vectors)
        for number in range(partitions):
            mine = keys[number::partitions]
            make_partition(folder, number, mine, np.stack([vectors[key] for key in mine]).astype(dtype), column)
        return folder

    return write


@pytest.fixture(scope="session")
def make_metadata():
    """`make_metadata(folder, name, uids, arrays=None, **columns)` writes DataComp's `name.parquet` and, of arrays, `name.npz`.

    Columns are text ("caption of UID"), original_width (640), original_height (480), clip_l14_similarity_score (row / 10) and url;
    others may be given, or replace them, and None leaves one out. Returns the path of the Parquet file.
    """

    def write(folder, name, uids, arrays=None, compressed=False, **columns):
        folder.mkdir(parents=True, exist_ok=True)
        n = len(uids)
        table = {
            "uid": pa.array(uids, pa.string()),
            "url": ["https://example.org"] * n,
            "text": [f"caption of {uid}" for uid in uids],
            "original_width": [640] * n,
            "original_height": [480] * n,
            "clip_l14_similarity_score": np.arange(n, dtype=np.float32) / 10,
            **columns,
        }
        path = folder / f"{name}.parquet"
        pq.write_table(pa.table({key: values for key, values in table.items() if values is not None}), path)
        if arrays is not None:
            (np.savez_compressed if compressed else np.savez)(folder / f"{name}.npz", **arrays)
        return path

    return write


@pytest.fixture(scope="session")
def tree_bytes():
    """`tree_bytes(folder)` → {relative path: content} of all files below a folder."""

    def read(folder):
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    return read


@pytest.fixture(scope="session")
def rejected_counts():
    """`rejected_counts(catalog)` → {(stage, reason): rows} from the catalog's rejected files."""

    def count(catalog):
        table = catalog.rejected()
        counts = Counter()
        if table is not None:
            for row in table.to_pylist():
                counts[row["stage"], row["reason"]] += row["rows"]
        return dict(counts)

    return count


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real data beside the repository; skips the test where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


SMALL_GROUPS = (193, 97, 64, 48, 39, 32, 28, 24, 21, 19, 18, 17)


@pytest.fixture(scope="session")
def _small_catalog_source(tmp_path_factory, make_tar, make_embeddings):
    """The pool and the catalog that `small_catalog` copies."""
    folder = tmp_path_factory.mktemp("small")
    generator = np.random.default_rng(2024)
    axes = np.linalg.qr(generator.normal(size=(16, 16)))[0]
    groups = generator.permutation(np.repeat(np.arange(len(SMALL_GROUPS)), SMALL_GROUPS))
    images = [image_bytes(group) for group in range(len(SMALL_GROUPS))]
    keys = [f"{row:06d}" for row in range(len(groups))]
    start = 0
    for shard, size in enumerate((260, 200, 140)):
        members = [
            member
            for row in range(start, start + size)
            for member in (
                (f"{keys[row]}.jpg", images[groups[row]]),
                (f"{keys[row]}.txt", f"group {groups[row]}".encode()),
            )
        ]
        make_tar(folder / "pool" / f"{shard:05d}.tar", members)
        start += size
    noise = generator.normal(scale=0.05, size=(len(groups), 16))
    vectors = axes[groups] + noise
    embeddings = make_embeddings(folder / "embeddings", dict(zip(keys, vectors, strict=True)), partitions=2)
    sources = [str(folder / "pool"), str(embeddings)]
    import_pool(sources, folder / "catalog", workers=1, part_rows=400)
    return folder


@pytest.fixture
def small_catalog(_small_catalog_source, tmp_path):
    """A catalog of its own for each test: 600 samples, 3 shards, 2 parts (460 and 140 rows), 16-dimensional image embeddings.

    The embeddings lie round 12 orthogonal directions (cosine within one about 0.96, between two about 0) with 193 … 17 samples
    each, shuffled over the shards. A sample's caption is "group G", G = 0 (193 samples) … 11 (17). Keys are "000000" … "000599",
    in row order. The shards are readable at their paths, and shared by all tests: never write to them.
    """
    target = tmp_path / "small_catalog"
    shutil.copytree(_small_catalog_source / "catalog", target)
    return Catalog.open(target)


@pytest.fixture
def small_groups(small_catalog):
    """The group of each row of `small_catalog`, int64 [600]."""
    parts = [small_catalog.samples(part, ["caption"]).column(0).to_pylist() for part in small_catalog.parts()]
    return np.array([int(caption.removeprefix("group ")) for caption in itertools.chain(*parts)])


@pytest.fixture(scope="session")
def plain_seeding():
    """`with plain_seeding(K):` seeds k-means by k-means++ alone: clusterings that values in tests were taken from stay as they were."""

    def seeds(x, k, *, seed, **_):
        key, drawn = stream_key(seed, "k-means++"), 1
        unit = unit_rows_on_grid(x.astype(np.float64)).astype(np.float64)
        rows = [int(random_below(key, 0, np.array([len(x)]))[0])]
        while len(rows) < k:
            distance = 1 - (x.astype(np.float64) @ unit[rows].T).max(axis=1) / np.linalg.norm(
                x.astype(np.float64), axis=1
            )
            cumulative = np.cumsum(np.where(distance > 2.0**-22, np.rint(distance * 2**30), 0).astype(np.int64))
            wanted = min(max(1, len(rows) // 4), k - len(rows))
            targets = random_below(key, drawn, np.full(wanted, cumulative[-1]))
            drawn += wanted
            fresh = sorted({int(row) for row in np.searchsorted(cumulative, targets, side="right")})
            rows += [fresh[at] for at in sorted(np.unique(x[fresh], axis=0, return_index=True)[1])]
        return unit[rows].astype(np.float32)

    @contextmanager
    def seeding(clusters):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tailwise.kernels.kmeans.seed_centroids", seeds)
            patch.setattr("tailwise.kernels.kmeans.seeding_rows", lambda total, k: min(16 * k, total))
            yield

    return seeding


@pytest.fixture(scope="session")
def comparison_summary():
    """`comparison_summary(text, baseline)` → the content of a summary.json, all of whose texts are `text`."""

    def make(text, baseline):
        interval = {"low": -1.1, "high": 1.1, "p": 0.5, "p_holm": 0.5, "significant": False}
        difference = {"mean": 0.01, "n": 2, "sd": 0.01, **interval}
        rows = [
            {
                "row": name, "options": {"method": text}, "compose": text, "seeds": [0, 1],
                "plan": {
                    "draws": 10, "eligible": 20, "dynamic": True, "draw": text,
                    "exposures": {"candidates": "", "mean": 1.0, "least": 1, "most": 1},
                },
                "cost": {
                    "samples_seen": 10, "unique_seen": 9, "epochs": 1, "train_seconds": 1.0, "samples_per_second": 10.0,
                    "evaluate_seconds": 1.0,
                },
                "sets": {text: {"top1": {"n": 2, "mean": 0.5, "sd": 0.01, "difference": None if name == baseline else difference}}},
                "curves": {
                    text: [
                        {"from": 2**at, "to": 2 ** (at + 1) - 1, "classes": 3, "mean": 0.1 * at, "sd": None, "n": 1}
                        for at in range(4)
                    ]
                },
            }
            for name in (baseline, text)
        ]  # fmt: skip
        nested = {"options": {text: [text, 1]}, "list": [{text: True}], "none": {}}
        about = {text: {text: text, "nested": nested}}
        settings = {
            "train": about[text],
            "evaluate": about[text],
            "embeddings": about,
            "clusterings": about,
            "drop_lists": about,
        }
        return {
            "format": 1, "name": text, "about": text, "baseline": baseline, "seeds": [0, 1], "runs": {"done": 4, "all": 4},
            "sets": {text: ["top1"]}, "rows": rows, "power": {text: {"top1": None}}, "words": {text: {"top1": text}},
            "treatments": [text], "retrieval": False,
            "gate": {"seed": 0, "columns": ["row", text], "cells": [[baseline, text], [text, "–"]]},
            "ledger": {"columns": ["row", "training", "outside models"], "cells": [[text, "0", text]], "notes": [text]},
            "rests_on": {"samples_seen": 10, "most_samples_seen": 20, "pool": 20, **settings, "versions": [about[text]],
                "machines": [about[text]]},
        }  # fmt: skip

    return make
