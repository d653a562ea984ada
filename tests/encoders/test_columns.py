"""Columns made by encoders with weights: equal to the model's own rows, repeatable, never mixed, and the same as imported ones."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tailwise.encoders import Encoder
from tailwise.errors import UserError
from tailwise.requests import EmbedRequest, ScoreRequest
from tailwise.steps.embedding import column as column_module
from tailwise.steps.embedding.embed import embed
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.scoring.scores import score_parts

SIZES = (37, 20, 9)


def fp32(column="both", batch_size=8, **others):
    return EmbedRequest(encoder="", column=column, precision="fp32", **others, batch_size=batch_size)


def picture(seed):
    random = np.random.default_rng(seed)
    stream = io.BytesIO()
    small = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    small.resize(tuple(random.integers(20, 90, 2).tolist()), Image.Resampling.NEAREST).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory, make_tar):
    """Three shards of 66 samples."""
    folder = tmp_path_factory.mktemp("columns") / "pool"
    start = 0
    for shard, size in enumerate(SIZES):
        keys = range(start, start + size)
        members = [
            member
            for key in keys
            for member in ((f"{key:04d}.png", picture(key)), (f"{key:04d}.txt", f"photo number {key}".encode()))
        ]
        make_tar(folder / f"{shard}.tar", members)
        start += size
    return folder


@pytest.fixture
def make_catalog(source, tmp_path):
    """`make_catalog(name)` → a catalog of its own: parts of 57 and 9 samples."""
    return lambda name: import_pool([str(source)], tmp_path / name, workers=1, part_rows=50).catalog


def column(catalog, name):
    return np.concatenate([catalog.embedding(name, part) for part in catalog.parts()]).astype(np.float64)


@pytest.fixture(scope="module")
def direct(clip_folder):
    """What the model gives when it is called directly: {column: float32 [66, d]}, not normalised."""
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    model.eval()
    images = torch.stack([preprocess(Image.open(io.BytesIO(picture(key))).convert("RGB")) for key in range(sum(SIZES))])
    tokens = open_clip.get_tokenizer(f"local-dir:{clip_folder}")([f"photo number {key}" for key in range(sum(SIZES))])
    with torch.no_grad():
        return {"image": model.encode_image(images).numpy(), "text": model.encode_text(tokens).numpy()}


def test_rows_are_the_models_own_whatever_the_batch(make_catalog, clip_folder, direct):
    for batch_size in (1, 7, 64):
        catalog = make_catalog(f"c{batch_size}")
        embed(catalog, replace(fp32(batch_size=batch_size), encoder=f"open_clip:local-dir:{clip_folder}", workers=1))
        for name, expected in direct.items():
            unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
            cosines = (column(catalog, name) * unit).sum(axis=1)
            np.testing.assert_allclose(cosines, 1, atol=1e-3)
            assert (unit @ unit.T - np.eye(len(unit))).max() < 0.998


def test_imported_rows_of_the_same_model_are_the_same_column(
    make_catalog, clip_folder, direct, make_embeddings, tmp_path, source
):
    made = make_catalog("made")
    embed(made, replace(fp32(batch_size=64), encoder=f"open_clip:local-dir:{clip_folder}", workers=1))
    keys = [f"{key:04d}" for key in range(sum(SIZES))]
    for name, rows in direct.items():
        make_embeddings(tmp_path / "given", dict(zip(keys, rows, strict=True)), 2, "float32", name)
        target = tmp_path / name
        imported = import_pool([str(source), str(tmp_path / "given")], target, workers=1, part_rows=50).catalog
        np.testing.assert_allclose(column(imported, name), column(made, name), atol=1e-3)  # a bit of float16
        assert imported.embedding(name, imported.parts()[0]).dtype == np.float16


def test_workers_change_nothing(make_catalog, clip_folder, tree_bytes):
    name = f"open_clip:local-dir:{clip_folder}"
    alone, several = make_catalog("alone"), make_catalog("several")
    embed(alone, replace(fp32("image"), encoder=name, workers=1))
    embed(several, replace(fp32("image"), encoder=name, workers=2))
    assert tree_bytes(alone.folder / "embeddings") == tree_bytes(several.folder / "embeddings")


def test_what_made_a_column_is_written_down_and_nothing_else_is_added(make_catalog, clip_folder, tmp_path):
    import json
    import shutil

    catalog = make_catalog("c")
    name = f"open_clip:local-dir:{clip_folder}"
    embed(catalog, replace(fp32(), encoder=name, workers=1))
    for column_name in ("image", "text"):
        said = json.loads((catalog.embedding_folder(column_name) / "column.json").read_text())
        assert (said["encoder"], said["dimension"], said["settings"]["precision"]) == (name, 24, "fp32")
        assert {"torch", "pillow", "open_clip_torch"} <= set(said["versions"])
        assert len(said["settings"]["weights"]) == 32
    moved = shutil.copytree(clip_folder, tmp_path / "moved")
    assert embed(catalog, replace(fp32(), encoder=f"open_clip:local-dir:{moved}", workers=1)).lacking == 0
    assert (
        embed(catalog, EmbedRequest(encoder=name, column="both", workers=1)).columns[0].precision == "fp32"
    )  # auto: as it was begun
    with pytest.raises(UserError, match=r"precision fp32, not bf16\): encoders can't be mixed"):
        embed(catalog, EmbedRequest(encoder=name, precision="bf16", backend="torch", workers=1))
    state = torch.load(moved / "open_clip_pytorch_model.bin")
    torch.save({**state, "visual.proj": -state["visual.proj"]}, moved / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match=r"weights \w{32}, not \w{32}\): encoders can't be mixed"):
        embed(catalog, replace(fp32(), encoder=f"open_clip:local-dir:{moved}", workers=1))
    with pytest.raises(UserError, match="encoders can't be mixed"):
        embed(catalog, EmbedRequest(encoder="pixels", workers=1))


@pytest.fixture
def other_folder(clip_folder, tmp_path):
    """The same model with other weights."""
    import shutil

    folder = shutil.copytree(clip_folder, tmp_path / "other")
    state = torch.load(folder / "open_clip_pytorch_model.bin")
    torch.save({**state, "visual.proj": -state["visual.proj"]}, folder / "open_clip_pytorch_model.bin")
    return folder


def test_columns_of_different_models_are_not_compared(make_catalog, clip_folder, other_folder, source, tmp_path):
    catalog = make_catalog("c")
    name, other = (f"open_clip:local-dir:{folder}" for folder in (clip_folder, other_folder))
    by_clip_score = (catalog, catalog.snapshot(), ScoreRequest("clip-score"))
    embed(catalog, replace(fp32("text"), encoder=other, workers=1))
    with pytest.raises(UserError, match=r"'text' holds .*encoders can't be mixed"):
        embed(catalog, replace(fp32("both"), encoder=name, workers=1))
    assert not list(catalog.embedding_folder("image").glob("part-*"))  # found before the images
    embed(catalog, replace(fp32("image"), encoder=name, workers=1))
    with pytest.raises(UserError, match=rf"images were embedded by '{name}', texts by '{other}' \(another weights\)"):
        list(score_parts(*by_clip_score))
    embed(mixed := make_catalog("mixed"), replace(fp32("image"), encoder=name, workers=1))
    embed(mixed, EmbedRequest(encoder=name, column="text", precision="bf16", backend="torch", workers=1))
    assert len(list(score_parts(mixed, mixed.snapshot(), ScoreRequest("clip-score")))) == 2


def test_a_column_goes_on_in_the_precision_it_was_begun_in(make_catalog, clip_folder, monkeypatch, interrupted):
    monkeypatch.setattr("tailwise.encoders.backends.has_native_bf16", lambda _: True)
    catalog, name = make_catalog("c"), f"open_clip:local-dir:{clip_folder}"
    with interrupted(column_module, "write_part"):
        embed(catalog, replace(fp32("image"), encoder=name, workers=1))
    report = embed(catalog, EmbedRequest(encoder=name, column="image", batch_size=8, workers=1)).columns[0]
    assert (report.precision, report.samples) == ("fp32", SIZES[2])
    assert (
        embed(make_catalog("new"), EmbedRequest(encoder=name, column="image", workers=1)).columns[0].precision == "bf16"
    )


def test_rows_that_are_no_numbers_are_rejected(make_catalog, clip_folder, tmp_path):
    import shutil

    broken = shutil.copytree(clip_folder, tmp_path / "broken")
    state = torch.load(broken / "open_clip_pytorch_model.bin")
    state["visual.proj"][:] = float("nan")
    torch.save(state, broken / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match=r"57 of 57 images .*no embedding from the encoder 57; .*0000 .*NaN or Inf"):
        embed(make_catalog("c"), replace(fp32("image"), encoder=f"open_clip:local-dir:{broken}", workers=1))


def test_memory_that_runs_out_is_the_batch_size(make_catalog, clip_folder, monkeypatch):
    def fills_the_memory(_, __, tensors):
        if len(tensors["image"]) > 1:
            raise torch.OutOfMemoryError("of 79 GiB")
        return torch.zeros(1, 24)  # what the width is found by

    monkeypatch.setattr(Encoder, "embed", fills_the_memory)
    with pytest.raises(UserError, match="a batch of 8 doesn't fit into the memory of cpu: give a smaller `batch_size`"):
        embed(make_catalog("c"), replace(fp32("image"), encoder=f"open_clip:local-dir:{clip_folder}", workers=1))


SCRIPT = """
import sys, time
from tailwise import Catalog, EmbedRequest, embed
from tailwise.steps.embedding.tasks import Finished
if __name__ == "__main__":
    folder, name, pause = sys.argv[1:]
    write = Finished.write
    def slow(self, item, *rest):
        write(self, item, *rest)
        print(item.shard, flush=True)
        time.sleep(float(pause))
    Finished.write = slow
    request = EmbedRequest(encoder=name, precision="fp32", batch_size=8, workers=1)
    print("embedded", embed(Catalog.open(folder), request).columns[0].samples)
