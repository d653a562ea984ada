"""Damaged and odd input to every reader: a result, or an error of ours; nothing else, and not for long."""

import io
import json
import shutil
import signal
import struct
import tarfile
import zipfile
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tailwise import import_pool
from tailwise.catalog import Catalog
from tailwise.compare.recipe import load_compare_recipe
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.evaluate.counts import read_train_counts
from tailwise.evaluate.images import TarShard, read_batches
from tailwise.evaluate.sets import find_set
from tailwise.pipeline.steps import load_pipeline
from tailwise.plan.plan import Plan
from tailwise.recipes.recipe import load_recipe
from tailwise.requests import FilterRequest, GroupRequest, PlanRequest
from tailwise.shards.columns import count_rows
from tailwise.shards.decode import ImageError, decode_rgb
from tailwise.shards.metadata import read_metadata
from tailwise.shards.webdataset import read_shard
from tailwise.steps.grouping.group import group
from tailwise.steps.grouping.match import read_entries
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.scoring.filter import filter_samples
from tailwise.steps.upkeep.remove import read_names
from tailwise.steps.upkeep.status import status
from tailwise.steps.upkeep.why import why

SECONDS = 20  # that one input may take
ODD = (
    b"\0",
    b"\xff",
    b"\x1b[31m",
    b"'",
    b'"',
    b"\n",
    b"\t",
    b"{",
    b"[" * 3000,
    b"\xe2\x80\xae",
    b"1e999",
    b"NaN",
    b"-1",
    b"*a",
    b"&a ",
)


def parquet(**columns):
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npz(**arrays):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            archive.writestr(f"{name}.npy", npy(array))
    return stream.getvalue()


