"""Exports read back by readers that are not ours, and by our own import: what comes back is what the plan draws."""

import hashlib
import io
import json
import tarfile
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tailwise.catalog import Catalog
from tailwise.context import Context
from tailwise.export import export, files
from tailwise.export.files import write_datacomp
from tailwise.requests import ClusterRequest, ExportRequest, PlanRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "datacomp_resharder.json"
FEW = ExportRequest(50, workers=1)


@pytest.fixture
def shards(thrice, tmp_path):
    """The folder of `thrice` as new shards: 280 samples."""
    export(thrice, "shards", tmp_path / "out", request=FEW)
    return tmp_path / "out"


def drawn(plan, sources, epoch=0):
    """Copies of each uid."""
    return Counter({row["uid"]: n for row, n in zip(sources, plan.draw(epoch).tolist(), strict=True) if n})


def test_shards_by_webdataset(thrice, shards, sources_of):
    wds = pytest.importorskip("webdataset")
    sources = sources_of(thrice.catalog)
    by_uid = {row["uid"]: row for row in sources}
    tars = str(shards / "{00000000..00000005}.tar")
    seen = Counter()
    for sample in wds.WebDataset(tars, shardshuffle=False):
        source = by_uid[json.loads(sample["json"])["uid"]]
        extension = source["image_extension"]
        assert sample[extension] == source["members"][extension]
        assert sample["txt"] == source["members"]["txt"]
        seen[source["uid"]] += 1
    assert seen == drawn(thrice, sources)
    decoded = wds.WebDataset(tars, shardshuffle=False).decode("pil").rename(image="jpg;jpeg;png;webp")
    pixels = Counter((sample["image"].tobytes(), sample["txt"], sample["json"]["uid"]) for sample in decoded)
    expected = Counter()
    for uid, copies in drawn(thrice, sources).items():
        members = by_uid[uid]["members"]
        image = Image.open(io.BytesIO(members[by_uid[uid]["image_extension"]])).convert("RGB")
        expected[image.tobytes(), members["txt"].decode(), uid] = copies
    assert pixels == expected


def test_shards_by_tarfile(thrice, shards, sources_of):
    sources = sources_of(thrice.catalog)
    hashes = Counter()
    for path in shards.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                assert (member.uid, member.gid, member.mtime, member.pax_headers) == (0, 0, 0, {})
                if not member.name.endswith(".json"):
                    hashes[tar.extractfile(member).read()] += 1
    expected = Counter()
    for row, copies in zip(sources, thrice.draw(0).tolist(), strict=True):
        for extension, content in row["members"].items():
            expected[content] += copies * (extension != "json")
    assert hashes == +expected


def test_shards_by_our_import(thrice, shards, sources_of, tmp_path):
    sources = sources_of(thrice.catalog)
    again = import_pool([str(shards)], tmp_path / "again", workers=1)
    rows = [row for part in again.catalog.parts() for row in again.catalog.samples(part).to_pylist()]
    assert again.catalog.rejected() is None or not again.catalog.rejected().num_rows
    assert Counter(row["uid"].hex() for row in rows) == drawn(thrice, sources)
    by_uid = {row["uid"]: row for row in sources}
    for row in rows:
        source = by_uid[row["uid"].hex()]
        for name in ("caption", "image_extension", "image_bytes", "width", "height"):
            assert row[name] == source[name]
        assert row["score"] == source.get("score")
    assert set(rows[0]) == {*thrice.catalog.samples(thrice.catalog.parts()[0]).column_names}


