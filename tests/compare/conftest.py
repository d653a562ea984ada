"""A pool of drawings with a catalog, a test set of the same drawings, and models of a few thousand parameters."""

import json

import numpy as np
import pytest
import torch
import yaml

from tailwise.demo.pool import make_pool as draw_pool
from tailwise.steps.importing.pool import import_pool

pytest.importorskip("open_clip_train.main", reason="open_clip's trainer isn't installed")


@pytest.fixture(scope="module")
def one_thread():
    """torch computes in one thread, so that results can be compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def drawn_pool(tmp_path_factory):
    """Folder with `pool`, 800 drawings of 32 pixels in 4 tars, and `catalog` of it."""
    folder = tmp_path_factory.mktemp("compare")
    draw_pool(folder / "pool", images=800, concepts=16, shards=4, size_px=32)
    import_pool([str(folder / "pool")], folder / "catalog", workers=1)
    return folder


@pytest.fixture(scope="session")
def write_model(tmp_path_factory):
    """`write_model(**vision)` → the `--model` of a CLIP of 32 pixels with 2 text layers."""

    def write(**vision):
        folder = tmp_path_factory.mktemp("model")
        text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
        config = {"model_cfg": {"embed_dim": 32, "vision_cfg": {"image_size": 32, **vision}, "text_cfg": text}}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        return f"local-dir:{folder}"

    return write


@pytest.fixture(scope="session")
def small_model(write_model):
    """A ViT of 16 patches that drops half of them at random while it trains."""
    return write_model(patch_size=8, width=64, head_width=32, layers=2, patch_dropout=0.5)


@pytest.fixture(scope="session")
def image_set(tmp_path_factory, drawn_pool):
    """A folder of images by class, and how often each class is said to be trained on."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("set")
    generator = np.random.default_rng(5)
    names = ["circle", "square", "star", "cross", "ring", "wave"]
    for name in names:
        (folder / "images" / name).mkdir(parents=True)
        for number in range(6):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{number}.png")
    lines = [f"{name}\t{2**at}" for at, name in enumerate(sorted(names))]
    (folder / "counts.tsv").write_text("\n".join(["name\ttrain_count", *lines]) + "\n")
    return folder


@pytest.fixture
def make_recipe(drawn_pool, image_set, small_model, tmp_path):
    """`make_recipe(**changes)` writes a recipe of two rows and two seeds → its path."""

    def make(**changes):
        recipe = {
            "name": "tiny",
            "about": "a test",
            "catalog": str(drawn_pool / "catalog"),
            "evaluate": {
                "data": str(image_set / "images"), "train_counts": str(image_set / "counts.tsv"), "workers": 1,
                "bootstrap": 20,
            },
            "train": {"model": small_model, "samples_seen": 256, "global_batch": 32, "warmup": 2},
            "seeds": [0, 1],
            "baseline": "random dynamic",
            "rows": {
                "random static": {"method": "random", "keep": 0.2, "static": True},
                "random dynamic": {"method": "random", "keep": 0.2},
            },
            **changes,
        }  # fmt: skip
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return path

    return make
