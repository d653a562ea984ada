"""Catalogs in an object store, against an S3 server on the loopback: the same bytes as on a local disk, locks, races, forked workers."""

import json
import multiprocessing
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tailwise import PlanRequest, cluster, export_plan, import_pool, make_plan
from tailwise.catalog import Catalog, artifacts, columns
from tailwise.catalog.artifacts import Artifact, finished_folder, read_manifest
from tailwise.catalog.catalog import Part
from tailwise.catalog.columns import RowColumn
from tailwise.catalog.files import write_array
from tailwise.catalog.kinds import PLAN
from tailwise.context import Context
from tailwise.errors import ConflictError, DamagedError, NotFoundError, UnsupportedError, UserError
from tailwise.loader.loader import Loader
from tailwise.loader.sections import prepare_epochs
from tailwise.plan.plan import Plan
from tailwise.requests import (
    CaptionsRequest,
    ClusterRequest,
    DedupRequest,
    EmbedRequest,
    ExportRequest,
    FilterRequest,
    NamedScoreRequest,
)
from tailwise.steps.dedup.dedup import dedup
from tailwise.steps.embedding.embed import embed
from tailwise.steps.grouping.match import match_entries
from tailwise.steps.importing.captions import join_captions
from tailwise.steps.scoring.filter import filter_samples, try_filter
from tailwise.steps.scoring.named import make_named_score
from tailwise.steps.upkeep import delete as delete_module
from tailwise.steps.upkeep.delete import delete, rename
from tailwise.steps.upkeep.status import status
from tailwise.steps.upkeep.verify import verify
from tailwise.storage import lease
from tailwise.storage.local import locked, scratch
from tailwise.storage.store_path import StorePath, path_of

URL = "s3://pool/some/catalog"


