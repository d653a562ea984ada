"""Encoders of transformers: `transformers:NAME_OR_FOLDER`.

Models with an image and a text side (CLIP, SigLIP) give what their `get_image_features` and `get_text_features` give. All others are
seen as vision models (DINOv2, DINOv3, ViT), of whose tokens one is taken, or their mean.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tailwise.catalog.files import digest
from tailwise.encoders.captions import CaptionPreparation
from tailwise.encoders.encoder import Encoder, Side, Tensors
from tailwise.encoders.images import ImagePreparation
from tailwise.encoders.precision import lower_weights, weights_hash
from tailwise.errors import NotFoundError, UserError
from tailwise.extras import require
from tailwise.requests import EncoderRequest
from tailwise.text import did_you_mean

if TYPE_CHECKING:
    from PIL import Image

POOLINGS = ("cls", "mean", "pooler")
# Vision transformers whose last hidden state begins with a CLS token, then register tokens as their configuration says, then patches.
WITH_CLS = ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit")
# What decides an image processor's work; other settings of it are about files and libraries.
_PROCESSING = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std", "do_pad", "pad_size", "patch_size", "max_num_patches"),
)
_NO_CODE = {"trust_remote_code": False}  # a folder of a model may hold Python files, which are never run
# Of a configuration: where it came from and how it was stored.
_NO_ARCHITECTURE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


def load(name: str, options: EncoderRequest, device: torch.device, precision: str) -> Encoder:
    """A model of the hub, or of a local folder that `save_pretrained` wrote.

    Raises:
        UserError: transformers isn't installed, there is no such model, its weights don't fit, or it can't be pooled so.
    """
    spelt = f"transformers:{name}"
    if options.model is not None:
        raise UserError(f"`model` does nothing with {spelt}, which names its model")
    require("encoders", "transformers", purpose=f"`encoder` {spelt}")
    if name.startswith(("/", "./", "../")) and not Path(name).is_dir():  # no name of the hub is such
        raise NotFoundError(f"{spelt} can't be loaded: there is no folder {name}")
    model, processor, wanting, unknown = _load(spelt, name)
    both = hasattr(model, "get_image_features") and hasattr(model, "get_text_features")
    if both and options.pooling is not None:
        raise UserError(f"`pooling` does nothing with {spelt}: its model pools in its own way")
    pooling = None if both else _choose_pooling(spelt, model.config, options.pooling)
    if pooling in {"cls", "mean"}:
        wanting = [key for key in wanting if not key.startswith("pooler.")]  # of no use here, and often not stored
    if wanting:
        raise UserError(
            f"{spelt} has no weights for {len(wanting)} parameters of {type(model).__name__}, such as {wanting[0]}"
            + (f"; the model does not know {len(unknown)} of the stored names, such as {unknown[0]}" if unknown else "")
        )
    identity = {"model": _architecture(model.config), "weights": weights_hash(model)}
    if pooling is not None:
        identity["pooling"] = pooling
    lower_weights(model, precision)
    model = model.to(device).eval()
    forward = _Features(model.get_image_features) if pooling is None else _Pooled(model, pooling, _prefix(model.config))
    sides = {"image": Side(ImagePreparation(_Processed(processor)), forward, _processing(processor))}
    if both:
        sides["text"] = _text_side(spelt, name, model)
    return Encoder(spelt, sides, identity, device, precision, ("transformers", "tokenizers", "torchvision"), model)


def _load(spelt: str, name: str) -> tuple[Any, Any, list[str], list[str]]:
    """Return the model (fp32, on the CPU), the image processor, parameters without stored weights, which are random, and unknown names."""
    import transformers  # noqa: PLC0415  (an extra)

    factories: Any = transformers  # whose types are partly wanting

    with _refusing(spelt):
        model, report = factories.AutoModel.from_pretrained(name, output_loading_info=True, **_NO_CODE)
        processor = factories.AutoImageProcessor.from_pretrained(name, **_NO_CODE)
    wanting = [*map(str, report["missing_keys"]), *(str(key) for key in report.get("mismatched_keys", ()))]
    return model.float(), processor, sorted(wanting), sorted(map(str, report.get("unexpected_keys", ())))


def _text_side(spelt: str, name: str, model: Any) -> Side:  # noqa: ANN401
    from transformers import AutoTokenizer  # noqa: PLC0415  (an extra)

    with _refusing(spelt):
        tokenizer = AutoTokenizer.from_pretrained(name, **_NO_CODE)
    length = int(model.config.text_config.max_position_embeddings)
    return Side(
        CaptionPreparation(_Tokens(tokenizer), "input_ids", length),
        _Features(model.get_text_features),
        {"tokenizer": type(tokenizer).__name__, "length": length},
    )


@contextmanager
def _refusing(spelt: str) -> Iterator[None]:
    """Makes what transformers raises on wrong names the user's, and keeps its progress bars and warnings to itself."""
    import transformers.utils  # noqa: PLC0415  (an extra)

    said: Any = transformers.utils.logging
    before, bars = logging.root.manager.disable, said.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    said.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError) as error:
        text = " ".join(str(error).split())
        problem = text if len(text) <= 300 else f"{text[:300]} …"
        raise UserError(f"{spelt} can't be loaded: {problem}") from error
    finally:
        logging.disable(before)
        if bars:
            said.enable_progress_bar()


