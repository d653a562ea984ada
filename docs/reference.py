"""Write reference.md: all commands and options, from the request classes and docstrings that the commands themselves are made of."""

import re
import textwrap
from pathlib import Path
from typing import Any

from tailwise.cli import COMMANDS
from tailwise.cli.app import tree

HERE = Path(__file__).resolve().parent
HEAD = """# Reference of commands

Made by `docs/reference.py` from the same classes, defaults and help that the commands are made of (`tailwise.requests`); in Python,
`ClusterRequest(points_per_centroid=500)` is what `--points-per-centroid 500` is here. All commands also take `--quiet`,
`--verbose`, `--executor`, `--ray-address`, `--skip-lost` and `--part` (see [scaling](scaling.md)).
"""


def cell(text: object) -> str:
    """Return text for a cell of a Markdown table."""
    return re.sub(r"\s+", " ", str(text)).replace("|", "\\|").strip()


def row(item: Any) -> str:  # noqa: ANN401  (of the parser's own classes)
    """Return the row of one argument or option."""
    option = item.param_type_name == "option"
    shown = " / ".join(
        f"`{name}`" for name in ((*item.opts, *item.secondary_opts) if option else (item.metavar or item.name,))
    )
    meaning, _, default = cell(item.help or "").partition("[default: ")
    if item.show_default and item.default not in (None, False):
        default = f"`{item.default}`"
    return f"| {shown}{' (required)' if item.required and option else ''} | {meaning.strip()} | {default.rstrip(']')} |"


def section(name: str) -> str:
    """Return what is written of one command."""
    command = tree().commands[name]
    text, _, examples = (command.help or "").partition("Examples:")
    text, _, example = text.partition("Example:")
    lines = [line.strip() for line in (examples or example).splitlines() if line.strip()]
    shown = [item for item in command.params if not getattr(item, "hidden", False) and item.name != "help"]
    parts = [
        f"## {name}",
        "\n\n".join(textwrap.fill(" ".join(part.split()), 120) for part in text.split("\n\n")).strip(),
        "```\n" + "\n".join(lines) + "\n```" if lines else "",
        "\n".join(["| option | meaning | default |", "| --- | --- | --- |", *map(row, shown)]),
    ]
    return "\n\n".join(part for part in parts if part)


def page() -> str:
    """Return the page."""
    return "\n\n".join([HEAD.strip(), *map(section, COMMANDS)]) + "\n"


if __name__ == "__main__":
    (HERE / "reference.md").write_text(page(), encoding="utf-8")