def test_shards_exported_anew_from_their_own_import(once, tmp_path, tree_bytes):
    """A second generation: the same samples, with the JSON that came through both."""
    export(once, "shards", tmp_path / "first", request=FEW)
    catalog = import_pool([str(tmp_path / "first")], tmp_path / "again", workers=1).catalog
    plan = make_plan(catalog, "all", PlanRequest("random", keep=1.0))
    export(plan, "shards", tmp_path / "second", request=FEW)
    tables = [
        ds.dataset(sorted(map(str, (tmp_path / name).glob("0*.parquet")))).to_table() for name in ("first", "second")
    ]
    columns = ["uid", "caption", "status", "width", "height", "score"]
    first, second = (table.select(columns).sort_by("uid").to_pylist() for table in tables)
    assert first == second
    assert sorted(tables[1]["source_key"].to_pylist()) == sorted(tables[0]["key"].to_pylist())


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_by_open_clips_training_data(thrice, shards, sources_of, workers):
    """open_clip finds the number of samples in sizes.json, and images and captions in the tars."""
    data = pytest.importorskip("open_clip_train.data")
    torch = pytest.importorskip("torch")
    from torchvision.transforms.functional import pil_to_tensor

    arguments = Namespace(
        train_data=str(shards / "{00000000..00000005}.tar"),
        train_num_samples=None,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=10,
        workers=workers,
        world_size=1,
    )
    captions = []

    def tokenizer(text):
        return torch.tensor([[*text.encode().ljust(40)]])

    info = data.get_wds_dataset(
        arguments, lambda image: pil_to_tensor(image.convert("RGB")), is_train=True, tokenizer=tokenizer
    )
    assert info.dataloader.num_samples == 280
    for images, texts in info.dataloader:
        assert images.shape == (10, 3, 8, 8)
        captions += [bytes(row.tolist()).rstrip() for row in texts]
    expected = Counter()
    for row, copies in zip(sources_of(thrice.catalog), thrice.draw(0).tolist(), strict=True):
        expected[row["members"]["txt"].rstrip()] += copies
    if workers == 0:  # with more, webdataset's workers begin their shards anew to fill the last batch
        assert Counter(captions) == +expected
    assert len(captions) == 280 and set(captions) <= set(+expected)


def test_parquet_by_pyarrows_dataset(thrice, tmp_path, sources_of):
    export(thrice, "parquet", tmp_path / "drawn.parquet")
    sources = sources_of(thrice.catalog)
    table = ds.dataset(tmp_path / "drawn.parquet").to_table(columns=["uid", "copies"])
    assert dict(zip(*table.to_pydict().values(), strict=True)) == drawn(thrice, sources)
    often = ds.dataset(tmp_path / "drawn.parquet").to_table(filter=ds.field("copies") == 3)
    assert often["key"].to_pylist() == [row["key"] for row, n in zip(sources, thrice.draw(0), strict=True) if n == 3]


def read_by_datasets(files, cache):
    """The rows of Parquet files as `datasets` gives them, map-style and as a stream, both the same."""
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    whole = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(cache))
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    rows = whole.to_list()
    assert rows == list(stream)
    return rows


def test_each_export_with_parquet_files_by_datasets(thrice, shards, tmp_path, sources_of):
    sources = sources_of(thrice.catalog)
    export(thrice, "parquet", tmp_path / "drawn.parquet")
    rows = read_by_datasets(str(tmp_path / "drawn.parquet"), tmp_path / "cache")
    assert rows == pq.read_table(tmp_path / "drawn.parquet").to_pylist()
    assert {row["uid"]: row["copies"] for row in rows if row["copies"]} == drawn(thrice, sources)
    rows = read_by_datasets(str(shards / "*.parquet"), tmp_path / "cache")
    assert Counter(row["uid"] for row in rows) == drawn(thrice, sources)


@pytest.fixture
def repeating(small_catalog, plain_seeding):
    """A plan with 0, 1, 2 and 3 copies of samples, whose keys are unique."""
    with plain_seeding(12):
        cluster(small_catalog, ClusterRequest(k=12))
    return make_plan(small_catalog, "p", PlanRequest("flat", keep=0.8, max_repeats=3))


