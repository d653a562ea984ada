"""All that commands print: lines and tables for people, JSON for programs. Text from outside is shown as given, never obeyed."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

from tailwise.log import is_quiet, write_line
from tailwise.text import plain

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from tailwise.catalog.rejections import Rejections
    from tailwise.plan.explain import Explanation, Passes


TABLE_WIDTH = 60


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


def print_sizes(sizes: npt.NDArray[np.int64], what: str = "clusters") -> None:
    """Print how large the non-empty clusters are."""
    import numpy as np

    least, low, middle, high, most = (f"{size:,.0f}" for size in np.percentile(sizes[sizes > 0], (0, 5, 50, 95, 100)))
    say(f"samples of the {what}: {least} to {most}; half have at least {middle}, nine in ten {low} to {high}")


# Phrases for settings of plans; nothing for those that change nothing.
_SETTINGS: Mapping[str, Callable[[Any], str]] = {
    "dynamic": lambda again: "another draw in each epoch" if again else "the same samples in each epoch",
    "draw": lambda draw: {"stream": "exact counts", "bernoulli": "each sample drawn by chance"}.get(draw, ""),
    "max_repeats": lambda most: f"a sample at most {'once' if most == 1 else f'{most} times'} in an epoch",
    "above_one": lambda _: "quotas above one copy are cut, not given to other clusters",
    "logits": lambda logits: "the score is a logit" if logits else "the score is standardised",
    "pick": lambda first: f"{'members picked at random' if first == 'random' else f'{first} members first'}",
    "score": lambda score: f"score {' '.join(map(str, score.values()))}",
    "min_per_cluster": lambda least: f"at least {least:,} of each cluster" * (least > 0),
    "class_balance": lambda share: f"at least {share:.0%} of an equal share for each cluster" * (share > 0),
    "anneal_epochs": lambda epochs: f"annealed over {epochs:,} epochs",
    "column": lambda name: f"rates of column {name}",
    "missing_rate": lambda rate: f"rate {rate:g} where the file has none",
    "per_entry": lambda samples: f"about {samples:,} samples of an entry at most",
    "ignore_case": lambda ignored: "entries in any case" * ignored,
    "without": lambda names: f"without {', '.join(names)}" * bool(names),
    "seed": lambda seed: f"seed {seed}",
}


def _settings(config: Mapping[str, Any]) -> str:
    given = ((phrase, config[name]) for name, phrase in _SETTINGS.items() if config.get(name) is not None)
    return "; ".join(text for phrase, value in given if (text := phrase(value)))


def print_matched(names: str, found: Mapping[str, Any], pool: int) -> None:
    """Print which share of the names of a list belongs to samples, and which share of the pool they are."""
    matched, samples = found["names_matched"], found["samples_matched"]
    say(
        f"{matched:,} of {names} ({matched / max(found['names'], 1):.1%}) belong to samples, by {found['matched_by']}; "
        f"these are {samples:,} of {pool:,} samples of the pool ({samples / pool:.1%})"
    )


def print_explanation(explanation: Explanation) -> None:
    """Print the figures of a plan."""
    config, final = explanation.config, explanation.config.get("final_options", {})
    options = ", ".join(
        f"{name} {value:g}{f' to {final[name]:g}' if name in final else ''}"
        for name, value in config.get("options", {}).items()
    )
    groups = f" over {config['clustering']!r}" if config.get("clustering") else ""
    method = f"method {config['method']}{f' ({options})' if options else ''}{groups}"
    say(f"plan {explanation.name!r}: {method}, snapshot {config['snapshot']}")
    same = {"dynamic": False} | ({"draw": None} if explanation.exact else {}) if explanation.same else {}
    say(_settings({**config, **same}))
    pool, drawable = explanation.pool, explanation.eligible
    about = "" if explanation.exact else "about "
    budget = budget_text(explanation.epochs[0].total, pool, explanation.rows, explanation.asked, about)
    say(f"{budget}); {drawable:,} samples can be drawn ({drawable / pool:.1%} of the pool)")
    columns = {
        "epoch": [f"{item.epoch}" for item in explanation.epochs],
        "samples": [f"{item.total:,.0f}" for item in explanation.epochs],
        "repeats": [f"{item.repeated:,.0f}" for item in explanation.epochs],
        "seen so far": [f"{item.covered:,.0f}" for item in explanation.epochs],
        "of the pool": [f"{item.covered / pool:.1%}" for item in explanation.epochs],
        "of the drawable": [f"{item.covered / drawable:.1%}" for item in explanation.epochs],
    }
    if {*columns["repeats"]} == {"0"}:
        del columns["repeats"]
    if drawable == pool:
        del columns["of the drawable"]
    exact = "exact" if explanation.exact else "expected"
    print_table(f"epochs ({exact} counts)", tuple(columns), [*zip(*columns.values(), strict=True)])
    if explanation.bins:
        _print_bins(explanation)


def budget_text(budget: float, pool: int, rows: int, asked: float | None, about: str = "") -> str:
    """Return a budget and its share of the pool, and the share asked for if it is another, up to a bracket that stays open."""
    removed = f", without {rows - pool:,} removed samples" * (rows > pool)
    other = asked is not None and abs(asked - budget) >= max(1, asked / 1000)
    removed += f"; {asked or 0:,} samples, {(asked or 0) / pool:.1%}, were asked for" * other
    return f"budget {about}{budget:,.0f} of {pool:,} samples ({budget / pool:.1%} of the pool{removed}"


def print_passes(passes: Passes, *, exact: bool) -> None:
    """Print how often a training sees the samples that a plan keeps."""
    about = "" if exact and passes.epochs % 1 == 0 else "about "
    say(
        f"{passes.samples_seen:,} samples seen are {passes.epochs:,.4g} epochs: {passes.mean:,.3g} passes over each of "
        f"{passes.kept:,} kept samples on average; {about}{passes.seen:,.0f} are seen at least once"
    )
    if len(names := [*passes.bins]) > 1:
        say(f"passes from {names[0]} to {names[-1]}: {', '.join(f'{views:,.3g}' for views in passes.bins.values())}")


def print_clusters(clusters: list[dict[str, Any]]) -> None:
    """Every cluster of a plan."""
    formats = {"cluster": "", "size": ",", "quota": ",.3f", "rate": ".4f", "value": ""}
    names = [name for name in formats if clusters and name in clusters[0]]
    print_table("clusters", names, [[format(row[name], formats[name]) for name in names] for row in clusters])


def _print_bins(explanation: Explanation) -> None:
    pool, drawn = (sum(getattr(item, name) for item in explanation.bins) for name in ("samples", "drawn"))
    rows = [
        (item.name, f"{item.clusters:,}", f"{item.smallest:,} … {item.largest:,}", f"{item.samples / pool:.1%}",
         f"{item.drawn / drawn:.1%}", f"{item.rate:.3f}")
        for item in explanation.bins
    ]  # fmt: skip
    groups, by = ("groups", "rate") if explanation.config.get("rate_groups") else ("clusters", "size")
    names = (groups, "number", "sizes", "of the drawable", "of an epoch", "draws per sample")
    print_table(f"{groups} by {by}, and what an epoch draws of them", names, rows)
    capped, share = explanation.capped_clusters, explanation.capped_share
    if capped:
        say(f"{capped:,} {groups} are at their maximum; they use {share:.1%} of the draw")


def print_json(value: object) -> None:
    """Print JSON; text from outside keeps its value, since JSON escapes control characters and all that is not ASCII."""
    print(json.dumps(finite(value), indent=1, allow_nan=False), flush=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table, 60 columns wide if its cells allow, and at most 200 where the output is no terminal; nothing with --quiet.

    Columns of figures are aligned right, but the first one. A cell is a value, or a tuple of values that stand below each other.
    """
    import textwrap

    from rich import box
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [["\n".join(map(plain, cell if isinstance(cell, tuple) else (cell,))) for cell in row] for row in rows]
    heads = [plain(column) for column in columns]
    widest = [max(map(cell_len, "\n".join(column).split("\n"))) for column in zip(heads, *cells, strict=True)]
    if sum(widest) + 2 * len(heads) - 2 > TABLE_WIDTH:  # break headers, not cells
        least = [[*head.split(), *(row[at] for row in cells)] for at, head in enumerate(heads)]
        needed = [max(map(cell_len, "\n".join(each).split("\n"))) for each in least]
        broken = [textwrap.wrap(head, width) or [""] for head, width in zip(heads, needed, strict=True)]
        height = max(map(len, broken))
        heads = ["\n".join([""] * (height - len(lines)) + lines) for lines in broken]
    look: dict[str, Any] = {"box": box.SIMPLE_HEAD, "show_edge": False, "padding": (0, 1, 0, 0), "pad_edge": False}
    table = Table(**look)
    for at, head in enumerate(heads):
        figures = at and all(re.fullmatch(r"[\d.,%…–−\[\] -]*", row[at]) for row in cells)
        table.add_column(Text(head), justify="right" if figures else "left", overflow="fold", vertical="top")
    for row in cells:
        table.add_row(*map(Text, row))
    console = Console(markup=False, emoji=False, highlight=False, quiet=is_quiet())
    if not console.is_terminal:
        console.width = 200
    say(title)
    console.print(table)
