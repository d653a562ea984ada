"""OpenVINO's rows are those of torch, within bounds; a column is one backend's; nothing is told to OpenVINO's maker."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tailwise.encoders import load_encoder
from tailwise.encoders.backends import has_native_bf16
from tailwise.errors import UserError
from tailwise.requests import EmbedRequest, EncoderRequest
from tailwise.steps.embedding.embed import embed
from tailwise.steps.importing.pool import import_pool

CPU = torch.device("cpu")
NATIVE = pytest.mark.skipif(not has_native_bf16(CPU), reason="this processor has no products of bf16")
BOUNDS = {"fp32": 1e-5, "bf16": 0.05}  # of a component of unit rows


def picture(seed):
    random = np.random.default_rng(seed)
    stream = io.BytesIO()
    small = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    small.resize((60, 44), Image.Resampling.BICUBIC).save(stream, "PNG")
    return stream.getvalue()


IMAGES = [picture(seed) for seed in range(7)]


@pytest.fixture(params=["lite0", "open_clip", "dinov2", "dinov3", "siglip", "clip"])
def name(request, clip_folder, dino_folders, siglip_folders):
    folders = {**dino_folders, **siglip_folders}
    named = {"lite0": "lite0", "open_clip": f"open_clip:local-dir:{clip_folder}"}
    return named.get(request.param) or f"transformers:{folders[request.param]}"


def unit_rows(encoder, items, column="image"):
    return torch.nn.functional.normalize(encoder.embed(column, encoder.sides[column].prepare(items).tensors).double())


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=NATIVE)])
def test_rows_are_those_of_torch_whatever_the_batch(name, precision):
    by_torch = load_encoder(name, EncoderRequest(precision="fp32", backend="torch"), CPU)
    encoder = load_encoder(name, EncoderRequest(precision=precision, backend="openvino"), CPU)
    expected = unit_rows(by_torch, IMAGES)
    assert (expected @ expected.T - torch.eye(len(expected))).max() < 0.999  # else what follows says nothing
    for count in (1, 2, 7):
        assert (unit_rows(encoder, IMAGES[:count]) - expected[:count]).abs().max() < BOUNDS[precision]
    assert encoder.identity == by_torch.identity
    assert encoder.precision == precision
    assert {column: side.backend for column, side in encoder.sides.items()} == {
        **dict.fromkeys(by_torch.sides, "torch"),
        "image": "openvino",
    }
    assert "openvino" in encoder.packages


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=NATIVE)])
def test_captions_stay_with_torch(clip_folder, precision):
    spelt, captions = f"open_clip:local-dir:{clip_folder}", ["a photo of a cat", "a dog", "red"]
    by_torch, encoder = (
        load_encoder(spelt, EncoderRequest(precision=precision, backend=backend), CPU)
        for backend in ("torch", "openvino")
    )
    assert torch.equal(unit_rows(encoder, captions, "text"), unit_rows(by_torch, captions, "text"))


@pytest.fixture
def make_catalog(tmp_path, make_tar):
    """`make_catalog(name)` → a catalog of its own, of the same two shards."""
    for shard in range(2):
        keys = range(shard * 10, shard * 10 + 10)
        members = [
            member for key in keys for member in ((f"{key:03d}.png", picture(key)), (f"{key:03d}.txt", b"a photo"))
        ]
        make_tar(tmp_path / "pool" / f"{shard}.tar", members)
    return lambda name: import_pool([str(tmp_path / "pool")], tmp_path / name, workers=1, part_rows=10).catalog


def by(backend, column="image"):
    return EmbedRequest(encoder="", column=column, precision="fp32", backend=backend, batch_size=4)


def test_workers_change_nothing(make_catalog, tree_bytes):
    alone, several = make_catalog("alone"), make_catalog("several")
    for catalog, workers in ((alone, 1), (several, 2)):
        assert (
            embed(catalog, replace(by("openvino"), encoder="lite0", workers=workers)).columns[0].backend == "openvino"
        )
    assert tree_bytes(alone.folder / "embeddings") == tree_bytes(several.folder / "embeddings")


def test_a_column_is_of_one_backend_which_auto_goes_on_with(make_catalog, clip_folder, tmp_path, make_pool):
    name = f"open_clip:local-dir:{clip_folder}"
    auto = EmbedRequest(encoder="", column="both", precision="fp32", batch_size=4)
    for first, other in (("openvino", "torch"), ("torch", "openvino")):
        catalog = make_catalog(first)
        embed(catalog, replace(by(first, "both"), encoder=name, workers=1))
        said = json.loads((catalog.embedding_folder("image") / "column.json").read_text())
        assert said["settings"]["backend"] == first
        assert ("openvino" in said["versions"]) == (first == "openvino")
        with pytest.raises(UserError, match=rf"\(backend {first}, not {other}\): encoders can't be mixed"):
            embed(catalog, replace(by(other), encoder=name, workers=1))
        make_pool(tmp_path / f"more-{first}", [4], first_shard=8)
        import_pool([str(tmp_path / f"more-{first}")], catalog.folder, workers=1)
        assert [made.backend for made in embed(catalog, replace(auto, encoder=name, workers=1)).columns] == [
            first,
            "torch",
        ]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lite0", {"backend": "tpu"}, "`backend` 'tpu': use auto, torch, openvino"),
        ("lite0", {"backend": "openvino", "device": "cuda"}, "`backend` openvino is for CPUs"),
        ("pixels", {"backend": "openvino"}, "`backend` openvino does nothing with pixels"),
    ],
)
def test_mistakes(name, options, message):
    with pytest.raises(UserError, match=message):
        load_encoder(name, EncoderRequest(**options), torch.device(options.get("device", "cpu")))


def test_captions_need_no_backend(make_catalog, clip_folder):
    with pytest.raises(UserError, match="`backend` openvino is for images"):
        embed(
            make_catalog("c"), replace(by("openvino", "text"), encoder=f"open_clip:local-dir:{clip_folder}", workers=1)
        )


def test_openvino_that_is_not_installed(uninstalled, clip_folder):
    with uninstalled("openvino"):
        with pytest.raises(UserError, match=r"`backend` openvino needs openvino: pip install .*openvino>="):
            load_encoder("lite0", EncoderRequest(backend="openvino"), CPU)
        encoder = load_encoder(f"open_clip:local-dir:{clip_folder}", EncoderRequest(), CPU)
    assert encoder.sides["image"].backend == "torch"
    assert "openvino" not in encoder.packages


@pytest.mark.skipif(has_native_bf16(CPU), reason="this processor has products of bf16")
def test_bf16_is_torchs_where_openvino_would_compute_in_fp32(clip_folder):
    name = f"open_clip:local-dir:{clip_folder}"
    with pytest.raises(UserError, match=r"in bf16 .on this processor it would compute in f32.: use `backend` torch"):
        load_encoder(name, EncoderRequest(precision="bf16", backend="openvino"), CPU)
    encoder = load_encoder(name, EncoderRequest(precision="bf16"), CPU)
    assert (encoder.sides["image"].backend, encoder.precision) == ("torch", "bf16")


@pytest.mark.parametrize("wrong", ["rows", "batch"])
def test_a_wrong_conversion_is_refused_or_left_to_torch(caplog, monkeypatch, clip_folder, wrong):
    """Other rows, as of a network whose tracing went wrong; or a number of images that became constant."""
    import openvino

    run, name = openvino.CompiledModel.__call__, f"open_clip:local-dir:{clip_folder}"

    def changed(self, values):
        rows = run(self, values)[0]
        return [rows + 0.01 * np.linalg.norm(rows) if wrong == "rows" else rows[:2]]

    monkeypatch.setattr(openvino.CompiledModel, "__call__", changed)
    with pytest.raises(UserError, match=r"OpenVINO can't run open_clip:.* in fp32 \(.*\): use `backend` torch"):
        load_encoder(name, EncoderRequest(precision="fp32", backend="openvino"), CPU)
    assert not caplog.text
    encoder = load_encoder(name, EncoderRequest(precision="fp32"), CPU)
    assert "OpenVINO can't run open_clip" in caplog.text
    assert encoder.sides["image"].backend == "torch"
    assert "openvino" not in encoder.packages
    expected = load_encoder(name, EncoderRequest(precision="fp32", backend="torch"), CPU)
    for column, items in {"image": IMAGES, "text": ["a photo of a cat", "a dog"]}.items():
        assert torch.equal(unit_rows(encoder, items, column), unit_rows(expected, items, column))


OPENVINO = """
import faulthandler, os, signal, sys, torch
from tailwise.encoders import EncoderRequest, load_encoder

