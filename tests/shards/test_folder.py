"""Folders of files as shards: img2dataset's `files` output."""

import json

import numpy as np
import pytest

from tailwise import EmbedRequest, Loader, PlanRequest, import_pool, make_plan
from tailwise.errors import UserError
from tailwise.steps.embedding.embed import embed
from tailwise.storage.ranged_file import FolderFile


@pytest.fixture
def folders(tmp_path, make_image):
    """Two folders as img2dataset writes them, with files of its own beside them: 20 and 15 samples, one without image."""
    for shard, size in enumerate((20, 15)):
        home = tmp_path / "out" / f"{shard:05d}"
        home.mkdir(parents=True)
        for sample in range(size):
            key = f"{shard:05d}{sample:04d}"
            if (shard, sample) != (1, 3):
                (home / f"{key}.jpg").write_bytes(make_image(int(key)))
            (home / f"{key}.txt").write_text(f"caption of {key}")
            (home / f"{key}.json").write_text(json.dumps({"key": key, "width": 8, "height": 8}))
        (tmp_path / "out" / f"{shard:05d}_stats.json").write_text("{}")
    return tmp_path / "out"


def test_from_files_to_batches_and_embeddings(folders, tmp_path, make_tar, rejected_counts):
    report = import_pool([str(folders)], tmp_path / "catalog", workers=1)
    assert report.catalog.shards()["path"].to_pylist() == [f"{folders}/0000{shard}/" for shard in (0, 1)]
    assert rejected_counts(report.catalog) == {("import", "caption without image"): 1}
    for shard in (0, 1):
        files = sorted((folders / f"{shard:05d}").iterdir())
        make_tar(tmp_path / "tars" / f"{shard:05d}.tar", [(path.name, path.read_bytes()) for path in files])
    other = import_pool([str(tmp_path / "tars")], tmp_path / "other", workers=1).catalog
    found = []
    for catalog in (report.catalog, other):
        embed(catalog, EmbedRequest(encoder="pixels", workers=1))
        loader = Loader(make_plan(catalog, "p", PlanRequest("random", keep=0.5)), batch_size=4, workers=2)
        batches = [(batch.images, batch.texts, batch.rows.tolist()) for batch in loader.epoch(0)]
        loader.close()
        found.append((batches, np.array(catalog.embedding("image", catalog.parts()[0])).tobytes()))
    assert found[0] == found[1] and len(found[0][0]) == 4


def test_what_changes_is_refused(folders, tmp_path):
    plan = make_plan(
        import_pool([str(folders)], tmp_path / "catalog", workers=1).catalog, "p", PlanRequest("random", keep=1)
    )
    (folders / "00000" / "a.jpg").write_bytes(b"new")
    with pytest.raises(UserError, match=r"1 of 2 .*00000/"):
        Loader(plan, batch_size=4)
    assert import_pool([str(folders)], tmp_path / "catalog", workers=1).changed == [f"{folders / '00000'}/"]
    (folders / "00000" / "a.jpg").unlink()
    loader = Loader(plan, batch_size=4)
    (folders / "00001" / "000010000.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="can't be read"):
        list(loader.epoch(0))


def test_bytes_beyond_the_end_are_an_error(folders):
    folder = FolderFile(f"{folders / '00001'}/")
    assert folder.read_at(0, folder.size_bytes) == folder.read()
    with pytest.raises(OSError, match="ends at byte"):
        folder.read_at(0, folder.size_bytes + 1)
