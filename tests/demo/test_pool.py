import hashlib
import io
import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tailwise.demo.pool import (
    CONCEPTS_LIMIT,
    TEMPLATES,
    _looks,
    concept_counts,
    concept_name,
    draw_image,
    make_pool,
    make_test_set,
)
from tailwise.evaluate.sets import find_set

SMALL = {"images": 40, "concepts": 8, "shards": 3, "size_px": 16}


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def members(tar_path: Path) -> dict[str, bytes]:
    with tarfile.open(tar_path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


@given(concepts=st.integers(1, 100), per_concept=st.integers(1, 40), more=st.integers(0, 99))
@settings(deadline=None)
def test_counts_sum_to_images_and_never_increase(concepts, per_concept, more):
    counts = concept_counts(concepts * per_concept + more, concepts)
    assert len(counts) == concepts
    assert sum(counts) == concepts * per_concept + more
    assert min(counts) >= 1
    assert counts == sorted(counts, reverse=True)


def test_counts_follow_zipf():
    counts = np.array(concept_counts(6400, 64))
    share = 1 / np.arange(1, 65)
    assert np.abs(counts - 6400 * share / share.sum()).max() <= 1
    assert counts[[0, 1, 63]].tolist() == [1349, 675, 21]


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="images is 3, but must be at least 4"):
        concept_counts(3, 4)
    with pytest.raises(ValueError, match="concepts is 0, but must be at least 1"):
        concept_counts(3, 0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": 7}, "images is 7, but must be at least 8"),
        ({"images": 1000, "concepts": 513}, "concepts is 513, but must be at most 512"),
        ({"shards": 0}, "shards is 0, but must be at least 1"),
        ({"shards": 41}, "shards is 41, but must be at most 40"),
        ({"images": 10_001, "shards": 1}, "images per shard is 10001, but must be at most 10000"),
        ({"size_px": 15}, "size_px is 15, but must be at least 16"),
        ({"duplicates": -1}, "duplicates is -1, but must be at least 0"),
    ],
)
def test_numbers_out_of_bounds_are_refused(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        make_pool(tmp_path / "pool", **SMALL | changed)
    assert not (tmp_path / "pool").exists()


def test_foreign_shards_are_refused(tmp_path):
    make_pool(tmp_path, **SMALL)
    with pytest.raises(FileExistsError, match=r"00002\.tar, not one of this pool's 2 shards"):
        make_pool(tmp_path, **SMALL | {"shards": 2})


def test_every_sample_has_image_caption_and_json(tmp_path):
    make_pool(tmp_path, **SMALL)
    truth = [line.split("\t") for line in (tmp_path / "concepts.tsv").read_text().splitlines()]
    assert truth.pop(0) == ["key", "concept", "name"]
    seen = []
    for shard in range(3):
        files = members(tmp_path / f"{shard:05d}.tar")
        keys = sorted({name.split(".")[0] for name in files})
        assert keys == [f"{shard:05d}{position:04d}" for position in range(len(keys))]
        assert list(files) == [f"{key}.{extension}" for key in keys for extension in ("jpg", "txt", "json")]
        for key in keys:
            described = json.loads(files[f"{key}.json"])
            caption = files[f"{key}.txt"].decode()
            assert described == {"key": key, "caption": caption, "width": 16, "height": 16, "status": "success"}
            image = Image.open(io.BytesIO(files[f"{key}.jpg"]))
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (16, 16))
            seen.append((key, caption))
    assert [key for key, _, _ in truth] == [key for key, _ in seen]
    assert all(name == concept_name(int(concept)) for _, concept, name in truth)
    assert all(name in caption for (_, _, name), (_, caption) in zip(truth, seen, strict=True))
    assert np.bincount([int(concept) for _, concept, _ in truth]).tolist() == concept_counts(40, 8)


def test_samples_are_spread_over_shards(tmp_path):
    make_pool(tmp_path, images=60, concepts=2, shards=2, size_px=16)
    concepts = [int(line.split("\t")[1]) for line in (tmp_path / "concepts.tsv").read_text().splitlines()[1:]]
    assert set(concepts[:30]) == set(concepts[30:]) == {0, 1}


def test_same_arguments_same_bytes(tmp_path):
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        make_pool(tmp_path / name, **SMALL, seed=seed)
    assert digests(tmp_path / "first") == digests(tmp_path / "again")
    assert not {*digests(tmp_path / "first").values()} & {*digests(tmp_path / "other").values()}


