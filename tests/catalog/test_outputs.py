"""Where commands may write: not over a catalog, a tar of its pool or somebody's file, in whatever spelling."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailwise.catalog.outputs import check_output_folder, writing_output
from tailwise.compare.study import compare
from tailwise.context import Context
from tailwise.demo.run import Tools, run_drawn
from tailwise.errors import ConflictError, UserError
from tailwise.evaluate.output import check_output as check_evaluation
from tailwise.export import EXPORTS, export
from tailwise.requests import PlanRequest
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.upkeep.excluded import write_excluded
from tailwise.storage.local import TEMPORARY_SUFFIX, replacing

WRITERS = {
    **{
        name: lambda plan, path, name=name: export(plan, name, path, epoch=0, overwrite=True)
        for name in {*EXPORTS} - {"shards", "urls", "plan-bundle"}
    },
    "removed": lambda plan, path: write_excluded(plan.catalog, path, plan, overwrite=True),
}


@pytest.fixture
def plan(make_tar, make_image, make_embeddings, make_vectors, tmp_path):
    for shard in range(2):
        members = [
            (f"{shard}{row}.{kind}", content)
            for row in range(6)
            for kind, content in (
                ("jpg", make_image()),
                ("json", json.dumps({"uid": f"{shard}{row}".rjust(32, "0")}).encode()),
                ("txt", b"caption"),
            )
        ]
        make_tar(tmp_path / "shards" / f"{shard:05d}.tar", members)
    make_embeddings(tmp_path / "emb", make_vectors([f"{shard}{row}" for shard in range(2) for row in range(6)]))
    catalog = import_pool([str(tmp_path / name) for name in ("shards", "emb")], tmp_path / "cat", workers=1).catalog
    return make_plan(catalog, "p", PlanRequest("random", keep=0.5))


def hostile_paths(folder):
    """Paths that lead to what must not be replaced."""
    tar = next((folder / "shards").glob("*.tar"))
    (folder / "to-plan").symlink_to(folder / "cat" / "plans" / "p", target_is_directory=True)
    (folder / "to-shards").symlink_to(folder / "shards", target_is_directory=True)
    (folder / "to-tar").symlink_to(tar)
    (folder / "to-manifest").symlink_to(folder / "cat" / "plans" / "p" / "manifest.json")
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "into-catalog").symlink_to(folder / "cat" / "new")
    (folder / "circle").symlink_to(folder / "circle")
    os.link(tar, folder / "hard-link")
    os.link(folder / "cat" / "shards.parquet", folder / "hard-artifact")
    (folder / "notes").write_bytes(b"mine\0")
    os.mkfifo(folder / "fifo")
    return [
        *(tar, folder / "to-shards" / tar.name, folder / "shards" / ".." / "shards" / tar.name, folder / "to-tar"),
        *(folder / "to-plan" / "groups.parquet", folder / "to-plan" / "new", folder / "to-manifest"),
        *(folder / "cat" / "x", folder / "shards" / ".." / "cat" / "plans" / "p" / "y", folder / "into-catalog"),
        *(folder / "dangling", folder / "circle", folder / "circle" / "x", folder / "hard-link"),
        *(folder / "hard-artifact", folder / "notes", folder / "fifo", folder / "shards", folder / "no" / "x"),
    ]


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_nothing_but_an_earlier_output_is_replaced(plan, tmp_path, tree_bytes, name):
    paths = hostile_paths(tmp_path)
    (tmp_path / "fifo").unlink()
    before = tree_bytes(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    for path in paths:
        with pytest.raises(UserError):
            WRITERS[name](plan, path)
    (tmp_path / "fifo").unlink()
    assert tree_bytes(tmp_path) == before
    assert not (tmp_path / "nowhere").exists()
    for made in ("new", "touched"):  # a new file, and an empty one as mktemp makes it
        (tmp_path / "touched").touch()
        WRITERS[name](plan, tmp_path / made)
    first = (tmp_path / "new").read_bytes()
    WRITERS[name](plan, tmp_path / "new")  # an earlier output
    assert (tmp_path / "new").read_bytes() == first
    assert (tmp_path / "touched").read_bytes() == first


def test_a_shard_is_known_whatever_leads_to_it(plan, tmp_path):
    tar = next((tmp_path / "shards").glob("*.tar"))
    for path in (tar, tmp_path / "shards" / "." / tar.name, Path(os.path.relpath(tar))):
        with pytest.raises(UserError, match="is a shard of the pool"):
            export(plan, "keys", path, epoch=0, overwrite=True)


def test_files_of_other_formats_are_kept(plan, tmp_path):
    np.save(tmp_path / "embeddings.npy", np.zeros((3, 4), np.float16))
    pq.write_table(pa.table({"uid": ["a"]}), tmp_path / "metadata.parquet")
    (tmp_path / "list.json").write_text("[1]")
    for name, path in (("datacomp", "embeddings.npy"), ("parquet", "metadata.parquet"), ("rates-json", "list.json")):
        before = (tmp_path / path).read_bytes()
        with pytest.raises(UserError, match="is not a file of this format"):
            export(plan, name, tmp_path / path, epoch=0, overwrite=True)
        assert (tmp_path / path).read_bytes() == before


def test_folders(plan, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "x").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to(tmp_path / "cat")
    for folder in ("cat", "cat/plans/p", "link", "link/new", "dangling", "theirs/x", "theirs"):
        with pytest.raises(UserError):
            check_output_folder(tmp_path / folder, "`output`", marks=["runs"])
    with pytest.raises(UserError, match="not a URL"):
        check_output_folder(Path("s3://bucket/report"), "`output`")
    (tmp_path / "theirs" / "runs").mkdir()
    for folder in ("theirs", "new", "new/deeper"):
        assert check_output_folder(tmp_path / folder, "`output`", marks=["runs"]) == tmp_path / folder


def test_what_a_killed_command_left_is_no_other_output(tmp_path):
    with suppress(KeyboardInterrupt), replacing(tmp_path / "summary.json", unique=True) as temporary:
        temporary.write_text("{")
        left = shutil.copy(temporary, tmp_path / "kept")
        raise KeyboardInterrupt
    Path(left).rename(temporary)
    assert check_output_folder(tmp_path, "`output`", marks=["runs"]) == tmp_path
    (tmp_path / "novel.txt").touch()
    with pytest.raises(UserError, match="holds something else"):
        check_output_folder(tmp_path, "`output`", marks=["runs"])


def test_every_command_that_writes_a_folder_checks_it(plan, tmp_path, tree_bytes):
    """Shards, evaluations, comparisons and the demo; trainings are in tests/train."""
    catalog, theirs = tmp_path / "cat", tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "summary.json").write_text("[]")
    before = tree_bytes(tmp_path)
    for folder in (catalog, catalog / "plans" / "p", theirs):
        with pytest.raises(UserError):
            export(plan, "shards", folder, epoch=0)
        with pytest.raises(UserError):
            check_evaluation(folder, {}, overwrite=True)
        with pytest.raises(UserError):
            compare(_no_recipe(), folder, None)
        with pytest.raises(UserError):
            run_drawn(folder, 1000, Tools(lambda _: "", print, Context()))
    assert tree_bytes(tmp_path) == before
    shutil.rmtree(theirs)


def _no_recipe():
    class Training:
        trainer = "in-process"

    class Recipe:
        train = Training()

    return Recipe()


def test_one_command_writes_an_output_and_takes_over_what_a_killed_one_left(small_catalog, tmp_path):
    path = tmp_path / "out.txt"
    stray = tmp_path / f"out.txt{TEMPORARY_SUFFIX}"
    stray.write_text("of a killed command")

    def writing():
        return writing_output(path, small_catalog, overwrite=False, is_ours=lambda _: True)

    with writing() as temporary:
        with pytest.raises(ConflictError, match=r"another command is writing .*out\.txt"), writing():
            pass
        temporary.write_text("ours")
    assert [item.name for item in tmp_path.glob("out*")] == ["out.txt"]
    assert path.read_text() == "ours"
    with pytest.raises(ConflictError, match="exists"), writing():
        pass
    path.unlink()
    with pytest.raises(RuntimeError, match="stop"), writing():
        raise RuntimeError("stop")
    assert not list(tmp_path.glob("out*"))
