"""A CLIP of two layers with random weights, and small sets of real (if dull) images in every layout."""

import io
import json

import numpy as np
import pytest
from PIL import Image

open_clip = pytest.importorskip("open_clip", reason="open_clip isn't installed")
torch = pytest.importorskip("torch")

CLASSES = ("tabby cat", "reel", "crane", "volleyball", "stop sign", "teapot")


@pytest.fixture(scope="session")
def class_names():
    """Names of six classes."""
    return CLASSES


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """``model`` of the tiny CLIP: a folder without weights."""
    folder = tmp_path_factory.mktemp("model")
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    config = {"model_cfg": {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


@pytest.fixture(scope="session")
def tiny_weights(tiny_model):
    """The state of the tiny CLIP, drawn with a fixed seed; scaled so that it tells images apart."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = open_clip.create_model(tiny_model, load_weights=False)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        state["visual.proj"] = torch.randn_like(state["visual.proj"])
    return state


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, tiny_weights):
    """A file as open_clip's trainer writes it, from a distributed run."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    state = {f"module.{name}": value for name, value in tiny_weights.items()}
    torch.save({"epoch": 1, "name": "tiny", "state_dict": state, "optimizer": {}}, path)
    return path


def picture(seed):
    """An image of 40 × 36 pixels with a few flat areas, so that a random model sees differences."""
    random = np.random.default_rng(seed)
    pixels = np.kron(random.integers(0, 256, (5, 4, 3)), np.ones((8, 9, 1))).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="session")
def make_picture():
    """`make_picture(seed)` → the bytes of a PNG."""
    return picture


@pytest.fixture(scope="session")
def make_classification(make_tar):
    """`make_classification(folder, labels, shards=3, write=str.encode…)` writes a set in clip_benchmark's layout → folder.

    Image i is `picture(i)` of class `labels[i]`, key "s0000i", dealt out to the shards in turn.
    """

    def write(folder, labels, shards=3, label_bytes=lambda label: str(label).encode(), names=CLASSES):
        for shard in range(shards):
            members = [
                member
                for i in range(shard, len(labels), shards)
                for member in ((f"s{i:05d}.cls", label_bytes(labels[i])), (f"s{i:05d}.png", picture(i)))
            ]
            make_tar(folder / "test" / f"{shard}.tar", members)
        (folder / "test" / "nshards.txt").write_text(f"{shards}\n")
        (folder / "classnames.txt").write_text("\n".join(names) + "\n")
        (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\nart of the {c}.\n{c}\n")
        (folder / "dataset_type.txt").write_text("classification\n")
        return folder

    return write


@pytest.fixture(scope="session")
def make_retrieval(make_tar):
    """`make_retrieval(folder, texts)` writes a retrieval set of two shards: image i has the texts `texts[i]` → folder."""

    def write(folder, texts):
        for shard in range(2):
            members = [
                member
                for i in range(shard, len(texts), 2)
                for member in ((f"{i:04d}.png", picture(i)), (f"{i:04d}.txt", "\n".join(texts[i]).encode()))
            ]
            make_tar(folder / "test" / f"{shard}.tar", members)
        (folder / "test" / "nshards.txt").write_text("2")
        (folder / "dataset_type.txt").write_text("retrieval")
        return folder

    return write


@pytest.fixture(scope="session")
def labels():
    """Classes of 90 images: 5 in six of them is of class 0, and class 5 has none."""
    return np.random.default_rng(3).choice(6, 90, p=[0.4, 0.2, 0.2, 0.1, 0.1, 0]).tolist()


@pytest.fixture(scope="session")
def classification_set(tmp_path_factory, make_classification, labels):
    """The set of `labels` in clip_benchmark's layout, three shards."""
    return make_classification(tmp_path_factory.mktemp("sets") / "pictures", labels)