def test_tars_are_ustar_without_time_or_owner(tmp_path):
    make_pool(tmp_path, **SMALL)
    assert (tmp_path / "00000.tar").read_bytes()[257:265] == b"ustar\x0000"
    with tarfile.open(tmp_path / "00000.tar") as tar:
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in tar} == {(0, 0, 0, "")}


def test_a_sample_does_not_depend_on_the_number_of_shards(tmp_path):
    images = []
    for shards in (1, 5):
        make_pool(tmp_path / str(shards), **SMALL | {"shards": shards})
        paths = sorted((tmp_path / str(shards)).glob("*.tar"))
        images.append([data for path in paths for name, data in members(path).items() if name.endswith("jpg")])
    assert images[0] == images[1]


def test_order_and_captions_are_pinned(tmp_path):
    make_pool(tmp_path, **SMALL)
    assert concept_name(0) == "a red disc on a plain white background"
    assert concept_name(511) == "a yellow triangle on a barred cream background"
    concepts = [int(line.split("\t")[1]) for line in (tmp_path / "concepts.tsv").read_text().splitlines()[1:]]
    assert concepts[:12] == [0, 3, 0, 1, 0, 0, 1, 0, 2, 0, 2, 1]
    assert members(tmp_path / "00000.tar")["000000000.txt"].decode() == "a red disc on a plain white background"


def test_concepts_share_little():
    looks = [_looks(concept) for concept in range(CONCEPTS_LIMIT)]

    def shared(a, b):
        return sum(x == y for x, y in zip(a, b, strict=True))

    assert max(itertools.starmap(shared, itertools.combinations(looks[:64], 2))) == 1
    assert max(itertools.starmap(shared, itertools.combinations(looks, 2))) == 2
    assert max(itertools.starmap(shared, itertools.pairwise(looks))) == 0
    assert len({concept_name(concept) for concept in range(CONCEPTS_LIMIT)}) == CONCEPTS_LIMIT


@pytest.mark.parametrize("size_px", [16, 33, 64])
def test_images_of_a_concept_differ(size_px):
    random = np.random.default_rng(0)
    first, second = (np.asarray(draw_image(5, size_px, random)) for _ in range(2))
    assert first.shape == (size_px, size_px, 3)
    assert (first != second).mean() > 0.5


def pixels(jpeg):
    return np.asarray(Image.open(io.BytesIO(jpeg)), np.int16)


def test_near_duplicates_are_nearly_what_they_are_copies_of(tmp_path):
    make_pool(tmp_path, **SMALL | {"size_px": 32, "duplicates": 20})
    truth = {key: (concept, name) for key, concept, name in read_table(tmp_path / "concepts.tsv")}
    copies = dict(read_table(tmp_path / "duplicates.tsv"))
    assert len(truth) == 60
    assert len(copies) == 20
    assert not copies.keys() & set(copies.values())
    files = {name: content for path in tmp_path.glob("*.tar") for name, content in members(path).items()}
    for key, source in copies.items():
        assert truth[key] == truth[source]
        assert truth[key][1] in files[f"{key}.txt"].decode()
        own, other = (files[f"{name}.jpg"] for name in (key, source))
        assert len(own) < len(other)
        assert np.abs(pixels(own) - pixels(other)).mean() < 8
    captions = [files[f"{key}.txt"] != files[f"{source}.txt"] for key, source in copies.items()]
    assert any(captions)
    make_pool(tmp_path / "plain", **SMALL)
    assert not (tmp_path / "plain" / "duplicates.tsv").exists()


def read_table(path):
    return [line.split("\t") for line in path.read_text().splitlines()[1:]]


def test_the_test_set_is_balanced_and_not_in_the_pool(tmp_path):
    make_pool(tmp_path / "pool", **SMALL)
    make_test_set(tmp_path / "test", concepts=8, each=3, size_px=16)
    found = find_set(str(tmp_path / "test"))
    assert found.classes == tuple(concept_name(concept) for concept in range(8))
    assert [template.format(c="X") for template in found.templates] == [text.format("X") for text in TEMPLATES]
    files = members(tmp_path / "test" / "test" / "0.tar")
    labels = [int(content) for name, content in files.items() if name.endswith("cls")]
    assert np.bincount(labels).tolist() == [3] * 8
    images = {content for name, content in files.items() if name.endswith("jpg")}
    assert len(images) == 24
    pool = {content for path in (tmp_path / "pool").glob("*.tar") for content in members(path).values()}
    assert not images & pool
    make_test_set(tmp_path / "other", concepts=8, each=3, size_px=16, seed=1)
    assert not images & set(members(tmp_path / "other" / "test" / "0.tar").values())