def load():
    return load_encoder("open_clip:local-dir:" + sys.argv[1], EncoderRequest(backend="openvino"), torch.device("cpu"))

faulthandler.enable()
signal.signal(signal.SIGUSR1, lambda *_: print("survived"))
assert "openvino" not in sys.modules
first = load()
assert "openvino" in sys.modules
print([name for name in sys.modules if name.startswith("openvino_telemetry.")], flush=True)
second = load()
del first
del second
os.kill(os.getpid(), signal.SIGUSR1)
"""


@pytest.fixture(scope="module")
def openvino_process(fork_python, clip_folder, tmp_path_factory):
    """Its output, exit code and home."""
    home = tmp_path_factory.mktemp("home")
    process = fork_python(OPENVINO, clip_folder, out=home / "out", err=home / "err", HOME=str(home), CI=None)
    process.join(200)
    return (home / "out").read_text().splitlines(), process.exitcode, home


def test_nothing_is_told_to_openvinos_maker(openvino_process):
    told, _, home = openvino_process
    assert told[0] == "[]"
    assert not (home / "intel").exists()  # where the package that tells keeps its number


def test_signals_are_safe_after_networks_that_are_freed_in_the_order_of_their_making(openvino_process):
    """OpenVINO gives the thread that makes a network a stack for signals, and gives back the one before, freed or not."""
    told, code, _ = openvino_process
    assert (told[1:], code) == (["survived"], 0)
