"""All that commands print: lines and tables for people, JSON for programs. Text from outside is shown as given, never obeyed."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

from tailwise.log import is_quiet, write_line
from tailwise.text import plain

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from tailwise.catalog.rejections import Rejections
    from tailwise.plan.explain import Explanation


def finite(value: Any) -> Any:  # noqa: ANN401  (JSON values)
    """Return JSON values: dataclasses as objects, and null for numbers that JSON cannot hold, infinities and NaN."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def say(line: object = "", *, error: bool = False) -> None:
    """Print one line for people, on standard error if `error`; nothing with --quiet."""
    if not is_quiet():
        write_line(sys.stderr if error else sys.stdout, line)


def rejected_json(rejections: Rejections) -> dict[str, Any]:
    """Return the rejections as JSON values."""
    counts = [{"stage": stage, "reason": reason, "rows": rows} for (stage, reason), rows in rejections.counts.items()]
    return {"rejected": counts, "rejected_files": [str(path) for path in rejections.files]}


def print_rejections(rejections: Rejections) -> None:
    """Print the rejections, by reason."""
    if not rejections.counts:
        say("nothing was left out")
        return
    rows = [(stage, reason, f"{count:,}") for (stage, reason), count in sorted(rejections.counts.items())]
    print_table("left out", ("stage", "reason", "rows"), rows)
    say(f"each case is listed in {rejections.files[0].parent}")


def print_sizes(sizes: npt.NDArray[np.int64]) -> None:
    """Percentiles of the sizes of non-empty clusters."""
    import numpy as np

    full = sizes[sizes > 0]
    marks = (0, 5, 25, 50, 75, 95, 100)
    values = np.percentile(full, marks)
    print_table("cluster sizes", tuple(f"{mark} %" for mark in marks), [tuple(f"{value:,.0f}" for value in values)])


def print_explanation(explanation: Explanation) -> None:
    """The figures of a plan."""
    config = explanation.config
    chosen = ", ".join(f"{key} {value}" for key, value in config.items() if value is not None and value != {})
    say(f"plan {explanation.name!r}: {chosen}")
    pool, drawable = explanation.pool, explanation.eligible
    budget = budget_text(explanation.epochs[0].total, pool, explanation.rows, explanation.asked)
    say(f"{budget}); {drawable:,} samples can be drawn ({drawable / pool:.1%} of the pool)")
    exact = "exact" if explanation.exact else "expected"
    rows = [(e.epoch, f"{e.total:,.0f}", f"{e.unique:,.0f}", f"{e.repeated:,.0f}", f"{e.covered:,.0f}",
             f"{e.covered / pool:.1%}", f"{e.covered / drawable:.1%}") for e in explanation.epochs]  # fmt: skip
    columns = ("epoch", "total", "unique", "repeated", "covered so far", "of the pool", "of the drawable")
    print_table(f"epochs ({exact} counts)", columns, rows)
    if explanation.bins:
        _print_bins(explanation)


def budget_text(budget: float, pool: int, rows: int, asked: float | None, about: str = "") -> str:
    """Return a budget and its share of the pool, and the share asked for if it is another, up to a bracket that stays open."""
    removed = f", without {rows - pool:,} removed samples" * (rows > pool)
    other = asked is not None and abs(asked - budget) >= max(1, asked / 1000)
    removed += f"; {asked or 0:,} samples, {(asked or 0) / pool:.1%}, were asked for" * other
    return f"budget {about}{budget:,.0f} of {pool:,} samples ({budget / pool:.1%} of the pool{removed}"


def print_clusters(clusters: list[dict[str, Any]]) -> None:
    """Every cluster of a plan."""
    formats = {"cluster": "", "size": ",", "quota": ",.3f", "rate": ".4f", "value": ""}
    names = [name for name in formats if clusters and name in clusters[0]]
    print_table("clusters", names, [[format(row[name], formats[name]) for name in names] for row in clusters])


def _print_bins(explanation: Explanation) -> None:
    pool, drawn = (sum(getattr(item, name) for item in explanation.bins) for name in ("samples", "drawn"))
    rows = [
        (item.name, f"{item.clusters:,}", f"{item.smallest:,} … {item.largest:,}", f"{item.samples:,}",
         f"{item.samples / pool:.1%}", f"{item.drawn:,.0f}", f"{item.drawn / drawn:.1%}", f"{item.rate:.3f}")
        for item in explanation.bins
    ]  # fmt: skip
    names = ("clusters by size", "clusters", "sizes", "samples", "of the drawable", "drawn", "of the draw", "rate")
    print_table("exposures per epoch, from head to tail", names, rows)
    say(
        f"{explanation.capped_clusters:,} clusters are at their maximum; they use {explanation.capped_share:.1%} of the draw"
    )


def print_json(value: object) -> None:
    """Print JSON; text from outside keeps its value, since JSON escapes control characters and all that is not ASCII."""
    print(json.dumps(finite(value), indent=1, allow_nan=False), flush=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table, 200 columns wide where the output is no terminal; nothing with --quiet.

    The first column is aligned left, the others right. A cell is a value, or a tuple of values that stand below each other.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(plain(title)), title_justify="left")
    for at, column in enumerate(columns):
        table.add_column(Text(plain(column)), justify="left" if at == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text("\n".join(map(plain, cell if isinstance(cell, tuple) else (cell,)))) for cell in row))
    console = Console(markup=False, emoji=False, highlight=False, quiet=is_quiet())
    if not console.is_terminal:
        console.width = 200
    console.print(table)
