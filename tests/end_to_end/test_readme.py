"""The README: every command works as printed, top to bottom, on a new pool; and so does its Python."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from tailwise.cli import app
from tailwise.demo.pool import concept_name, make_pool
from tailwise.steps.importing.pool import import_pool

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_partition):
    """A folder with shards/, embeddings/ and concepts.txt: all that the README expects."""
    folder = tmp_path_factory.mktemp("readme")
    make_pool(folder / "shards", images=1800, concepts=64, shards=4, size_px=16, duplicates=40)
    catalog = import_pool([str(folder / "shards")], folder / "made", workers=1).catalog
    keys = [key for part in catalog.parts() for key in catalog.samples(part, ["key"]).column(0).to_pylist()]
    rows = np.random.default_rng(0).standard_normal((len(keys), 32)).astype(np.float16)
    make_partition(folder / "embeddings", 0, keys, rows)
    (folder / "concepts.txt").write_text("".join(f"{concept_name(at)}\n" for at in range(64)))
    return folder


def test_every_command_works_top_to_bottom(fork_python, place, monkeypatch):
    pytest.importorskip("open_clip_train.main", reason="open_clip's trainer isn't installed")
    monkeypatch.chdir(place)
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
    assert len(lines) > 15
    for line in lines:
        program, *words = shlex.split(line, comments=True)
        assert program == "tailwise", line
        if words[0] == "train":  # it sets up logging and signals for the whole process
            process = fork_python("from tailwise.cli import main; main()", *words, out=place / "log")
            process.join(300)
            assert process.exitcode == 0, (place / "log").read_text()[-5000:]
        else:
            app(words, standalone_mode=False)
    assert (place / "epoch-0.parquet").exists()
    the_python_runs_as_printed(fork_python, place)


def the_python_runs_as_printed(fork_python, place):
    (code,) = blocks("python")
    process = fork_python(code, out=place / "out", err=place / "err")
    process.join(300)
    assert process.exitcode == 0, (place / "err").read_text()
    first, second = (place / "out").read_text().splitlines()
    assert first == "epoch 3 has 920 samples of 1,840"
    assert second == "torch.Size([64, 3, 224, 224]) torch.Size([64, 77])"


def test_the_picture_and_all_links_exist():
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README):
        assert (Path(__file__).parents[2] / target).exists(), target
