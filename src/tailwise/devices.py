"""Devices by name: the names that are allowed, and the devices that they mean on this machine."""

from __future__ import annotations

import re

import torch

from tailwise.errors import UserError

DEVICE_NAME = re.compile(r"auto|cpu|cuda(?::(0|[1-9][0-9]*))?")
ALLOWED = "auto, cpu, cuda or cuda:N"


def find_device(name: str, *, any_kind: bool = False) -> torch.device:
    """Return the device of a name: "auto" (a CUDA device if there is one, else the CPU), "cpu", "cuda" or "cuda:N".

    With `any_kind`, other devices of torch ("mps", "xpu", …) are allowed too, and the device is tried: for models. Raise a UserError if the
    name is not allowed, or this machine has no such device.
    """
    count, match, reason = _cuda_devices(), DEVICE_NAME.fullmatch(name), ""
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    if any_kind:
        try:
            torch.zeros(1, device=name).cpu()  # there are devices that hold nothing
            return torch.device(name)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = " ({})".format(str(error).partition("\n")[0])
    elif match and (name == "cpu" or int(match[1] or 0) < count):
        return torch.device(name)
    raise UserError(f"`device` {name!r} cannot be used{reason}: use {ALLOWED}; CUDA devices here: {count}")


def find_devices(name: str) -> list[torch.device]:
    """Return the devices that a model runs on: all CUDA devices for "auto" and "cuda", else the one of `find_device`."""
    if name in {"auto", "cuda"} and (count := _cuda_devices()) > 1:
        return [torch.device("cuda", at) for at in range(count)]
    return [find_device(name, any_kind=True)]


def _cuda_devices() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