def tar(members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


KEYS = [f"{number:04d}" for number in range(12)]
UIDS = [f"{number:032x}" for number in range(12)]
VECTORS = np.eye(12, 8, dtype=np.float16) + np.float16(0.1)


def mutated(good, chosen):
    """A file with one to four changes, which differs from the good one."""
    while (content := changed(good, chosen)) == good:
        pass
    return content


def changed(good, chosen):
    """One to four changes of a file: bits, bytes, cuts, insertions, doubled pieces."""
    content = bytearray(good)
    for _ in range(int(chosen.integers(1, 5))):
        if not content:
            break
        at, kind = int(chosen.integers(len(content))), int(chosen.integers(7))
        stop = min(len(content), at + int(chosen.integers(1, 64)))
        if kind == 0:
            content[at] ^= 1 << int(chosen.integers(8))
        elif kind == 1:
            content[at] = int(chosen.integers(256))
        elif kind == 2:
            del content[at:]
        elif kind == 3:
            content[at:at] = ODD[int(chosen.integers(len(ODD)))]
        elif kind == 4:
            content[at:at] = content[at:stop]
        elif kind == 5:
            del content[at:stop]
        else:
            number = (0, 1, -1, 2**31 - 1, -(2**31), 2**63 - 1, 10**6)[int(chosen.integers(7))]
            packed = struct.pack("<q", number)[: int(chosen.choice([1, 2, 4, 8]))]
            content[at : at + len(packed)] = packed
    return bytes(content)


@contextmanager
def limited(seconds):
    """An input that takes longer fails the test."""

    def late(*_):
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def pool(tmp_path_factory, make_image):
    """A tar of twelve samples, and the catalog of it."""
    folder = tmp_path_factory.mktemp("fuzz")
    members = [
        (f"{key}.{extension}", content)
        for key in KEYS
        for extension, content in (
            ("jpg", make_image(int(key))),
            ("txt", f"a photo of {key}".encode()),
            ("json", json.dumps({"uid": UIDS[int(key)], "width": 8, "height": 8}).encode()),
        )
    ]
    (folder / "shards").mkdir()
    (folder / "shards" / "0.tar").write_bytes(tar(members))
    import_pool([folder / "shards"], folder / "cat", workers=1)
    return folder


def images(make_image):
    return [make_image(3, kind, 24) for kind in ("JPEG", "PNG", "WEBP")]


RECIPE = b"steps:\n- import\n- cluster: {clusters: 4}\n- plan: {name: p, method: dynamics, keep: 0.5}\n"
TRAINING = b"phases:\n- samples_seen: 1000\n  batch_size: 10\n  open_clip: {model: ViT-B-32, lr: 0.001}\n"
STUDY = b"catalog: cat\nrows:\n  a: {method: random, keep: 0.5}\n  b: {method: dynamics, keep: 0.5}\nseeds: [0, 1]\n"
SIDECAR = {
    "key": KEYS,
    "status": ["success"] * 12,
    "width": [8] * 12,
    "height": [8.0] * 12,
    "uid": UIDS,
    "score": [0.5] * 12,
}


def read_members(path, pool):
    """A tar, whose members are all accounted for."""
    members = read_shard(str(path)).members
    assert members.seen == members.imported + members.harmless + members.rejected


def read_rows(path, pool):
    """A file of metadata, whose rows are all accounted for."""
    content = read_metadata(str(path))
    rejected = [row["rows"] for row in content.rejected.to_pylist() if row["stage"] == "import"]
    assert content.samples.num_rows + sum(rejected) == count_rows(path)


# A set of clip_benchmark's layout: a class and an image a sample.
CLASSES = "cls"


def read_set(path, pool):
    """All samples of a tar of an evaluation set, decoded."""
    for batch in read_batches(
        [TarShard(str(path), (CLASSES,))],
        to_tensor,
        int_or_none,
        batch_size=4,
        workers=1,
        context=Context(),
        description="",
    ):
        assert len(batch.images) == len(batch.targets)


def to_tensor(image):
    return torch.zeros(3, 1, 1)


def int_or_none(content):
    return int(content[0]) if content[0].isdigit() else None


# name: (inputs of `make soak`, the file to damage, its good content, how it is read)
FAST = {
    "tar": (4000, "a.tar", None, read_members),
    "set-tar": (1000, "0.tar", None, read_set),
    "sidecar": (1500, "0.parquet", parquet(**SIDECAR), None),
    "image": (3000, "a.jpg", None, lambda path, pool: decode_rgb(path.read_bytes())),
    "metadata": (
        1500,
        "m.parquet",
        parquet(uid=UIDS, text=["a"] * 12, original_width=[8] * 12, original_height=[8] * 12),
        read_rows,
    ),
    "entries": (1500, "entries.txt", b"cat\ndog\ngolden retriever\n", lambda path, pool: read_entries(path)),
    "keys": (1500, "keys.txt", "\n".join(KEYS).encode(), lambda path, pool: read_names(path)),
    "keys-parquet": (1000, "keys.parquet", parquet(key=KEYS), lambda path, pool: read_names(path)),
    "counts": (
        1500,
        "counts.tsv",
        b"name\tcount\ncat\t3\ndog\t4\n",
        lambda path, pool: read_train_counts(path, ["cat", "dog"]),
    ),
    "counts-json": (
        1000,
        "counts.json",
        b'{"cat": 3, "dog": 4}',
        lambda path, pool: read_train_counts(path, ["cat", "dog"]),
    ),
    "pipeline": (1500, "r.yaml", RECIPE, lambda path, pool: load_pipeline(str(path))),
    "training": (1000, "t.yaml", TRAINING, lambda path, pool: load_recipe(str(path))),
    "study": (1000, "s.yaml", STUDY, lambda path, pool: load_compare_recipe(str(path))),
}


@pytest.mark.parametrize("name", FAST)
def test_readers_end_well(pool, tmp_path, times, note, numbers, make_image, name):
    count, file, content, read = FAST[name]
    chosen, errors = numbers(name), 0
    good = {
        "tar": lambda: [(pool / "shards" / "0.tar").read_bytes()[:20480]],
        "image": lambda: images(make_image),
        "set-tar": lambda: [
            tar([pair for key in KEYS for pair in ((f"{key}.cls", b"1"), (f"{key}.jpg", make_image(int(key))))])
        ],
    }.get(name, lambda: [content])()
    if name == "sidecar":
        (tmp_path / "0.tar").write_bytes((pool / "shards" / "0.tar").read_bytes())
        read = lambda _, pool: read_members(tmp_path / "0.tar", pool)  # noqa: E731
    path = tmp_path / file
    for trial in range(times(count)):
        path.write_bytes(mutated(good[trial % len(good)], chosen))
        with limited(SECONDS):
            try:
                read(path, pool)
            except (UserError, ImageError):
                errors += 1
            except Exception as error:
                kept = tmp_path / f"failing-{name}"
                kept.write_bytes(path.read_bytes())
                raise AssertionError(f"{type(error).__name__} of {kept}, trial {trial}") from error
    note("fuzz", name, trials=times(count), hits=times(count), errors=errors)


def _clip_retrieval(folder, file, content):
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    (folder / "img_emb" / "img_emb_0.npy").write_bytes(npy(VECTORS))
    (folder / "metadata" / "metadata_0.parquet").write_bytes(parquet(image_path=PATHS))
    (folder / file).write_bytes(content)


PATHS = [f"shards/0.tar/{key}.jpg" for key in KEYS]
EMBEDDINGS = {
    "npy": ("img_emb/img_emb_0.npy", npy(VECTORS)),
    "npy-metadata": ("metadata/metadata_0.parquet", parquet(image_path=PATHS)),
    "dynamics-ids": ("img_emb/img_emb_0_indices.npy", npy(np.arange(12) % 4)),
    "parquet": ("vectors.parquet", parquet(key=KEYS, embedding=[row.tolist() for row in VECTORS.astype(np.float32)])),
    "npz": ("m.npz", npz(l14_img=VECTORS, l14_txt=VECTORS)),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings_are_imported_or_refused(pool, tmp_path, times, note, numbers, name):
    file, content = EMBEDDINGS[name]
    chosen, errors = numbers(name), 0
    for trial in range(times(250)):
        folder = tmp_path / f"{trial}"
        damaged = mutated(content, chosen)
        if file.startswith(("img_emb", "metadata")):
            _clip_retrieval(folder, file, damaged)
        else:
            folder.mkdir()
            if name == "npz":
                (folder / "m.parquet").write_bytes(FAST["metadata"][2])
            (folder / file).write_bytes(damaged)
        with limited(3 * SECONDS):
            try:
                import_pool([pool / "shards", folder], tmp_path / f"cat{trial}", workers=1)
            except UserError:
                errors += 1
    note("fuzz", f"embeddings-{name}", trials=times(250), hits=times(250), errors=errors)


TABLES = {
    "groups": ("g.tsv", "key\tkind\n" + "".join(f"{key}\t{key[-1]}\n" for key in KEYS)),
    "groups-parquet": ("g.parquet", parquet(key=KEYS, kind=[key[-1] for key in KEYS])),
    "rates": ("r.json", json.dumps(dict.fromkeys(KEYS, 0.5))),
    "scores": ("s.parquet", parquet(key=KEYS, quality=[number / 12 for number in range(12)])),
    "scores-tsv": ("s.tsv", "key\tquality\n" + "".join(f"{key}\t{int(key) / 12}\n" for key in KEYS)),
    "rates-parquet": ("r.parquet", parquet(key=KEYS, rate=[0.5] * 12)),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_over_a_catalog_are_used_or_refused(pool, tmp_path, times, note, numbers, name):
    file, content = TABLES[name]
    chosen, errors = numbers(name), 0
    content = content if isinstance(content, bytes) else content.encode()
    path = tmp_path / file
    for trial in range(times(250)):
        path.write_bytes(mutated(content, chosen))
        with limited(3 * SECONDS):
            try:
                catalog = Catalog.open(pool / "cat")
                made = f"{name}-{trial}"
                if name.startswith("groups"):
                    group(catalog, GroupRequest("kind", file=path, name=made))
                elif name.startswith("scores"):
                    filter_samples(catalog, FilterRequest("quality", file=str(path), keep=0.5, name=made))
                else:
                    make_plan(catalog, made, PlanRequest("rates", rates=path))
                    Plan(catalog, made).draw(0, slice(0, 12))
            except UserError:
                errors += 1
    note("fuzz", name, trials=times(250), hits=times(250), errors=errors)


@pytest.mark.parametrize("damaged", ["classnames.txt", "zeroshot_classification_templates.txt"])
def test_sets_are_read_or_refused(tmp_path, times, note, numbers, make_image, damaged):
    good = {"classnames.txt": b"cat\ndog\n", "zeroshot_classification_templates.txt": b"a photo of a {c}\na {c}.\n"}
    for number in range(2):
        (tmp_path / f"{number:02d}").mkdir()
        (tmp_path / f"{number:02d}" / "a.jpg").write_bytes(make_image(number))
    chosen, errors = numbers(damaged), 0
    for _ in range(times(500)):
        for name, content in good.items():
            (tmp_path / name).write_bytes(mutated(content, chosen) if name == damaged else content)
        with limited(SECONDS):
            try:
                find_set(str(tmp_path))
            except UserError:
                errors += 1
    note("fuzz", damaged, trials=times(500), hits=times(500), errors=errors)


def told(catalog):
    """What commands tell of a catalog."""
    shown = status(catalog), why(catalog, KEYS[3]), Plan(catalog, "p").draw(1).tolist()
    return json.dumps(shown, default=str)


def test_files_of_a_catalog_are_read_as_they_were_written_or_refused(pool, tmp_path, times, note, numbers):
    good, chosen, errors = tmp_path / "good", numbers("catalog"), 0
    shutil.copytree(pool / "cat", good, ignore=shutil.ignore_patterns("plans", "clusters", "drops", "scores"))
    make_plan(Catalog.open(good), "p", PlanRequest("random", keep=0.5))
    whole = told(Catalog.open(good))
    files = sorted(path for path in good.rglob("*") if path.is_file() and "lock" not in path.name)
    for trial in range(times(1000)):
        work = tmp_path / f"{trial}"
        shutil.copytree(good, work)
        path = work / files[int(chosen.integers(len(files)))].relative_to(good)
        if not path.stat().st_size:
            path.write_bytes(b"x")
        path.write_bytes(mutated(path.read_bytes(), chosen))
        with limited(SECONDS):
            try:
                assert told(Catalog.open(work)).replace(str(work), str(good)) == whole, path
            except UserError:
                errors += 1
        shutil.rmtree(work)
    note("fuzz", "catalog", trials=times(1000), hits=times(1000), errors=errors)
