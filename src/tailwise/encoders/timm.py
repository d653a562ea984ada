"""Encoders of timm: `timm:MODEL` or `timm:MODEL/WEIGHTS`. Rows are the features before the classifier, pooled as the model does."""

from __future__ import annotations

import json
import logging
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tailwise.encoders.backends import lower_weights, weights_hash
from tailwise.encoders.encoder import Encoder, Side, refuse
from tailwise.encoders.open_clip import shortened, silenced, stack
from tailwise.encoders.prepare import ImagePreparation
from tailwise.errors import NotFoundError, UserError
from tailwise.extras import require
from tailwise.requests import EncoderRequest

HUBS = ("hf-hub:", "hf_hub:", "local-dir:")  # names of timm that hold slashes, and come with weights


def load(name: str, options: EncoderRequest, device: torch.device, precision: str) -> Encoder:
    """Load a model of timm with the weights of a tag or a file; without either, with the weights that timm has by default."""
    spelt = f"timm:{name}"
    refuse(spelt, model=options.model, pooling=options.pooling)
    require("encoders", "timm", purpose=f"`encoder` {spelt}")
    try:
        with silenced(logging.WARNING):
            network, architecture = _load(spelt, name)
    except (
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        OSError,
        EOFError,
        pickle.UnpicklingError,
        ImportError,
    ) as error:
        raise UserError(
            f"{spelt} can't be loaded: {shortened(error)}; check the name, the file and the connection"
        ) from error
    import timm.data  # noqa: PLC0415  (an extra)

    data: Any = timm.data  # some of its types are missing
    about = data.resolve_model_data_config(network)
    identity = {"model": f"timm {architecture}", "weights": weights_hash(network)}
    lower_weights(network, precision)
    network = network.to(device).eval()
    prepare = ImagePreparation(partial(stack, data.create_transform(**about, is_training=False)))
    side = Side(prepare, lambda tensors: network(tensors["image"]), json.loads(json.dumps(about)))
    return Encoder(spelt, {"image": side}, identity, device, precision, ("timm", "torchvision"), network)


def _load(spelt: str, name: str) -> tuple[Any, str]:
    """Return the network without its classifier, in fp32 on the CPU, and the name of its architecture."""
    import timm  # noqa: PLC0415  (an extra)

    if name.startswith(HUBS):
        return timm.create_model(name, pretrained=True, num_classes=0), name
    model, _, weights = name.partition("/")
    if not timm.is_model(model):
        near = timm.list_models(f"*{model.partition('.')[0]}*")[:3]
        raise UserError(f"{spelt}: timm has no model {model!r}{f'; did you mean {near[0]!r}?' if near else ''}")
    architecture = model.partition(".")[0]
    if "/" not in weights and "." not in weights:  # a tag, or none
        tagged = f"{architecture}.{weights}" if weights else model
        if not timm.models.is_model_pretrained(tagged) or (
            weights and tagged not in timm.list_pretrained(architecture)
        ):
            raise UserError(
                f"{spelt}: timm has no weights {weights or 'of ' + model}: give timm:{architecture}/FILE, a checkpoint; random weights "
                "say nothing"
            )
        return timm.create_model(tagged, pretrained=True, num_classes=0), architecture
    if not Path(weights).is_file():
        raise NotFoundError(f"{spelt}: there is no file {weights}")
    network: Any = timm.create_model(model, pretrained=False, num_classes=0)
    stored = timm.models.load_state_dict(weights, weights_only=True)
    missing, unknown = network.load_state_dict(stored, strict=False)
    heads = network.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    unknown = [key for key in unknown if not key.startswith(tuple(f"{head}." for head in heads))]
    if missing or unknown:
        what = f"no {missing[0]}" if missing else f"{unknown[0]}, which the model does not have"
        count = len(missing) + len(unknown)
        raise UserError(f"{spelt}: {weights} are not weights of {model}: it holds {what} ({count} such names)")
    return network, architecture
