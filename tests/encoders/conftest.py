"""Tiny models of the real classes with random weights, saved to local folders as their libraries save them."""

import importlib.util
import json
from contextlib import contextmanager

import pytest

open_clip = pytest.importorskip("open_clip", reason="open_clip isn't installed")
torch = pytest.importorskip("torch")


def _spread(model, seed):
    """Random weights large enough that different inputs have clearly different embeddings."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            if value.ndim >= 2:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.15)
            elif "logit" not in name and "bias" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A CLIP of open_clip as `open_clip:local-dir:FOLDER` has it; its preprocessing isn't the usual one."""
    folder = tmp_path_factory.mktemp("open_clip")
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    config = {
        "model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = _spread(open_clip.create_model(f"local-dir:{folder}", load_weights=False), 3)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


@pytest.fixture(scope="session")
def timm_weights(tmp_path_factory):
    """A file of random weights of timm's resnet10t, with a classifier of 7 classes."""
    timm = pytest.importorskip("timm", reason="timm isn't installed")
    path = tmp_path_factory.mktemp("timm") / "weights.pt"
    torch.save({"state_dict": _spread(timm.create_model("resnet10t", num_classes=7), 5).state_dict()}, path)
    return path


@pytest.fixture(scope="session")
def dino_folders(tmp_path_factory):
    """{name: folder} of vision models of transformers, with their processors."""
    transformers = pytest.importorskip("transformers", reason="transformers isn't installed")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    makers = {
        "dinov2": lambda: (
            transformers.Dinov2Model(transformers.Dinov2Config(image_size=28, patch_size=14, **sizes)),
            transformers.BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}),
        ),
        "dinov3": lambda: (
            transformers.DINOv3ViTModel(
                transformers.DINOv3ViTConfig(
                    image_size=32, patch_size=16, num_register_tokens=4, intermediate_size=64, **sizes
                )
            ),
            transformers.DINOv3ViTImageProcessor(size={"height": 32, "width": 32}),
        ),
    }
    folders = {}
    for seed, (name, make) in enumerate(makers.items()):
        folder = tmp_path_factory.mktemp(name)
        model, processor = make()
        _spread(model, seed).save_pretrained(folder)
        processor.save_pretrained(folder)
        folders[name] = folder
    return folders


@pytest.fixture(scope="session")
def siglip_folders(tmp_path_factory):
    """{name: folder} of models with two sides, with processors and a tokenizer of words."""
    transformers = pytest.importorskip("transformers", reason="transformers isn't installed")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "<unk>", "</s>", "a", "photo", "of", "the", "red", "blue", "cat", "dog", "caption"]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(words), "max_position_embeddings": 8, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    makers = {
        "siglip": lambda: (
            transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision)),
            transformers.SiglipImageProcessor(size={"height": 32, "width": 32}),
            ["input_ids"],
        ),
        "clip": lambda: (
            transformers.CLIPModel(
                transformers.CLIPConfig(
                    text_config={**text, "projection_dim": 20}, vision_config=vision, projection_dim=20
                )
            ),
            transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
            ["input_ids", "attention_mask"],
        ),
    }
    folders = {}
    for seed, (name, make) in enumerate(makers.items()):
        folder = tmp_path_factory.mktemp(name)
        model, processor, inputs = make()
        _spread(model, 10 + seed).save_pretrained(folder)
        processor.save_pretrained(folder)
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            unk_token="<unk>",
            eos_token="</s>",
            model_max_length=8,
            model_input_names=inputs,
        )
        fast.save_pretrained(folder)
        folders[name] = folder
    return folders


@pytest.fixture(scope="session")
def uninstalled():
    """`with uninstalled(*names):` packages of these names cannot be found."""

    @contextmanager
    def hide(*names):
        find = importlib.util.find_spec
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("importlib.util.find_spec", lambda name: None if name in names else find(name))
            yield

    return hide
