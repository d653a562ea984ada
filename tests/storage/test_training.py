"""Training from a catalog in an object store: the weights are those of a local catalog, bit by bit."""

import json

import pytest
import torch

from tailwise import PlanRequest, import_pool, make_plan
from tailwise.demo.pool import make_pool

CATALOG = "s3://pool/some/catalog"


@pytest.mark.slow
def test_weights_do_not_depend_on_where_the_catalog_lies(server, tmp_path, run_tailwise):
    pytest.importorskip("open_clip_train.main", reason="open_clip's trainer isn't installed")
    make_pool(tmp_path / "pool", images=240, concepts=12, shards=2, size_px=16)
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 32, "layers": 1}
    text = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / "model").mkdir()
    config = {"model_cfg": {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}}
    (tmp_path / "model" / "open_clip_config.json").write_text(json.dumps(config))
    weights = []
    for name, catalog in (("local", tmp_path / "catalog"), ("stored", CATALOG)):
        make_plan(import_pool([tmp_path / "pool"], catalog, workers=1).catalog, "p", PlanRequest("random", keep=0.5))
        given = (
            "--model",
            f"local-dir:{tmp_path / 'model'}",
            "--batch-size",
            40,
            "--workers",
            1,
            "--logs",
            tmp_path / name,
        )
        run_tailwise("train", catalog, "p", "--epochs", 2, "--", *given, "--name", "run")
        checkpoint = tmp_path / name / "run" / "checkpoints" / "epoch_6.pt"  # of 6 segments
        weights.append(torch.load(checkpoint, weights_only=False)["state_dict"])
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