def _choose_pooling(spelt: str, config: Any, asked: str | None) -> str:  # noqa: ANN401
    if asked is not None and asked not in POOLINGS:
        raise UserError(f"`pooling` {asked!r}: {did_you_mean(asked, POOLINGS)}")
    has_cls = config.model_type in WITH_CLS
    if asked in {"cls", "mean"} and not has_cls:
        raise UserError(
            f"`pooling` {asked}: {spelt} is a {config.model_type}, of which only the pooler is known; use `pooling` pooler"
        )
    return asked or ("cls" if has_cls else "pooler")


def _prefix(config: Any) -> int:  # noqa: ANN401
    """How many tokens come before those of the patches."""
    return 1 + int(getattr(config, "num_register_tokens", 0) or 0)


def _architecture(config: Any) -> str:  # noqa: ANN401
    """What architecture it is, whatever its name and place."""
    values = {key: value for key, value in config.to_diff_dict().items() if key not in _NO_ARCHITECTURE}
    return f"{config.model_type} {digest(json.loads(json.dumps(values, default=str)))}"


def _processing(processor: Any) -> dict[str, Any]:  # noqa: ANN401
    values = json.loads(processor.to_json_string())
    return {key: values[key] for key in _PROCESSING if values.get(key) is not None}


@dataclass(frozen=True)
class _Processed:
    """Images by a model's own processor."""

    processor: Any

    def __call__(self, images: Sequence[Image.Image]) -> Tensors:
        return dict(self.processor(images=list(images), return_tensors="pt"))


@dataclass(frozen=True)
class _Tokens:
    tokenizer: Any

    def __call__(self, captions: list[str], length: int) -> Tensors:
        # Padded to the full length: SigLIP was trained so, and CLIP's mask makes it the same.
        return dict(
            self.tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        )


@dataclass(frozen=True)
class _Features:
    """`get_image_features` or `get_text_features`."""

    features: Callable[..., Any]

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        found = self.features(**tensors)
        rows: Tensor = found if isinstance(found, Tensor) else found.pooler_output  # transformers 4, and 5
        return rows


@dataclass(frozen=True)
class _Pooled:
    """A vision model's tokens, as one row."""

    model: Any
    pooling: str
    prefix: int

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        found = self.model(**tensors)
        rows: Tensor
        if self.pooling == "pooler":
            rows = found.pooler_output.flatten(1)
        elif self.pooling == "cls":
            rows = found.last_hidden_state[:, 0]
        else:
            rows = found.last_hidden_state[:, self.prefix :].mean(dim=1)
        return rows
