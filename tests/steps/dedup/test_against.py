"""Decontamination: a pool with planted copies of the images of evaluation sets, compared with a plain reference."""

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from tailwise.catalog.drops import DropList
from tailwise.catalog.files import read_record, write_record
from tailwise.encoders import pixels
from tailwise.errors import UserError
from tailwise.requests import DedupRequest, EmbedRequest, PlanRequest
from tailwise.steps.dedup import against
from tailwise.steps.dedup.dedup import dedup
from tailwise.steps.embedding.embed import embed
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.upkeep.excluded import write_excluded
from tailwise.steps.upkeep.why import why


def picture(seed):
    """A smooth picture, unlike all others."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 3, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((24, 32), Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


FIRST, SECOND = [100, 101, 102, 103, 104], [200, 201]  # seeds of the pictures of two sets
# Pool: row → the picture of a set that it shows, and how.
PLANTED = {
    3: (100, encoded(picture(100), "BMP")),  # the same pixels in another file
    7: (101, encoded(picture(101), "JPEG", quality=90)),
    12: (103, encoded(ImageOps.mirror(picture(103)))),
    15: (201, encoded(picture(201), "JPEG", quality=90)),
    16: (101, encoded(picture(101).resize((48, 64)))),
}
LACKING = 5  # row that cannot be decoded


def samples(images, caption=b"caption", extension="txt"):
    return [
        each
        for at, image in enumerate(images)
        for each in ((f"{at:03d}.jpg", image), (f"{at:03d}.{extension}", caption))
    ]


@pytest.fixture(scope="module")
def _pool(tmp_path_factory, make_tar):
    folder = tmp_path_factory.mktemp("pool")
    images = [PLANTED[row][1] if row in PLANTED else encoded(picture(row)) for row in range(20)]
    images[LACKING] = b"broken"
    for shard in range(2):
        make_tar(folder / "pool" / f"{shard}.tar", samples(images[10 * shard : 10 * shard + 10]))
    catalog = import_pool([str(folder / "pool")], folder / "catalog", workers=1, part_rows=12).catalog
    embed(catalog, EmbedRequest(encoder="pixels", workers=1, max_rejected=1))
    first = folder / "first"  # in clip_benchmark's layout, with a sample without image
    numbers = iter(range(3))
    for images in (FIRST[:2], FIRST[2:]):
        members = samples([encoded(picture(seed)) for seed in images], b"0", "cls")
        make_tar(first / "test" / f"{next(numbers)}.tar", [("a.cls", b"0"), *members])
    (first / "test" / "nshards.txt").write_text("2")
    for number, seed in enumerate(SECOND):  # plain files
        (folder / "second" / "deeper").mkdir(parents=True, exist_ok=True)
        (folder / "second" / "deeper" / f"{number}.png").write_bytes(encoded(picture(seed)))
    return folder


@pytest.fixture
def folder(_pool, tmp_path):
    """A folder with "catalog" (20 samples in two parts), the sets "first" and "second"."""
    shutil.copytree(_pool / "catalog", tmp_path / "catalog")
    for name in ("first", "second"):
        (tmp_path / name).symlink_to(_pool / name)
    return tmp_path


@pytest.fixture
def catalog(folder):
    from tailwise.catalog import Catalog

    return Catalog.open(folder / "catalog")


def listed(catalog, name="contaminated"):
    return {item["row"]: item for item in DropList(catalog, name).tables(slice(0, 20)).to_pylist()}


def cosines(catalog, seeds, change=lambda image: image):
    """Of each row of the pool and each picture: float64 [20, n]; 0 for rows without embedding."""
    x = np.concatenate(catalog.embedding_parts("image", catalog.snapshot())).astype(np.float64)
    y = pixels.describe([change(picture(seed)) for seed in seeds]).astype(np.float16).astype(np.float64)
    norms = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(y, axis=1)
    return np.divide(x @ y.T, norms, out=np.zeros((len(x), len(y))), where=norms > 0)


@pytest.mark.parametrize("block_bytes", [1, 1 << 28])
def test_near_duplicates_of_two_sets(folder, catalog, monkeypatch, block_bytes):
    monkeypatch.setattr(against, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(against, "CHUNK_ROWS", 7)
    sets = (str(folder / "first"), str(folder / "second"))
    similar = cosines(catalog, FIRST + SECOND)
    for number, epsilon in enumerate((0.02, 0.3)):
        made = dedup(catalog, DedupRequest(against=sets, epsilon=epsilon, name=f"list{number}"))
        found = listed(catalog, f"list{number}")
        assert set(found) == set(np.flatnonzero(similar.max(axis=1) > 1 - epsilon)) >= {3, 7, 15, 16}
        for row, item in found.items():
            nearest = int(similar[row].argmax())
            assert item["similarity"] == pytest.approx(similar[row, nearest], abs=1e-5)
            assert (item["set"], item["mirrored"], item["key"]) == (("first", "second")[nearest >= 5], False, None)
            place = (f"test/{int(nearest > 1)}.tar", nearest - 2 * (nearest > 1))
            place = place if nearest < 5 else (f"deeper/{nearest - 5}.png", 0)
            assert (item["file"].split("/", 4)[-1].endswith(place[0]), item["number"]) == (True, place[1])
        assert made.summary["sets"][0]["images"] == 5
        assert made.summary["sets"][1]["images_found"] == 1
        near = {item["epsilon"]: item["near"] for item in made.summary["epsilons"]}
        assert near[epsilon] == len(found) == made.summary["dropped_near"]


def test_identical_pixels_without_and_with_embeddings(folder, catalog):
    shutil.rmtree(catalog.embedding_folder("image"))
    made = dedup(catalog, DedupRequest(against=(str(folder / "first"),), exact="pixels"))
    assert [(row, item["reason"], item["number"]) for row, item in listed(catalog).items()] == [
        (3, "identical pixels in first", 0)
    ]
    assert made.summary["dropped_identical"] == made.summary["sets"][0]["images_found"] == 1
    embed(catalog, EmbedRequest(encoder="pixels", workers=1, max_rejected=1))
    request = DedupRequest(against=(str(folder / "first"),), exact="pixels", epsilon=0.02, mirrored=True, name="both")
    dedup(catalog, request)
    found = listed(catalog, "both")
    assert {row: (item["reason"].split(" in ")[0], item["mirrored"]) for row, item in found.items()} == {
        3: ("identical pixels", False),
        7: ("near-duplicate", False),
        12: ("identical pixels", True),
        16: ("near-duplicate", False),
    }
    assert found[12]["number"] == 1  # of the second tar, where the first sample has no image
    plan = make_plan(catalog, "p", PlanRequest("random", keep=0.5, without=["both"]))
    assert not set(np.flatnonzero(plan.draw(0))) & set(found)
    write_excluded(catalog, folder / "excluded.parquet", plan)
    rows = pq.read_table(folder / "excluded.parquet").to_pylist()
    named = {int(row["key"]): row for row in rows if row["stage"] == "dedup"}
    assert {at: (row["kept_shard"], row["kept_key"], row["similarity"]) for at, row in named.items()} == {
        row % 10: (item["file"], str(item["number"]), item["similarity"]) for row, item in found.items()
    }
    assert all(row["kept_shard"] is None for row in rows if row["stage"] != "dedup")
    told = why(catalog, "003")["samples"][0]["drop_lists"]
    assert told[0]["verdict"] == "dropped"
    assert told[0]["file"].endswith("test/0.tar")


def test_mirror_images_are_found_only_when_asked_for(folder, catalog):
    for mirrored in (False, True):
        request = DedupRequest(
            against=(str(folder / "first"),), epsilon=0.02, mirrored=mirrored, name=f"mirrored-{mirrored}"
        )
        dedup(catalog, request)
        assert (12 in listed(catalog, request.name)) == mirrored


def test_sets_of_embeddings(folder, catalog):
    """For a column whose encoder is unknown: a .npy file, or a catalog with this column, says the same as the images."""
    dedup(catalog, DedupRequest(against=(str(folder / "first"),), epsilon=0.02))
    expected = {row: item["similarity"] for row, item in listed(catalog).items()}
    record = catalog.embedding_folder("image") / "column.json"
    known = read_record(record)
    write_record(record, {**{key: known[key] for key in ("dimension", "modality")}, "encoder": "imported"})
    shutil.rmtree(catalog.folder / "neighbours")
    with pytest.raises(UserError, match=r"encoder of column 'image' is unknown.*a .npy file"):
        dedup(catalog, DedupRequest(against=(str(folder / "first"),), epsilon=0.03, name="images"))
    np.save(folder / "set.npy", 2 * pixels.describe([*map(picture, FIRST)]))
    dedup(catalog, DedupRequest(against=(str(folder / "set.npy"),), epsilon=0.02, name="vectors"))
    found = listed(catalog, "vectors")
    assert {row: item["similarity"] for row, item in found.items()} == pytest.approx(expected, abs=1e-5)
    assert (found[7]["file"], found[7]["number"]) == (str(folder / "set.npy"), 1)
    other = import_pool([str(_tar(folder))], folder / "other", workers=1).catalog
    embed(other, EmbedRequest(encoder="pixels", workers=1))
    dedup(catalog, DedupRequest(against=(str(folder / "other"),), epsilon=0.02, exact="pixels", name="catalog"))
    found = listed(catalog, "catalog")
    assert {row: item["similarity"] for row, item in found.items()} == pytest.approx({**expected, 3: 1}, abs=1e-5)
    assert (found[3]["key"], found[7]["key"]) == ("000", "001")
    for options, message in (
        ({"mirrored": True, "epsilon": 0.1}, "`mirrored` needs the images of set.npy"),
        ({"exact": "pixels"}, "`exact` needs the images of set.npy"),
    ):
        with pytest.raises(UserError, match=message):
            dedup(catalog, DedupRequest(against=(str(folder / "set.npy"),), name="x", **options))


def test_a_set_in_a_parquet_file_without_classes(folder, catalog):
    images = [{"bytes": encoded(picture(seed)), "path": None} for seed in FIRST]
    pq.write_table(pa.table({"image": images}), folder / "set.parquet")
    dedup(catalog, DedupRequest(against=(str(folder / "set.parquet"),), exact="pixels"))
    assert [(row, item["number"]) for row, item in listed(catalog).items()] == [(3, 0)]


@pytest.mark.parametrize("options", [{"exact": "pixels"}, {"epsilon": 0.02}, {"exact": "pixels", "mirrored": True}])
def test_images_of_a_set_that_cannot_be_read_are_counted(folder, catalog, options):
    images = [encoded(picture(FIRST[0])), b"broken", b"<html>"]
    (folder / "set").mkdir()
    pq.write_table(pa.table({"jpg": images}), folder / "set" / "a.parquet")
    request = DedupRequest(against=(str(folder / "set"),), **options)
    for name in ("x", "y"):  # the second reads the comparison that was kept
        made = dedup(catalog, replace(request, name=name))
        assert made.summary["set_images_not_compared"] == 2
        assert 3 in listed(catalog, name)
    (folder / "set" / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"set/b.parquet can't be read"):
        dedup(catalog, replace(request, name="z"))


def _tar(folder):
    from tarfile import TarFile, TarInfo

    path = folder / "other.tar"
    with TarFile(path, "w") as tar:
        for name, content in samples([encoded(picture(seed)) for seed in FIRST]):
            info = TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`against` needs `epsilon`"),
        ({"epsilon": 0.0}, r"`epsilon` 0.0: with `against`, it must lie between 0.0001 and 1"),
        ({"exact": "bytes"}, "with `against`, use pixels"),
        ({"epsilon": 0.1, "clustering": "fine"}, "`clustering` does nothing with `against`"),
        ({"exact": "pixels", "column": "dino"}, "`column` does nothing without `epsilon`"),
        ({"epsilon": 0.1, "column": "dino"}, "unknown column 'dino'"),
    ],
)
def test_what_is_refused(folder, catalog, options, message):
    with pytest.raises(UserError, match=message):
        dedup(catalog, DedupRequest(against=(str(folder / "first"),), **options))


def test_sets_that_are_none(folder, catalog):
    (folder / "empty").mkdir()
    for name, message in (("empty", "holds no images"), ("absent", "is no set"), ("catalog", "it is the pool itself")):
        with pytest.raises(UserError, match=message):
            dedup(catalog, DedupRequest(against=(str(folder / name),), exact="pixels"))


def test_another_encoder_than_the_columns(folder, catalog):
    record = catalog.embedding_folder("image") / "column.json"
    known = read_record(record)
    write_record(record, {**known, "settings": {**known["settings"], "preprocessing": {"size": 64}}})
    with pytest.raises(UserError, match=r"pixels has another preprocessing than when it made column 'image'"):
        dedup(catalog, DedupRequest(against=(str(folder / "first"),), epsilon=0.02))


def test_the_command_and_a_pipeline(folder, run_tailwise):
    command = ["dedup", folder / "catalog", "--against", folder / "first", "--against", folder / "second"]
    printed = run_tailwise(*command, "--epsilon", 0.02, "--exact", "pixels").stdout
    assert "drop list 'contaminated': 4 of 20 samples" in printed
    assert "dropped.parquet" in printed
    found = json.loads(run_tailwise(*command, "--epsilon", 0.02, "--exact", "pixels", "--json").stdout)
    assert found["dropped"] == 4
    recipe = (
        "name: r\nabout: a\nsteps:\n"
        f"  - dedup: {{against: [{folder / 'first'}], exact: pixels, name: clean}}\n"
        "  - plan: {name: p, method: random, keep: 0.5, without: clean}\n"
    )
    (folder / "r.yaml").write_text(recipe)
    run_tailwise("run", folder / "r.yaml", folder / "catalog")
    assert pq.read_table(folder / "catalog" / "drops" / "clean" / "dropped.parquet").num_rows == 1
