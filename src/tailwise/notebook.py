"""Objects as notebooks show them: a small table, escaped, that needs no other file."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from math import log1p
from typing import Any

import numpy.typing as npt

from tailwise.text import plain, redacted

GREY, BLUE = "#b8bec6", "#1f6f8b"
WIDTH, HEIGHT, STEPS = 360, 80, 120  # of a picture: pixels, and points of a curve


def shown(title: str, facts: Mapping[str, object], picture: str = "") -> str:
    """Return HTML: a title and a table of facts, without those that are None or empty; `picture` is HTML already."""
    cells = {name: redacted(f"{value:,}" if isinstance(value, int) else str(value)) for name, value in facts.items()}
    rows = [
        f"<tr><th style='text-align:left'>{escape(plain(name))}</th><td style='text-align:left'>{escape(plain(cell))}</td></tr>"
        for name, cell in cells.items()
        if facts[name] is not None and cell
    ]
    return f"<div><b>{escape(plain(title))}</b><table>{''.join(rows)}</table>{picture}</div>"


def areas(curves: Mapping[str, tuple[str, npt.NDArray[Any]]]) -> str:
    """Return an SVG of falling curves as areas on one logarithmic scale: label → colour and values of at least 0, one behind the other."""
    top = log1p(max((max(values, default=0) for _, values in curves.values()), default=0)) or 1.0
    drawn = []
    for label, (color, values) in curves.items():
        places = [at * len(values) // STEPS for at in range(STEPS)] if len(values) > STEPS else range(len(values))
        points = [
            (WIDTH * at / max(len(places), 1), HEIGHT * (1 - log1p(values[place]) / top))
            for at, place in enumerate(places)
        ]
        path = " ".join(f"{x:.1f},{y:.1f} {x + WIDTH / len(places):.1f},{y:.1f}" for x, y in points)
        drawn.append(
            f"<polygon points='0,{HEIGHT} {path} {WIDTH},{HEIGHT}' fill='{color}'><title>{escape(label)}</title></polygon>"
        )
    legend = " ".join(f"<span style='color:{color}'>■</span> {escape(label)}" for label, (color, _) in curves.items())
    box = f"width='{WIDTH}' height='{HEIGHT}' viewBox='0 0 {WIDTH} {HEIGHT}'"
    return f"<svg xmlns='http://www.w3.org/2000/svg' {box}>{''.join(drawn)}</svg><div>{legend}</div>"
