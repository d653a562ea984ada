"""`tailwise run bootstrap`: a pool without embeddings, its own encoder trained on it; killed, and gone on with."""

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from tailwise.catalog import Catalog
from tailwise.cli import app
from tailwise.demo.pool import make_pool
from tailwise.plan.plan import Plan

pytest.importorskip("open_clip_train.main", reason="open_clip's trainer isn't installed")


@pytest.fixture
def command(tmp_path):
    """The recipe on 240 drawings, with a training of eight steps and a checkpoint after each."""
    make_pool(tmp_path / "pool", images=240, concepts=8, shards=3, size_px=32)
    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    arguments = {"model": "local-dir:{folder}/model", "device": "cpu", "precision": "fp32", "workers": 0, "warmup": 2}
    training = {
        **dict.fromkeys(("name", "about", "source", "command", "plan"), "tiny"),
        "expect": {},
        "phases": [{"epochs": 1, "checkpoint_every": 1, "global_batch": 32, "open_clip": arguments}],
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(training))
    changes = [f"train.recipe={tmp_path / 'tiny.yaml'}", "train.samples-seen=256"]
    changes += ["cluster:fine.clusters=30", "cluster:main.clusters=20", "plan:epochs.keep=0.05"]
    words = ["run", "bootstrap", str(tmp_path / "pool"), str(tmp_path / "catalog"), "--output", str(tmp_path / "out")]
    return [*words, "--workers", "1", *(word for change in changes for word in ("--set", change))]


def tailwise(*arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (result.exception, result.output[-500:])
    return result.output


def test_a_killed_bootstrap_goes_on_and_a_repeated_one_does_nothing(
    fork_python, command, tmp_path, tree_bytes, wait_until
):
    run = tmp_path / "out" / "bootstrap-clip"
    process = fork_python("from tailwise.cli import main; main()", *command, out=tmp_path / "log")
    wait_until((run / "checkpoints" / "epoch_latest.pt").exists, process.is_alive, tmp_path / "log")
    process.kill()
    process.join()
    catalog = tmp_path / "catalog"
    assert not (catalog / "embeddings" / "image").exists()
    assert "is there  tailwise train" not in (planned := tailwise(*command, "--dry-run"))
    assert planned.count(" is there ") == 2

    threads, level = torch.get_num_threads(), logging.root.level
    torch.set_num_threads(1)
    tailwise(*command)
    torch.set_num_threads(threads)
    assert logging.root.level == level
    begun = [int(number) for number in re.findall(r"Start epoch (\d+)", (run / "out.log").read_text())]
    assert sorted(set(begun)) == list(range(8))
    assert begun.count(0) == 1
    opened = Catalog.open(catalog)
    (part,) = opened.parts()
    for column in ("image", "text"):
        rows = np.load(opened.embedding_folder(column) / f"{part.name}.npy").astype(np.float32)
        assert rows.shape == (240, 16)
        assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3)
    assert Plan(opened, "uniform").rate(slice(0, 240)).tolist() == [1.0] * 240
    rates = json.loads((tmp_path / "out" / "rates.json").read_text())
    assert sum(rates.values()) == pytest.approx(Plan(opened, "epochs").draw(0).sum(), abs=1)

    before, trained = tree_bytes(catalog), _times(run / "checkpoints")
    assert tailwise(*command, "--dry-run").count(" is there ") == 9
    told = tailwise(*command)
    assert "nothing left to train" in told
    assert "done already" in told
    assert tree_bytes(catalog) == before
    assert _times(run / "checkpoints") == trained


def _times(folder: Path):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
