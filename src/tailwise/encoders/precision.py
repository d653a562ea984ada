"""The precision in which a model computes."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import torch
from torch import nn

from tailwise.errors import UserError
from tailwise.text import did_you_mean

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
