"""Figures of matplotlib as bytes: SVG for pages, PNG for slides. The same figures give the same bytes with the same versions."""

from __future__ import annotations

import io
from typing import Any

STYLE: dict[Any, Any] = {"text.parse_math": False, "text.usetex": False, "svg.hashsalt": "tailwise"}  # names are no TeX
SLIDE_DPI = 200


def encode(figure: Any, *, png: bool = False, **options: Any) -> dict[str, bytes]:  # noqa: ANN401  (matplotlib is an extra)
    """Return a figure as {suffix: content}: ".svg" and, if `png`, ".png". `options` are those of `savefig`."""
    formats: dict[str, dict[str, Any]] = {".svg": {"metadata": {"Date": None}}, ".png": {"dpi": SLIDE_DPI}}
    found = {}
    for suffix in [".svg", ".png"] if png else [".svg"]:
        stream = io.BytesIO()
        figure.savefig(stream, format=suffix[1:], **formats[suffix], **options)
        found[suffix] = stream.getvalue()
    return found