"""


def test_a_killed_run_goes_on_at_the_shard_it_was_at(
    fork_python, make_catalog, clip_folder, tree_bytes, tmp_path, wait_until
):
    name = f"open_clip:local-dir:{clip_folder}"
    whole, broken = make_catalog("whole"), make_catalog("broken")
    embed(whole, replace(fp32("image"), encoder=name, workers=1))
    out, err = tmp_path / "out", tmp_path / "err"
    process = fork_python(SCRIPT, broken.folder, name, 1000, out=out, err=err)
    wait_until(lambda: out.read_text().endswith("\n"), process.is_alive, err)
    process.kill()
    process.join()
    assert out.read_text() == "0\n", err.read_text()  # of the first part's two shards, one is finished
    assert not list(broken.embedding_folder("image").glob("part-*"))
    report = embed(broken, replace(fp32("image"), encoder=name, workers=1))
    assert report.columns[0].samples == SIZES[1] + SIZES[2]
    assert report.embedded == sum(SIZES)
    assert tree_bytes(broken.folder / "embeddings") == tree_bytes(whole.folder / "embeddings")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices")
def test_several_gpus_share_the_shards(make_catalog, clip_folder):
    name = f"open_clip:local-dir:{clip_folder}"
    one, all_of_them = make_catalog("one"), make_catalog("all")
    embed(one, replace(fp32(device="cuda:0"), encoder=name, workers=2))
    embed(all_of_them, replace(fp32(device="cuda"), encoder=name, workers=2))
    for column_name in ("image", "text"):
        np.testing.assert_array_equal(column(one, column_name), column(all_of_them, column_name))
