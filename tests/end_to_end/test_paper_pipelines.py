"""The pipelines of the papers, run on small pools: SemDeDup drops what its published code drops, DBP draws the share that is stated."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from tailwise.catalog import Catalog
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.drops import DropList
from tailwise.catalog.embeddings import column_names
from tailwise.plan.plan import Plan


def published_semdedup(catalog, epsilon):
    """Rows that SemDeDup's published code drops: in each cluster, farthest first, the greatest cosine to any earlier one is above 1 − ε."""
    x, labels, similarity = unit_rows(catalog), *(column(catalog, kind, "fine") for kind in ("label", "similarity"))
    dropped = []
    for cluster in np.unique(labels[labels >= 0]):
        members = np.flatnonzero(labels == cluster)
        members = members[np.lexsort((members, similarity[members]))]
        cosines = np.triu(x[members] @ x[members].T, k=1)
        dropped += members[cosines.max(axis=0) > 1 - epsilon].tolist()
    return sorted(dropped)


def column(catalog, kind, name):
    return np.concatenate(list(Clustering.open(catalog, name).parts(kind)))


def unit_rows(catalog, name="image"):
    rows = np.concatenate(catalog.embedding_parts(name, catalog.snapshot())).astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_dbp_laion(run_tailwise, _small_catalog_source, tmp_path):
    folder, out = tmp_path / "catalog", tmp_path / "out"
    sources = [_small_catalog_source / "pool", _small_catalog_source / "embeddings"]
    changes = ["cluster:fine.k=20", "cluster:main.k=8", "dedup.target-share=0.6", "plan.keep=0.2"]
    run_tailwise(
        "run", "dbp-laion", *sources, folder, "--output", out, *(x for each in changes for x in ("--set", each))
    )
    catalog = Catalog.open(folder)
    dropped = np.flatnonzero(DropList(catalog, "duplicates").mask[:])
    expected = published_semdedup(catalog, DropList(catalog, "duplicates").summary["epsilon"])
    assert len(dropped) == 0.4 * 600
    assert dropped.tolist() == expected
    drawn = np.flatnonzero(Plan(catalog, "subset").draw(0))
    assert len(drawn) == 0.2 * 600  # of the whole pool, duplicates included
    assert not set(drawn) & set(expected)
    assert pq.read_metadata(out / "subset.parquet").num_rows == 120


def test_dbp_datacomp_medium(run_tailwise, tmp_path, make_metadata, make_tar, make_image):
    """Near-duplicates by the metadata's CLIP embeddings, clusters by another encoder's, from the images (here `pixels`)."""
    random = np.random.default_rng(5)
    uids = [f"{number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}" for number in range(1, 241)]
    for shard in range(3):
        members = []
        for number, uid in enumerate(uids[shard * 80 : shard * 80 + 80]):
            key = f"{shard}{number:04d}"
            told = json.dumps({"uid": uid, "key": key, "width": 16, "height": 16}).encode()
            image = make_image(shard * 80 + number, side=16)
            members += [(f"{key}.jpg", image), (f"{key}.txt", b"caption"), (f"{key}.json", told)]
        make_tar(tmp_path / "shards" / f"{shard}.tar", members)
    vectors = random.normal(size=(240, 8))
    vectors[200:] = vectors[:40] + random.normal(scale=1e-3, size=(40, 8))
    arrays = {name: vectors.astype(np.float16) for name in ("l14_img", "l14_txt", "b32_img", "b32_txt")}
    scores = random.permutation(240).astype(np.float32)
    make_metadata(tmp_path / "metadata", "x", uids, arrays, clip_l14_similarity_score=scores)
    folder, out = tmp_path / "catalog", tmp_path / "out"
    changes = ["cluster:fine.k=6", "cluster:main.k=4", "embed.encoder=pixels"]
    command = ["run", "dbp-datacomp-medium", tmp_path / "shards", tmp_path / "metadata", folder, "--output", out]
    run_tailwise(*command, "--workers", 1, *(word for each in changes for word in ("--set", each)))
    catalog = Catalog.open(folder)
    assert {"image", "dino"} <= set(column_names(catalog))
    expected = published_semdedup(catalog, DropList(catalog, "duplicates").summary["epsilon"])
    assert np.flatnonzero(DropList(catalog, "duplicates").mask[:]).tolist() == expected
    assert 0.2 * 240 - 2 < len(expected) <= 0.2 * 240
    kept = sorted(set(range(240)) - set(expected), key=lambda row: -scores[row])[: round(0.3 * 240)]
    assert np.flatnonzero(column(catalog, "label", "main") >= 0).tolist() == sorted(kept)
    assert Clustering.open(catalog, "main").centroids.shape[1] == unit_rows(catalog, "dino").shape[1] != 8
    drawn = np.flatnonzero(Plan(catalog, "subset").draw(0))
    assert len(drawn) == 0.15 * 240
    assert set(drawn) <= set(kept)
    assert len(np.load(out / "subset.npy")) == 36


def tiny_clip(folder):
    """A small CLIP of open_clip with random weights: the name of the encoder."""
    open_clip, torch = (
        pytest.importorskip("open_clip", reason="open_clip isn't installed"),
        pytest.importorskip("torch"),
    )
    folder.mkdir()
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    model = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(model))
    torch.manual_seed(0)
    made = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    torch.save(made.state_dict(), folder / "open_clip_pytorch_model.bin")
    return f"open_clip:local-dir:{folder}"


def test_dbp_images(run_tailwise, tmp_path, make_tar, make_image):
    """One catalog: CLIP's columns for near-duplicates and the filter, another encoder's for the clusters; nothing but tars is given."""
    for shard in range(3):
        members = []
        for number in range(80):
            key = f"{shard}{number:04d}"
            image = make_image(shard * 80 + number if number < 60 else number, side=16)  # 40 copies across shards
            members += [(f"{key}.jpg", image), (f"{key}.txt", f"a photo of {number * 7919 % 97}".encode())]
        make_tar(tmp_path / "shards" / f"{shard}.tar", members)
    folder, out = tmp_path / "catalog", tmp_path / "out"
    changes = ["cluster:fine.k=6", "cluster:main.k=4", "embed:dino.encoder=pixels", "embed:both.precision=fp32"]
    changes.append(f"embed:both.encoder={tiny_clip(tmp_path / 'clip')}")
    command = ["run", "dbp-images", tmp_path / "shards", folder, "--output", out, "--workers", 1]
    run_tailwise(*command, *(word for each in changes for word in ("--set", each)))
    catalog = Catalog.open(folder)
    assert column_names(catalog) == ["dino", "image", "text"]
    expected = published_semdedup(catalog, DropList(catalog, "duplicates").summary["epsilon"])
    assert np.flatnonzero(DropList(catalog, "duplicates").mask[:]).tolist() == expected
    assert 40 <= len(expected) <= 48
    scores = (unit_rows(catalog, "image") * unit_rows(catalog, "text")).sum(axis=1)
    kept = sorted(set(range(240)) - set(expected), key=lambda row: -scores[row])[:72]
    clustered = np.flatnonzero(column(catalog, "label", "main") >= 0)
    assert len(clustered) == 72
    assert len(set(clustered) & set(kept)) >= 71  # scores are float32: two may be equal
    assert Clustering.open(catalog, "main").centroids.shape[1] == unit_rows(catalog, "dino").shape[1] != 24
    drawn = np.flatnonzero(Plan(catalog, "subset").draw(0))
    assert len(drawn) == 36
    assert set(drawn) <= set(clustered)
    assert pq.read_metadata(out / "subset.parquet").num_rows == 36
