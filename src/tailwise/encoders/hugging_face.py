"""Encoders of transformers: `transformers:NAME_OR_FOLDER`.

Models with an image and a text side (CLIP, SigLIP) use their `get_image_features` and `get_text_features`. All others are vision models
(DINOv2, DINOv3, ViT), of which one token or the mean of the patches' tokens is used.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tailwise.catalog.files import digest
from tailwise.encoders.backends import lower_weights, weights_hash
from tailwise.encoders.encoder import Encoder, Side, Tensors
from tailwise.encoders.open_clip import shortened, silenced
from tailwise.encoders.prepare import CaptionPreparation, ImagePreparation
from tailwise.errors import NotFoundError, UserError
from tailwise.extras import require
from tailwise.requests import EncoderRequest
from tailwise.text import did_you_mean

POOLINGS = ("cls", "mean", "pooler")
# Vision transformers whose last hidden state starts with a CLS token, then register tokens as their configuration says, then patches.
WITH_CLS = ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit")
# Settings of an image processor that affect its results; the others are about files and libraries.
_PROCESSING = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std", "do_pad", "pad_size", "patch_size", "max_num_patches"),
)
_NO_CODE = {"trust_remote_code": False}  # Python files in a model's folder are never run
# Values of a configuration that say where it came from and how it was stored.
_NO_ARCHITECTURE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


def load(name: str, options: EncoderRequest, device: torch.device, precision: str) -> Encoder:
    """Load a model of the hub, or of a local folder that `save_pretrained` wrote."""
    spelt = f"transformers:{name}"
    if options.model is not None:
        raise UserError(f"`model` does nothing with {spelt}, which names its model")
    require("encoders", "transformers", purpose=f"`encoder` {spelt}")
    if name.startswith(("/", "./", "../")) and not Path(name).is_dir():  # names of the hub do not start so
        raise NotFoundError(f"{spelt} can't be loaded: there is no folder {name}")
    model, processor, missing, unknown = _load(spelt, name)
    both = hasattr(model, "get_image_features") and hasattr(model, "get_text_features")
    if both and options.pooling is not None:
        raise UserError(f"`pooling` does nothing with {spelt}: its model pools in its own way")
    pooling = None if both else _choose_pooling(spelt, model.config, options.pooling)
    if pooling in {"cls", "mean"}:
        missing = [key for key in missing if not key.startswith("pooler.")]  # not used here, and often not stored
    if missing:
        more = f"; the model does not know {len(unknown)} of the stored names, such as {unknown[0]}" if unknown else ""
        problem = f"no weights for {len(missing)} parameters of {type(model).__name__}, such as {missing[0]}"
        raise UserError(f"{spelt} has {problem}{more}")
    values = {key: value for key, value in model.config.to_diff_dict().items() if key not in _NO_ARCHITECTURE}
    architecture = f"{model.config.model_type} {digest(json.loads(json.dumps(values, default=str)))}"
    identity = {"model": architecture, "weights": weights_hash(model)}
    if pooling is not None:
        identity["pooling"] = pooling
    lower_weights(model, precision)
    model = model.to(device).eval()
    forward = partial(_features, model.get_image_features) if pooling is None else partial(_pooled, model, pooling)
    values = json.loads(processor.to_json_string())
    about = {key: values[key] for key in _PROCESSING if values.get(key) is not None}
    sides = {"image": Side(ImagePreparation(partial(_processed, processor)), forward, about)}
    if both:
        sides["text"] = _text_side(spelt, name, model)
    return Encoder(spelt, sides, identity, device, precision, ("transformers", "tokenizers", "torchvision"), model)


def _load(spelt: str, name: str) -> tuple[Any, Any, list[str], list[str]]:
    """Return the model (fp32, on the CPU), the image processor, parameters without stored weights, which are random, and unknown names."""
    import transformers  # noqa: PLC0415  (an extra)

    factories: Any = transformers  # some of its types are missing
    with _refusing(spelt):
        model, report = factories.AutoModel.from_pretrained(name, output_loading_info=True, **_NO_CODE)
        processor = factories.AutoImageProcessor.from_pretrained(name, **_NO_CODE)
    missing = [*map(str, report["missing_keys"]), *map(str, report.get("mismatched_keys", ()))]
    return model.float(), processor, sorted(missing), sorted(map(str, report.get("unexpected_keys", ())))


def _text_side(spelt: str, name: str, model: Any) -> Side:  # noqa: ANN401
    from transformers import AutoTokenizer  # noqa: PLC0415  (an extra)

    with _refusing(spelt):
        tokenizer = AutoTokenizer.from_pretrained(name, **_NO_CODE)
    length = int(model.config.text_config.max_position_embeddings)
    prepare, forward = partial(_tokens, tokenizer), partial(_features, model.get_text_features)
    about = {"tokenizer": type(tokenizer).__name__, "length": length}
    return Side(CaptionPreparation(prepare, "input_ids", length), forward, about)


@contextmanager
def _refusing(spelt: str) -> Iterator[None]:
    """Turn the errors of transformers about wrong names into UserErrors; hide its progress bars and warnings."""
    import transformers.utils  # noqa: PLC0415  (an extra)

    utilities: Any = transformers.utils.logging
    bars = utilities.is_progress_bar_enabled()
    utilities.disable_progress_bar()
    try:
        with silenced(logging.WARNING):
            yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError) as error:
        raise UserError(f"{spelt} can't be loaded: {shortened(error)}") from error
    finally:
        if bars:
            utilities.enable_progress_bar()


def _choose_pooling(spelt: str, config: Any, asked: str | None) -> str:  # noqa: ANN401
    if asked is not None and asked not in POOLINGS:
        raise UserError(f"`pooling` {asked!r}: {did_you_mean(asked, POOLINGS)}")
    has_cls = config.model_type in WITH_CLS
    if asked in {"cls", "mean"} and not has_cls:
        known = f"{spelt} is a {config.model_type}, of which only the pooler is known"
        raise UserError(f"`pooling` {asked}: {known}; use `pooling` pooler")
    return asked or ("cls" if has_cls else "pooler")


def _processed(processor: Any, images: Sequence[Image.Image]) -> Tensors:  # noqa: ANN401
    return dict(processor(images=list(images), return_tensors="pt"))


def _tokens(tokenizer: Any, captions: list[str], length: int) -> Tensors:  # noqa: ANN401
    # Padded to the full length: SigLIP was trained so, and with CLIP's mask padding changes nothing.
    return dict(tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt"))


def _features(features: Callable[..., Any], tensors: Tensors) -> Tensor:
    """Return the rows of `get_image_features` or `get_text_features`."""
    found = features(**tensors)
    rows: Tensor = found if isinstance(found, Tensor) else found.pooler_output  # transformers 4, and 5
    return rows


def _pooled(model: Any, pooling: str, tensors: Tensors) -> Tensor:  # noqa: ANN401
    """Return a vision model's tokens, pooled to one row per image."""
    found = model(**tensors)
    registers = int(getattr(model.config, "num_register_tokens", 0) or 0)
    if pooling == "mean":
        rows: Tensor = found.last_hidden_state[:, 1 + registers :].mean(dim=1)
    else:
        rows = found.pooler_output.flatten(1) if pooling == "pooler" else found.last_hidden_state[:, 0]
    return rows