def test_keys_and_rates_by_the_standard_library(repeating, tmp_path):
    export(repeating, "keys", tmp_path / "keys.txt", epoch=2)
    export(repeating, "rates-json", tmp_path / "rates.json")
    with open(tmp_path / "keys.txt", encoding="utf-8") as stream:  # noqa: PTH123
        copies = Counter(line.rstrip("\n") for line in stream)
    assert [copies[f"{row:06d}"] for row in range(600)] == repeating.draw(2).tolist()
    assert max(copies.values()) == 3
    with open(tmp_path / "rates.json", encoding="utf-8") as stream:  # noqa: PTH123
        rates = json.load(stream)
    assert [rates[f"{row:06d}"] for row in range(600)] == repeating.rate(slice(None)).tolist()


def test_datacomp_subset_as_datacomps_resharder_read_it(repeating, tmp_path, monkeypatch):
    """The golden file holds what resharder.py of mlfoundations/datacomp, commit 4a8df1992566ef8334773f7152e1855b1f716162, made of it.

    Run once (webdataset 0.2.31, NumPy 1.23.4, as its requirements pin): `resharder.py -i POOL -o OUTPUT -s SUBSET -j 2`, where SUBSET is
    the file that this test exports, and POOL an export to shards of all 600 samples. It wrote 480 samples as UID-0, UID-1, …
    """
    # The uids of this pool are hashes, which only its export to shards holds.
    monkeypatch.setattr(files, "_given_uids", lambda epoch, part: epoch.part(part, ["uid"]))
    monkeypatch.setattr(files, "BUCKET_ROWS", 40)
    write_datacomp(repeating, 2, tmp_path / "subset.npy", Context())
    golden = json.loads(GOLDEN.read_text())
    assert hashlib.sha256((tmp_path / "subset.npy").read_bytes()).hexdigest() == golden["file_sha256"]
    read = {uid: int(copies) for copies, uids in golden["uids_by_copies"].items() for uid in uids}
    catalog = repeating.catalog
    uids = [uid.hex() for part in catalog.parts() for uid in catalog.samples(part, ["uid"]).column(0).to_pylist()]
    copies = repeating.draw(2)
    assert read == {uid: int(n) for uid, n in zip(uids, copies, strict=True) if n}
    assert sum(read.values()) == golden["samples_written"] == 480
    assert set(read.values()) == {1, 2, 3}


@pytest.mark.shared_data
def test_real_pictures(shared_data, tmp_path, make_vectors):
    """DynamiCS-like rates over real JPEGs: what webdataset gives is byte for byte in the source's tars."""
    wds = pytest.importorskip("webdataset")
    pool = shared_data / "tinyimagenet-lt"
    catalog = import_pool([str(pool / "train" / "{00000..00001}.tar")], tmp_path / "catalog", workers=2).catalog
    plan = make_plan(catalog, "p", PlanRequest("random", keep=0.3))
    export(plan, "shards", tmp_path / "out", epoch=1, request=ExportRequest(500, workers=2))
    assert isinstance(catalog, Catalog)
    source = {
        sample["__key__"]: (sample["jpg"], sample["txt"])
        for sample in wds.WebDataset(str(pool / "train" / "{00000..00001}.tar"), shardshuffle=False)
    }
    tars = len(list((tmp_path / "out").glob("*.tar")))
    read = list(wds.WebDataset(str(tmp_path / "out" / f"{{00000000..{tars - 1:08d}}}.tar"), shardshuffle=False))
    keys = [json.loads(sample["json"])["source_key"] for sample in read]
    for sample, key in zip(read, keys, strict=True):
        assert (sample["jpg"], sample["txt"]) == source[key]
    rows = {key: row for row, key in enumerate(source)}
    order = np.array([rows[key] for key in keys])
    assert sorted(order) == np.flatnonzero(plan.draw(1)).tolist()
    assert abs(np.corrcoef(np.arange(len(order)), order)[0, 1]) < 4 / np.sqrt(len(order))
    table = pq.read_table(tmp_path / "out" / "00000000.parquet")
    assert table["caption"].to_pylist() == [source[key][1].decode() for key in table["source_key"].to_pylist()]
