"""Every encoder gives what its model gives when called directly, with its own preprocessing."""

import io
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from tailwise.encoders import ENCODERS, hugging_face, load_encoder, prepare
from tailwise.encoders.prepare import CaptionPreparation, ImagePreparation
from tailwise.errors import UserError
from tailwise.requests import EncoderRequest

CPU = torch.device("cpu")
FP32 = EncoderRequest(precision="fp32")
CAPTIONS = ["a photo of the red cat", "the blue dog", "a", "photo of a caption dog"]


def encoded(seed, size):
    """An image of flat areas, as PNG: nothing is lost."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.NEAREST).save(stream, "PNG")
    return stream.getvalue()


IMAGES = [encoded(seed, size) for seed, size in enumerate([(40, 36), (64, 64), (30, 90), (200, 50), (33, 47)])]
PILLOW = [Image.open(io.BytesIO(content)).convert("RGB") for content in IMAGES]


def rows(encoder, column, items):
    inputs = encoder.sides[column].prepare(items)
    assert not inputs.faults
    return encoder.embed(column, inputs.tensors)


def cosines(found, expected):
    return torch.cosine_similarity(found.double(), expected.double(), dim=1)


def assert_equal(found, expected):
    assert found.shape == expected.shape
    assert cosines(found, expected).min() > 1 - 1e-5
    others = torch.nn.functional.normalize(expected.double(), dim=1)
    assert (others @ others.T - torch.eye(len(others))).max() < 0.999  # else the above says nothing


def test_open_clip(clip_folder):
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    model.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{clip_folder}")(CAPTIONS)
    encoder = load_encoder(f"open_clip:local-dir:{clip_folder}", FP32, CPU)
    with torch.no_grad():
        assert_equal(rows(encoder, "image", IMAGES), model.encode_image(torch.stack([*map(preprocess, PILLOW)])))
        assert_equal(rows(encoder, "text", CAPTIONS), model.encode_text(tokens))
    assert encoder.sides["image"].preprocessing["mean"] == [0.5, 0.4, 0.3]
    assert encoder.sides["image"].preprocessing["interpolation"] == "bilinear"


def test_a_checkpoint_is_the_model_it_was_saved_from(clip_folder, tmp_path):
    state = torch.load(clip_folder / "open_clip_pytorch_model.bin")
    path = tmp_path / "run" / "checkpoints" / "epoch_3.pt"
    path.parent.mkdir(parents=True)
    torch.save(
        {"epoch": 3, "name": "x", "state_dict": {f"module.{name}": value for name, value in state.items()}}, path
    )
    own = load_encoder(f"open_clip:local-dir:{clip_folder}", FP32, CPU)
    told = EncoderRequest(model=f"local-dir:{clip_folder}", precision="fp32")
    for spelt in (f"checkpoint:{path}", f"checkpoint:{path.parent.parent}"):
        encoder = load_encoder(spelt, told, CPU)
        assert encoder.identity == own.identity
        assert torch.equal(rows(encoder, "image", IMAGES), rows(own, "image", IMAGES))
    with pytest.raises(UserError, match="cannot infer the model of"):
        load_encoder(f"checkpoint:{path}", FP32, CPU)
    (path.parent.parent / "params.txt").write_text(f"model: local-dir:{clip_folder}\n")
    assert load_encoder(f"checkpoint:{path.parent.parent}", FP32, CPU).identity == own.identity
    (tmp_path / "in-process").mkdir()
    path.rename(tmp_path / "in-process" / "checkpoint.pt")  # as a comparison leaves it
    assert load_encoder(f"checkpoint:{tmp_path / 'in-process'}", told, CPU).identity == own.identity


@pytest.mark.parametrize("name", ["dinov2", "dinov3"])
@pytest.mark.parametrize("pooling", [None, "cls", "mean", "pooler"])
def test_vision_models_of_transformers(dino_folders, name, pooling):
    from transformers import AutoImageProcessor, AutoModel

    folder = dino_folders[name]
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        found = model(**processor(images=PILLOW, return_tensors="pt"))
    tokens = found.last_hidden_state
    patches = tokens[:, -4:]  # 2 × 2 of them, whatever comes before
    expected = {None: tokens[:, 0], "cls": tokens[:, 0], "mean": patches.mean(dim=1), "pooler": found.pooler_output}
    encoder = load_encoder(f"transformers:{folder}", EncoderRequest(pooling=pooling, precision="fp32"), CPU)
    assert_equal(rows(encoder, "image", IMAGES), expected[pooling])
    assert encoder.identity["pooling"] == (pooling or "cls")
    assert set(encoder.sides) == {"image"}


@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_two_sided_models_of_transformers(siglip_folders, name):
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    folder = siglip_folders[name]
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)(
        CAPTIONS, padding="max_length", truncation=True, max_length=8, return_tensors="pt"
    )
    encoder = load_encoder(f"transformers:{folder}", FP32, CPU)
    with torch.no_grad():
        images = model.get_image_features(**processor(images=PILLOW, return_tensors="pt"))
        texts = model.get_text_features(**tokens)
    assert_equal(rows(encoder, "image", IMAGES), getattr(images, "pooler_output", images))
    assert_equal(rows(encoder, "text", CAPTIONS), getattr(texts, "pooler_output", texts))
    inputs = encoder.sides["text"].prepare(
        ["a photo of the red cat and the blue dog", "a photo of the red cat dog", "a"]
    )
    assert inputs.truncated == 1  # the second has eight tokens, end included: as many as the model reads


@pytest.mark.parametrize("name", ["open_clip", "siglip", "dinov3"])
def test_bf16_is_near(clip_folder, dino_folders, siglip_folders, name):
    folders = {"open_clip": f"local-dir:{clip_folder}", **siglip_folders, **dino_folders}
    spelt = f"{'open_clip' if name == 'open_clip' else 'transformers'}:{folders[name]}"
    full, half = (load_encoder(spelt, EncoderRequest(precision=precision), CPU) for precision in ("fp32", "bf16"))
    for column, items in {"image": IMAGES, "text": CAPTIONS}.items():
        if column in full.sides:
            found, expected = rows(half, column, items), rows(full, column, items)
            assert found.dtype == torch.float32
            assert cosines(found, expected).min() > 0.999
            assert not torch.equal(found, expected)
    assert full.identity == half.identity  # the hash is of the weights as they were stored


def test_the_hash_is_of_the_weights_wherever_they_lie(clip_folder, tmp_path):
    import shutil

    other = shutil.copytree(clip_folder, tmp_path / "other")
    before = load_encoder(f"open_clip:local-dir:{clip_folder}", FP32, CPU).identity
    assert load_encoder(f"open_clip:local-dir:{other}", FP32, CPU).identity == before
    state = torch.load(other / "open_clip_pytorch_model.bin")
    state["visual.proj"][0, 0] += 1e-3
    torch.save(state, other / "open_clip_pytorch_model.bin")
    after = load_encoder(f"open_clip:local-dir:{other}", FP32, CPU).identity
    assert after["weights"] != before["weights"]
    assert after["model"] == before["model"]


def test_captions_that_say_nothing_or_too_much(clip_folder):
    prepare = load_encoder(f"open_clip:local-dir:{clip_folder}", FP32, CPU).sides["text"].prepare
    inputs = prepare(["a cat", "", " \n\t", "word " * 14, "word " * 15, "\x00", "שלום", "🐈‍⬛", "word " * 1000])
    assert {at: fault.reason for at, fault in inputs.faults.items()} == dict.fromkeys((1, 2, 5), "empty caption")
    assert inputs.tensors["text"].shape == (6, 16)
    assert inputs.truncated == 2  # 14 words, begin and end fill the 16 places
    assert prepare(["", " "]).tensors == {}


@pytest.mark.parametrize("padding", ["<pad>", "</s>"])  # CLIP and SigLIP of transformers pad with what ends a caption
def test_captions_that_are_too_long_are_counted_whatever_pads_the_others(siglip_folders, padding):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(siglip_folders["siglip"], pad_token=padding)
    prepare = CaptionPreparation(partial(hugging_face._tokens, tokenizer), "input_ids", 8)
    words = ["a", "photo", "of", "the", "red", "cat", "dog", "blue"]
    inputs = prepare([" ".join(words[:count]) for count in range(9)])
    assert list(inputs.faults) == [0]
    assert inputs.truncated == 1  # seven words and their end fill the 8 places


def seen_in_batches(images):
    """Tensors that tell their images, and with how many others they were held."""
    pixels = torch.stack([torch.from_numpy(np.asarray(image.resize((4, 4)))) for image in images])
    return {"pixels": pixels, "held": torch.full((len(images),), len(images))}


def test_few_large_images_are_held_at_a_time(monkeypatch):
    items = [IMAGES[0], b"no image", *IMAGES[1:], b"", IMAGES[0]]
    whole = ImagePreparation(seen_in_batches)(items)
    assert whole.tensors["held"].tolist() == [6] * 6
    monkeypatch.setattr(prepare, "DECODED_PIXELS", 5000)  # those of IMAGES have 1,440, 4,096, 2,700, 10,000 and 1,551
    few = ImagePreparation(seen_in_batches)(items)
    assert few.tensors["held"].tolist() == [2, 2, 2, 2, 2, 2]
    assert torch.equal(few.tensors["pixels"], whole.tensors["pixels"])
    assert few.faults == whole.faults
    assert set(few.faults) == {1, 6}
    assert ImagePreparation(seen_in_batches)([b"", b"no image"]).tensors == {}


def test_a_preprocessing_that_leaves_images_of_different_sizes(dino_folders, tmp_path):
    import shutil

    from transformers import BitImageProcessor

    folder = shutil.copytree(dino_folders["dinov2"], tmp_path / "uncropped")
    BitImageProcessor(size={"shortest_edge": 28}, do_center_crop=False).save_pretrained(folder)
    prepare = load_encoder(f"transformers:{folder}", FP32, CPU).sides["image"].prepare
    assert len(prepare(IMAGES[3:4]).tensors["pixel_values"]) == 1
    with pytest.raises(UserError, match=r"takes each image, but not 5 at once .*: does it bring all to one size\?"):
        prepare(IMAGES)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clip", {}, "unknown encoder 'clip': use open_clip:MODEL/PRETRAINED"),
        ("open_clip", {}, "unknown encoder"),
        ("open_clip:", {}, "unknown encoder"),
        ("pixels:x", {}, "unknown encoder"),
        ("pixels", {"pooling": "cls"}, "`pooling` does nothing with pixels"),
        ("pixels", {"precision": "bf16"}, "pixels computes in fp32"),
        ("open_clip:ViT-B-32", {}, "give open_clip:MODEL/PRETRAINED"),
        ("open_clip:ViT-B-32/nothing", {}, "no weights 'nothing' of ViT-B-32: use one of"),
        ("open_clip:ViT-B-32/openai", {"model": "x"}, "`model` does nothing"),
        ("open_clip:ViT-B-32/openai", {"pooling": "cls"}, "`pooling` does nothing"),
        ("open_clip:ViT-B-32/openai", {"precision": "fp16"}, "fp16 is for GPUs"),
        ("open_clip:ViT-B-32/openai", {"precision": "int8"}, "`precision` 'int8': use auto, fp32"),
        ("checkpoint:/nowhere.pt", {}, "there is no /nowhere.pt"),
        ("transformers:/nowhere", {}, "transformers:/nowhere can't be loaded: there is no folder /nowhere"),
        ("transformers:{dinov2}", {"pooling": "max"}, "`pooling` 'max': use cls, mean, pooler"),
        ("transformers:{siglip}", {"pooling": "cls"}, "`pooling` does nothing"),
        ("transformers:{siglip}", {"model": "x"}, "`model` does nothing"),
    ],
)
def test_mistakes(dino_folders, siglip_folders, name, options, message):
    with pytest.raises(UserError, match=message):
        load_encoder(name.format(**dino_folders, **siglip_folders), EncoderRequest(**options), CPU)


def test_a_model_without_weights_is_refused(clip_folder, dino_folders, tmp_path):
    """Both libraries would go on with random ones."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "empty"
    folder.mkdir()
    shutil.copy(clip_folder / "open_clip_config.json", folder)
    with pytest.raises(UserError, match="could not be loaded"):
        load_encoder(f"open_clip:local-dir:{folder}", FP32, CPU)
    partial = shutil.copytree(dino_folders["dinov2"], tmp_path / "partial")
    state = load_file(partial / "model.safetensors")
    del state["encoder.layer.1.mlp.fc1.weight"]
    save_file(state, partial / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"has no weights for 1 parameters of Dinov2Model, such as encoder\.layer\.1\.mlp"
    ):
        load_encoder(f"transformers:{partial}", FP32, CPU)


def test_a_missing_library_names_its_extra(uninstalled):
    for name in ("open_clip:ViT-B-32/openai", "checkpoint:x.pt", "transformers:facebook/dinov2-base"):
        with uninstalled("open_clip", "transformers"), pytest.raises(UserError, match=r"pip install .*'transformers"):
            load_encoder(name, EncoderRequest(), CPU)


def test_the_table_lists_all_prefixes():
    assert set(ENCODERS) == {"open_clip", "transformers", "timm", "checkpoint", "lite0", "pixels"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_gpu_gives_nearly_the_same(clip_folder, precision):
    spelt = f"open_clip:local-dir:{clip_folder}"
    gpu = load_encoder(spelt, EncoderRequest(precision=precision), torch.device("cuda"))
    cpu = load_encoder(spelt, FP32, CPU)
    for column, items in {"image": IMAGES, "text": CAPTIONS}.items():
        assert cosines(rows(gpu, column, items).cpu(), rows(cpu, column, items)).min() > 0.999
