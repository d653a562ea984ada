"""How a model computes: its precision, and the backend of images: torch, or on CPUs OpenVINO, which is faster."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tailwise.encoders.encoder import Encoder, Side, Tensors
from tailwise.encoders.prepare import ImagePreparation
from tailwise.errors import UserError
from tailwise.extras import require
from tailwise.text import did_you_mean

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "openvino")
# Largest difference of a component of unit rows to torch in fp32; a greater one means a wrong conversion.
LARGEST_DIFFERENCE = {"fp32": 1e-4, "bf16": 0.1}


def choose_backend(asked: str, device: torch.device) -> str:
    """Return the backend: "auto" is OpenVINO on a CPU where it is installed, else torch."""
    if asked not in BACKENDS:
        raise UserError(f"`backend` {asked!r}: {did_you_mean(asked, BACKENDS)}")
    on_cpu, installed = device.type == "cpu", importlib.util.find_spec("openvino") is not None
    if asked == "openvino" and not on_cpu:
        raise UserError(f"`backend` openvino is for CPUs: use `backend` torch on {device}, or `device` cpu")
    if asked == "openvino":
        require("demo", "openvino", purpose="`backend` openvino")
    return "openvino" if asked != "torch" and on_cpu and installed else "torch"


def with_openvino(encoder: Encoder, precision: str, *, required: bool) -> Encoder:
    """Return an encoder (given in fp32, on the CPU) in this precision, whose image side OpenVINO runs. Captions stay with torch.

    If OpenVINO cannot run it and is not required, the log says so, and torch runs images too. Raise a UserError if OpenVINO cannot run it
    and is required.
    """
    network = encoder.network
    if network is None:
        if required:
            raise UserError(f"`backend` openvino does nothing with {encoder.name}, which has no network")
        return encoder
    try:
        sides = {**encoder.sides, "image": _converted(encoder, network, precision)}
        encoder = replace(encoder, sides=sides, packages=(*encoder.packages, "openvino"))
    except Exception as error:  # conversions of arbitrary networks raise anything
        problem = f"OpenVINO can't run {encoder.name} in {precision} ({' '.join(str(error).split())[:200]})"
        if required:
            raise UserError(f"{problem}: use `backend` torch") from error
        logger.warning("%s: torch runs it", problem)
    lower_weights(network, precision)
    return replace(encoder, precision=precision)


def _converted(encoder: Encoder, network: nn.Module, precision: str) -> Side:
    """Return the image side as OpenVINO runs it; raise any exception if it cannot be converted, or its rows differ from torch's."""
    if "openvino" not in sys.modules:  # without this package, OpenVINO does not report its use to its maker
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino  # noqa: PLC0415  (optional)

    side, trace = encoder.sides["image"], cast(Any, torch.jit.trace)
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    ((name, batch),) = cast(ImagePreparation, side.prepare).preprocess([*map(Image.fromarray, noise)]).items()
    trained = [value.requires_grad_(False) for value in network.parameters() if value.requires_grad]
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # about shapes that become constant; only the number of images varies
            traced = trace(lambda images: side.forward({name: images}), batch[:2], check_trace=False)
            graph = openvino.convert_model(traced, example_input=batch[:2], input=[-1, *batch.shape[1:]])
            expected = nn.functional.normalize(side.forward({name: batch}).double())
    finally:  # the last digits of torch's captions depend on requires_grad
        for value in trained:
            value.requires_grad_(True)
    hint = precision.replace("fp32", "f32")
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    # In its own thread, because OpenVINO sets the signal stack of the calling thread. If two networks are freed in the order of their
    # creation, the second one restores the freed stack of the first, and the next signal ends the process.
    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(openvino.Core().compile_model, graph, "CPU", settings).result()
    if (used := run.get_property("INFERENCE_PRECISION_HINT").get_type_name()) != hint:  # OpenVINO falls back silently
        raise ValueError(f"on this processor it would compute in {used}")

    def forward(tensors: Tensors) -> Tensor:
        return torch.from_numpy(run(tensors[name].numpy())[0])

    difference = float((nn.functional.normalize(forward({name: batch}).double()) - expected).abs().max())
    if not difference <= LARGEST_DIFFERENCE[precision]:  # or NaN
        raise ValueError(f"its rows differ from those of torch by {difference:.2g}")
    return replace(side, forward=forward, backend="openvino")


PRECISIONS = ("auto", "fp32", "bf16", "fp16")
_LOWERED = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)


def choose_precision(asked: str, device: torch.device) -> str:
    """Return the precision; "auto" is bf16 where the device multiplies it natively, else fp32."""
    if asked not in PRECISIONS:
        raise UserError(f"`precision` {asked!r}: {did_you_mean(asked, PRECISIONS)}")
    if asked == "fp16" and device.type == "cpu":
        raise UserError("`precision` fp16 is for GPUs: use bf16 or fp32 on a CPU")
    if asked != "auto":
        return asked
    return "bf16" if has_native_bf16(device) else "fp32"


def has_native_bf16(device: torch.device) -> bool:
    """Return whether a device has instructions for products of bf16; otherwise they are emulated, and slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else _flags()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _flags() -> dict[str, bool]:
    """Return the processor's flags as Linux lists them, for versions of torch that do not."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="ascii", errors="replace") if info.exists() else ""
    found = re.search(r"^(?:flags|Features)[^:]*:(.*)", text, re.MULTILINE)
    return dict.fromkeys(found[1].split() if found else (), True)


def lower_weights(model: nn.Module, precision: str) -> None:
    """Convert the weights of products to a lower precision, in place, so that autocast need not convert them in every batch.

    All other weights (norms, embeddings of tokens and positions) stay in fp32.
    """
    if precision == "fp32":
        return
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    for module in model.modules():
        if isinstance(module, _LOWERED):
            module.to(dtype)


def weights_hash(model: nn.Module) -> str:
    """Return a 128-bit hexadecimal hash of a model's parameters and buffers: their names, types, shapes and bytes, in any file format."""
    state = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            plain = value.detach().cpu().contiguous()
            state.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
            state.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()