@pytest.fixture
def clean_folder(tmp_path, monkeypatch):
    """The working directory; nothing may be written to it by a URL that is taken for a path."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def stored(server, small_catalog, clean_folder):
    """`small_catalog`, copied to the server."""
    path = path_of(URL)
    for file in small_catalog.folder.rglob("*"):
        if file.is_file():
            (path / file.relative_to(small_catalog.folder)).write_bytes(file.read_bytes())
    return Catalog.open(URL)


def files_of(folder):
    """The bytes of all files of a catalog, by the path that they have in a local one; without locks."""
    if not isinstance(folder, StorePath):
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in Path(folder).rglob("*")
            if path.is_file() and not path.name.endswith(".lock")
        }
    found = {}
    for key in folder.store.keys(f"{folder.key}/"):
        local = re.sub(r"^([\w-]+/[^/]+)/[0-9a-f]{32}/", r"\1/", key.removeprefix(f"{folder.key}/"))
        content = folder.store.get(key)
        assert found.setdefault(local, content) == content  # both manifests
    return found


def make_everything(sources, where, output, entries):
    """Run every step; return the catalog."""
    output.mkdir()
    first, second = sources[0] / "00000.tar", sources[0]
    import_pool([first, sources[1]], where, workers=1, part_rows=200)
    catalog = import_pool([second, sources[1]], where, workers=2, part_rows=200).catalog
    cluster(catalog, ClusterRequest(k=12, density="auto"))
    cluster(catalog, ClusterRequest(k=10, name="drawn", points_per_centroid=20))
    dedup(catalog, DedupRequest(epsilon=0.01))
    dedup(catalog, DedupRequest(exact="pixels"))
    dedup(catalog, DedupRequest(against=(str(sources[1]),), epsilon=0.02, name="clean"))
    embed(catalog, EmbedRequest(encoder="pixels", column="colours", of="image", workers=1))
    embed(catalog, EmbedRequest(encoder="joint:image=0.5,colours=0.5", column="joint"))
    join_captions(catalog, [entries.with_name("captions.csv")], CaptionsRequest(name="recap"))
    filter_samples(catalog, FilterRequest("caption-words", keep=0.9, captions="recap"))
    match_entries(catalog, entries, workers=1)
    without = ("duplicates",)
    plan = make_plan(catalog, "p", PlanRequest("dynamics", keep=0.5, without=without))
    make_named_score(catalog, NamedScoreRequest(name="size", mix="z(image-bytes) + caption-words"))
    make_plan(catalog, "ranked", PlanRequest("top-score", keep=0.3, score="size"))
    make_plan(catalog, "near", PlanRequest("dbp", keep=0.3))
    np.save(output / "draw.npy", plan.draw(3))
    prepare_epochs(plan, range(1, 3))
    for to, name in (("rates-json", "rates.json"), ("keys", "keys.txt"), ("parquet", "epoch.parquet")):
        export_plan(plan, to, output / name, epoch=None if to == "rates-json" else 1)
    sharding = ExportRequest(captions="recap:2,original:1")
    export_plan(plan, "shards", output / "shards", epoch=1, request=sharding)
    return catalog


@pytest.mark.slow
def test_every_step_gives_the_same_bytes(requests, _small_catalog_source, tmp_path, clean_folder, tree_bytes, caplog):
    sources = [_small_catalog_source / "pool", _small_catalog_source / "embeddings"]
    (tmp_path / "entries.txt").write_text("group\n")
    lines = [f"{row:06d},new caption of {row}" for row in range(0, 600, 2)]
    (tmp_path / "captions.csv").write_text("\n".join(["key,caption", *lines]))
    local = make_everything(sources, tmp_path / "catalog", tmp_path / "a", tmp_path / "entries.txt")
    remote = make_everything(sources, URL, tmp_path / "b", tmp_path / "entries.txt")
    assert requests.total() < 2500
    wanted, found = files_of(local.folder), files_of(remote.folder)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    assert len(wanted) > 70
    outputs = tree_bytes(tmp_path / "a"), tree_bytes(tmp_path / "b")
    assert outputs[0] == outputs[1]
    assert not any(b"very-secret" in content for content in (*found.values(), *outputs[1].values()))
    assert "very-secret" not in caplog.text
    shown = [json.dumps(status(catalog), sort_keys=True) for catalog in (local, remote)]
    assert shown[0] == shown[1]
    assert verify(remote) == verify(local)


def test_what_was_made_elsewhere_gives_the_same_bytes(stored, small_catalog, tmp_path):
    """Lists, rates, scores of files, whole clusters near a target, and a bundle."""
    keys = [f"{row:06d}" for row in range(0, 600, 3)]
    (tmp_path / "list.txt").write_text("\n".join([*keys, "gone"]))
    (tmp_path / "values.csv").write_text("\n".join(["key,rate", *(f"{key},{int(key) % 5}" for key in keys)]))
    np.save(
        tmp_path / "target.npy", np.concatenate(small_catalog.embedding_parts("image", small_catalog.snapshot()))[:3]
    )
    for catalog in (small_catalog, stored):
        cluster(catalog, ClusterRequest(k=12))
        filter_samples(catalog, FilterRequest("near-target", target=tmp_path / "target.npy"))
        filter_samples(catalog, FilterRequest(only=tmp_path / "list.txt", refill="random"))
        filter_samples(catalog, FilterRequest(exclude=tmp_path / "values.csv"))
        assert try_filter(catalog, FilterRequest(exclude=tmp_path / "list.txt")).summary["dropped"] == 200
        make_named_score(catalog, NamedScoreRequest(name="rate", file=tmp_path / "values.csv"))
        plan = make_plan(catalog, "rated", PlanRequest(rates=tmp_path / "values.csv", missing_rate=0))
        export_plan(plan, "plan-bundle", tmp_path / "bundle")  # the second finds the same bytes
        make_plan(catalog, "again", PlanRequest(source=str(tmp_path / "bundle")))
    wanted, found = files_of(small_catalog.folder), files_of(stored.folder)
    assert found.keys() - {".lock"} == wanted.keys()  # which `stored` copied
    assert [name for name in wanted if found[name] != wanted[name]] == []


@pytest.mark.slow
def test_a_sick_server_changes_no_byte(sick_server, _small_catalog_source, tmp_path, clean_folder, tree_bytes):
    pytest.importorskip("s3fs", reason="needs the extra s3: s3fs")
    for tar in (_small_catalog_source / "pool").glob("*.tar"):
        (path_of("s3://pool/shards") / tar.name).write_bytes(tar.read_bytes())
    sources = ["s3://pool/shards/{00000..00002}.tar", str(_small_catalog_source / "embeddings")]

    def make(where, output):
        output.mkdir()
        catalog = import_pool(sources, where, workers=1).catalog
        cluster(catalog, ClusterRequest(k=12))
        dedup(catalog, DedupRequest(epsilon=0.01))
        filter_samples(catalog, FilterRequest("caption-words", keep=0.9))
        plan = make_plan(catalog, "p", PlanRequest("dynamics", keep=0.5, without=("duplicates", "caption-words")))
        export_plan(plan, "parquet", output / "epoch.parquet", epoch=2)
        export_plan(plan, "shards", output / "shards", epoch=2)
        return files_of(catalog.folder)

    found = make(URL, tmp_path / "a")
    assert sick_server["refuse"] >= 8
    assert sick_server["lose"] >= 2
    assert found == make(tmp_path / "catalog", tmp_path / "b")
    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")


@pytest.mark.slow
def test_nodes_of_a_ray_cluster_share_a_catalog_alone(server, _small_catalog_source, tmp_path, clean_folder):
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    from ray.cluster_utils import Cluster

    from tailwise.execution.ray import RayExecutor

    ray.shutdown()  # the cluster of other tests, whose nodes do not know the server

    def make(where, context):
        sources = [_small_catalog_source / "pool", _small_catalog_source / "embeddings"]
        catalog = import_pool(sources, where, workers=2, part_rows=150, context=context).catalog
        cluster(catalog, ClusterRequest(k=12), context)
        dedup(catalog, DedupRequest(epsilon=0.01), context)
        make_plan(catalog, "p", PlanRequest("dynamics", keep=0.5, without=("duplicates",)), context)
        return files_of(catalog.folder)

    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # a path of at most 107 bytes, for sockets
        node = {"num_cpus": 1, "object_store_memory": 100 << 20}
        caches = [tmp_path / f"node-{number}" for number in range(2)]
        Path("/tmp/ray").mkdir(exist_ok=True)
        head = {**node, "include_dashboard": False, "temp_dir": folder, "env_vars": {"TAILWISE_CACHE": str(caches[0])}}
        nodes = Cluster(initialize_head=True, head_node_args=head)
        try:
            nodes.add_node(**node, env_vars={"TAILWISE_CACHE": str(caches[1])})
            with RayExecutor(nodes.address, cpus=1) as executor:
                found = make(URL, Context(executor=executor))
        finally:
            ray.shutdown()
            nodes.shutdown()
    assert found == make(tmp_path / "catalog", Context())
    assert all(any(cache.iterdir()) for cache in caches)


def test_verify_reads_what_is_stored(stored):
    assert verify(stored)[1] == []
    path = stored.samples_path(0)
    content = bytearray(path.read_bytes())  # also in the cache of this node
    content[100] ^= 1
    path.write_bytes(bytes(content))
    assert verify(stored)[1] == [path]


def test_paths_are_their_urls_everywhere(stored):
    path = stored.folder / "snapshots" / "head.json"
    assert str(path) == f"{URL}/snapshots/head.json"
    assert pickle.loads(pickle.dumps(path)) == path
    assert path.exists() and not (stored.folder / "snapshots").exists()
    assert sorted(item.name for item in stored.folder.glob("s*/head.json")) == ["head.json"]
    assert [item.name for item in (stored.folder / "snapshots").iterdir()] == ["000001.json", "head.json"]
    assert json.loads(Path(os.fspath(path)).read_bytes()) == json.loads(path.read_text())
    for unsupported in ("rename", "touch", "symlink_to", "rglob", "resolve"):
        assert not hasattr(path, unsupported)
    with pytest.raises(UnsupportedError, match="can't be opened as 'a'"):
        path.open("a")
    with pytest.raises(FileNotFoundError, match="nothing"):
        (stored.folder / "nothing").stat()
    with pytest.raises(NotFoundError, match=f"^{URL}/other is no catalog"):
        Catalog.open(f"{URL}/other")
    with pytest.raises(ConflictError, match="exists and is no catalog"):
        Catalog.create(f"{URL}/samples")


def test_a_write_that_fails_leaves_nothing(stored):
    with pytest.raises(ZeroDivisionError), (stored.folder / "new").open("wb") as stream:
        stream.write(b"some")
        raise ZeroDivisionError
    assert not (stored.folder / "new").exists()
    with scratch(stored.folder / "work") as work:
        (work / "a" / "b").write_bytes(b"1")
        assert work.is_dir()
    assert not (stored.folder / "work").is_dir()


# --- writers of one name ------------------------------------------------------------------------------------------------------


def begin(catalog, number):
    """Begin a plan, as if the time of its lock had passed at once."""
    writer = Artifact(catalog.plan_folder("p"), "plan", {"snapshot": 1, "number": number}, {}).__enter__()
    (catalog.folder / "plans" / ".p.lock").unlink()
    writer.path("a").write_bytes(b"%d" % number)
    return writer


@pytest.mark.parametrize("write", [0, 1, 2])  # that the loser has done when the winner finishes
def test_of_two_writers_without_a_lock_one_wins(stored, monkeypatch, write):
    loser = begin(stored, 1)
    other = Artifact(stored.plan_folder("p"), "plan", {"snapshot": 1, "number": 2}, {})
    (other.folder / "pending.json").write_bytes(b"{}")
    other.path("a").write_bytes(b"2")
    writes = []

    def put(path, content, real=artifacts.put_if_absent):
        writes.append(path)
        if path.parent != other.folder and len(writes) == write:
            other.finish({})
        return real(path, content)

    monkeypatch.setattr(artifacts, "put_if_absent", put)
    if not write:
        other.finish({})
    with pytest.raises(ConflictError, match=f"another process has finished {URL}/plans/p at this moment"):
        loser.finish({})
    found = read_manifest(stored.plan_folder("p"), "plan", "")
    assert found["identity"] == other.identity
    folder = finished_folder(stored.plan_folder("p"), found["identity"])
    assert (folder / "a").read_bytes() == b"2"
    assert verify(stored)[1] == []
    again = Artifact(stored.plan_folder("p"), "plan", {"snapshot": 1, "number": 1}, {})
    with (
        pytest.raises(
            ConflictError, match=r"plans/p exists with other settings \(`number` 2 → 1\): choose another name"
        ),
        again,
    ):
        pass
    assert {path.name for path in stored.plan_folder("p").iterdir()} == {folder.name, "manifest.json"}


COMMAND = (sys.executable, "-m", "tailwise", "--quiet", "plan", URL, "p", "--method", "dynamics", "--keep")


def test_of_two_commands_one_wins(stored):
    cluster(stored, ClusterRequest(k=12))
    kept = ("0.3", "0.5")
    running = [subprocess.Popen([*COMMAND, keep], stderr=subprocess.PIPE, text=True) for keep in kept]
    messages = [process.communicate(timeout=100)[1] for process in running]
    codes = [process.returncode for process in running]
    assert sorted(codes) == [0, 2], messages
    said = messages[codes.index(2)]
    assert re.search(r"another process (is writing|has finished)|exists with other settings", said)
    assert said.count("\n") == 1
    assert "very-secret" not in said
    keep = float(kept[codes.index(0)])
    assert Plan(stored, "p").draw(0).sum() == round(keep * 600)
    assert verify(stored)[1] == []


@pytest.mark.slow
@pytest.mark.parametrize("pause", [0.0, 0.3])
def test_a_killed_command_is_resumed(server, _small_catalog_source, tmp_path, clean_folder, wait_until, pause):
    sources = [str(_small_catalog_source / name) for name in ("pool", "embeddings")]
    commands = ((["import", *sources, URL], ".lock"), (["cluster", URL, "--k", "12"], "clusters/.main.lock"))
    for words, lock in commands:
        process = subprocess.Popen([sys.executable, "-m", "tailwise", "--quiet", *words], stdout=subprocess.DEVNULL)
        wait_until((path_of(URL) / lock).exists, lambda process=process: process.poll() is None)
        time.sleep(pause)
        process.kill()
        process.wait()
        subprocess.run([sys.executable, "-m", "tailwise", "--quiet", *words], stdout=subprocess.DEVNULL, check=True)
    catalog = import_pool(sources, tmp_path / "catalog", workers=1).catalog
    cluster(catalog, ClusterRequest(k=12))
    assert files_of(path_of(URL)) == files_of(catalog.folder)


# --- locks ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(server):
    """Path of a lock."""
    return path_of(URL) / ".lock"


def hold(path, machine, until):
    """Write the lease of a process that is elsewhere."""
    holder = {"owner": "x", "host": "node-7", "pid": 1, "machine": machine, "until": until}
    path.write_bytes(json.dumps(holder).encode())


def test_a_lock_is_held_once_and_names_its_holder(path):
    said = f"^another process is writing it \\(process {os.getpid()} on {socket.gethostname()}, whose lock ends in (59|60) s"
    with locked(path, "it"):
        with pytest.raises(ConflictError, match=said), locked(path, "it"):
            pass
        assert b"very-secret" not in path.read_bytes()
    assert not path.exists()
    with locked(path, "it"):
        pass


def test_a_lock_of_a_live_process_elsewhere_is_respected(path):
    hold(path, "another boot", time.time() + 50)
    with pytest.raises(ConflictError, match=r"process 1 on node-7, whose lock ends in (49|50) s"), locked(path, "it"):
        pass
    began = time.monotonic()
    hold(path, "another boot", time.time() + 1)
    with locked(path, "it", wait=True):
        assert 0.9 < time.monotonic() - began < 5


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"until": "x"}'])
def test_a_damaged_lock_is_taken(path, content):
    path.write_bytes(content)
    with locked(path, "it"):
        assert json.loads(path.read_bytes())["pid"] == os.getpid()


HOLDER = """
import sys, time
from tailwise.storage.local import locked
from tailwise.storage.store_path import path_of
with locked(path_of(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(100)
"""


def test_the_lock_of_a_killed_process_of_this_machine_is_taken(path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConflictError, match=f"process {holder.pid} on "), locked(path, "it"):
            pass
        holder.send_signal(signal.SIGKILL)
    with locked(path, "it"):
        assert json.loads(path.read_bytes())["pid"] == os.getpid()


def test_a_lock_is_renewed_and_a_lost_one_stays_with_its_new_holder(path, monkeypatch):
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)
    with locked(path, "it"):
        first = json.loads(path.read_bytes())["until"]
        time.sleep(1.5)
        assert json.loads(path.read_bytes())["until"] > first + 1
        hold(path, "another boot", time.time() + 50)
        time.sleep(0.5)
    assert json.loads(path.read_bytes())["host"] == "node-7"


# --- rows by ranges -----------------------------------------------------------------------------------------------------------


def test_a_few_rows_are_read_by_ranges_and_many_from_a_copy(stored, requests, monkeypatch):
    monkeypatch.setattr(columns, "BLOCK_BYTES", 1 << 10)
    values = np.random.default_rng(0).integers(0, 1 << 30, (40_000, 2), np.int32)
    path = stored.folder / "column.npy"
    write_array(path, values)
    copy = Path(os.fspath(path))
    copy.unlink()
    column = RowColumn(lambda _: path, [Part(0, 0, 40_000)], np.int32, (2,))
    rows = np.array([39_999, 5, 20_000, 5, 6])
    assert np.array_equal(column[rows], values[rows])
    assert np.array_equal(column[20_000:20_100], values[20_000:20_100])
    assert not copy.exists()
    requests.clear()
    assert np.array_equal(column[rows[::-1]], values[rows[::-1]])  # their blocks are kept
    assert not requests
    for start in range(0, 40_000, 1_000):
        assert np.array_equal(column[start : start + 1_000], values[start : start + 1_000])
    assert copy.exists()
    assert requests.total() < 30
    other = RowColumn(lambda _: path, [Part(0, 0, 40_001)], np.int32, (2,))
    with pytest.raises(
        DamagedError, match=rf"^{URL}/column.npy holds int32 \[40000, 2\], and its part needs int32 \[40001, 2\]"
    ):
        other[3:5]
    missing = RowColumn(lambda _: stored.folder / "gone.npy", [Part(0, 0, 1_000)], np.int32)
    with pytest.raises(DamagedError, match=f"^{URL}/gone.npy is missing or damaged"):
        missing[3:5]


# --- forked processes -------------------------------------------------------------------------------------------------------------


def to_tensor(image):
    return torch.from_numpy(np.asarray(image).copy())


def lengths(captions):
    return torch.tensor([len(caption) for caption in captions])


def batches(plan, workers):
    """The first batches of a plan, as values that can be compared."""
    loader = Loader(plan, batch_size=32, workers=workers, transform=to_tensor, tokenizer=lengths)
    found = [
        (batch.rows.tolist(), batch.epochs.tolist(), batch.images.sum().item())
        for batch, _ in zip(loader, range(30), strict=False)
    ]
    del loader
    return found


def test_forked_workers_of_a_loader_read_the_catalog(stored, small_catalog):
    for catalog in (stored, small_catalog):
        cluster(catalog, ClusterRequest(k=12))
        make_plan(catalog, "p", PlanRequest("dynamics", keep=0.5))
    wanted = batches(Plan(small_catalog, "p"), 0)
    assert len({epoch for _, epochs, _ in wanted for epoch in epochs}) > 2
    assert batches(Plan(URL, "p"), 2) == wanted
    assert batches(Plan(URL, "p"), 0) == wanted


def test_a_forked_process_uses_the_store(stored):
    def work():
        path = stored.folder / "new"
        with locked(stored.folder / ".lock", "it"):
            path.write_bytes(b"1")
        with pytest.raises(FileNotFoundError):
            (stored.folder / "gone").read_bytes()
        told.put((path.read_bytes(), [item.name for item in (stored.folder / "snapshots").iterdir()]))

    context = multiprocessing.get_context("fork")
    told = context.Queue()
    process = context.Process(target=work)
    process.start()
    assert told.get(timeout=60) == (b"1", ["000001.json", "head.json"])
    process.join()
    assert process.exitcode == 0
    assert (stored.folder / "new").read_bytes() == b"1"


def test_without_obstore_one_line_names_the_extra(monkeypatch, clean_folder, forget_servers):
    forget_servers()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "obstore" else object())
    with pytest.raises(UnsupportedError, match=r"^s3://pool.* needs obstore: pip install .*"):
        Catalog.open(URL)


def test_the_bound_of_the_cache_is_read_from_the_environment(stored, monkeypatch):
    monkeypatch.setenv("TAILWISE_CACHE_BYTES", "many")
    with pytest.raises(UserError, match="TAILWISE_CACHE_BYTES is 'many': give a number of bytes above 0, such as 50e9"):
        stored.samples(stored.parts()[0])
    monkeypatch.setenv("TAILWISE_CACHE_BYTES", "100")
    monkeypatch.setenv("TAILWISE_CACHE", str(Path(os.environ["TAILWISE_CACHE"]) / "other"))
    with pytest.raises(UnsupportedError, match=r"has .* bytes, and .*other keeps 100"):
        stored.samples(stored.parts()[0])


def test_artifacts_are_deleted_and_renamed(stored, monkeypatch):
    cluster(stored, ClusterRequest(k=12))
    plan = make_plan(stored, "p", PlanRequest("dbp", keep=0.5))
    drawn, state = plan.draw(2).tolist(), verify(stored)
    with monkeypatch.context() as patched:  # the server's copies are there, and nothing else
        patched.setattr(delete_module, "put_if_absent", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rename(stored, "plans/p", "q")
    assert PLAN.finished(stored.folder) == ["p"] and verify(stored) == state
    with monkeypatch.context() as patched:  # both are there
        patched.setattr(delete_module._Item, "delete", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rename(stored, "plans/p", "q")
    assert PLAN.finished(stored.folder) == ["p", "q"]
    assert rename(stored, "plans/p", "q") == "plans/q"
    assert PLAN.finished(stored.folder) == ["q"] and Plan(stored, "q").draw(2).tolist() == drawn
    assert verify(stored) == state
    with pytest.raises(ConflictError, match="plans/q was made from clusters/main"):
        delete(stored, ["clusters/main"])
    found = delete(stored, ["clusters/main"], with_dependants=True, dry_run=True)
    assert [item.name for item in found] == ["plans/q", "clusters/main"]
    assert found[0].size_bytes == sum(
        len(stored.folder.store.get(key)) for key in stored.folder.store.keys(f"{(stored.folder / 'plans').key}/")
    )
    assert delete(stored, ["embeddings/image"], with_dependants=True)[:2] == found
    left = {key.removeprefix(stored.folder.key) for key in stored.folder.store.keys(f"{stored.folder.key}/")}
    assert not [key for key in left if key.startswith(("/plans", "/clusters", "/embeddings"))]
    with pytest.raises(NotFoundError):
        Plan(stored, "q")


def test_a_changed_shard_is_replaced(server, clean_folder, tmp_path, make_pool):
    make_pool(tmp_path / "pool", [20, 20])
    catalog = import_pool(tmp_path / "pool", URL, workers=1).catalog
    make_pool(tmp_path / "pool", [20, 30])
    assert import_pool(tmp_path / "pool", URL, workers=1).changed == [str(tmp_path / "pool" / "00001.tar")]
    assert import_pool(tmp_path / "pool", URL, workers=1, update=True).new_samples == 30
    plan = make_plan(catalog, "p", PlanRequest("random", keep=0.5))
    assert plan.pool == 50 and catalog.replaced() == {1: 2}
    assert not next(iter(Loader(plan, batch_size=10))).replaced
    assert verify(catalog)[1] == []
