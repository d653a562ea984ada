"""What every benchmark prints first: the machine and the versions."""

import importlib.metadata
import os
import platform
from pathlib import Path


def print_header(title: str, *packages: str) -> None:
    model = "unknown processor"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("tailwise", "numpy", *packages))
    print(f"{title}\n{model}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}")
