"""Write the pages of commands and of requests, from the classes and docstrings that the commands themselves are made of."""

import re
import textwrap
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

import tailwise
from tailwise import requests
from tailwise.cli import COMMANDS
from tailwise.cli.app import tree
from tailwise.cli.panels import STEPS

FOLDER = Path(__file__).resolve().parent / "reference"
HEAD = """# Commands

`docs/reference.py` makes these pages from the classes, defaults and help of the commands themselves (`tailwise.requests`).
The option `--points-per-centroid 500` is `ClusterRequest(points_per_centroid=500)` in Python.

[Options of all commands](../shared-options.md): `--quiet`, `--verbose`, `--executor`,
`--ray-address`, `--skip-lost`, `--part`.

| step | command | what it does |
| --- | --- | --- |
"""
REQUESTS = """# Requests

A request holds the settings of one step. Its fields are the options of the [command](../commands/index.md), and have the same
defaults. `docs/reference.py` makes this page from the classes.
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
    """Return the page of one command."""
    command = tree().commands[name]
    text, _, examples = (command.help or "").partition("Examples:")
    text, _, example = text.partition("Example:")
    lines = [line.strip() for line in (examples or example).splitlines() if line.strip()]
    shown = [item for item in command.params if not getattr(item, "hidden", False) and item.name != "help"]
    panels: dict[str, list[Any]] = {}
    for item in shown:
        panels.setdefault(item.rich_help_panel or "", []).append(item)
    tables = [
        "\n".join([f"| {panel or 'option'} | meaning | default |", "| --- | --- | --- |", *map(row, items)])
        for panel, items in panels.items()
    ]
    parts = [
        f"# tailwise {name}",
        "\n\n".join(textwrap.fill(" ".join(part.split()), 120) for part in text.split("\n\n")).strip(),
        "```\n" + "\n".join(lines) + "\n```" if lines else "",
        *tables,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def request(name: str) -> str:
    """Return the section of one class of requests."""
    made = getattr(tailwise, name)
    hints = get_type_hints(made, vars(requests), include_extras=True)
    rows = []
    for field in fields(made):
        hint = hints[field.name]
        kind, meaning = (hint.__origin__, hint.__metadata__[0]) if hasattr(hint, "__metadata__") else (hint, "")
        kind = cell(kind.__name__ if isinstance(kind, type) else kind)
        kind = re.sub(r"(typing|collections\.abc|pathlib)\.", "", kind).replace(" \\|", " or")
        meaning, _, default = cell(meaning).partition("[default: ")
        if field.default is MISSING and field.default_factory is MISSING:
            default = "(required)"
        elif not default and field.default is not MISSING:
            default = f"`{field.default!r}`"
        rows.append(f"| `{field.name}` | `{kind}` | {meaning.strip()} | {default.rstrip(']')} |")
    head = f"## {name} {{#tailwise.requests.{name}}}"
    table = ["| field | type | meaning | default |", "| --- | --- | --- | --- |", *rows]
    return "\n\n".join([head, textwrap.fill(" ".join((made.__doc__ or "").split()), 120), "\n".join(table)]) + "\n"


def pages() -> dict[str, str]:
    """Return the text of each page by its path."""
    made = {f"commands/{name}.md": section(name) for name in COMMANDS}
    names = sorted(name for name in tailwise.__all__ if name.endswith("Request"))
    made["python/requests.md"] = "\n".join([REQUESTS, *map(request, names)])
    summaries = {name: cell((tree().commands[name].help or "").split("\n\n")[0]) for name in COMMANDS}
    index = "".join(
        f"| {step if name == names[0] else ''} | [{name}]({name}.md) | {summaries[name]} |\n"
        for step, names in STEPS.items()
        for name in names
    )
    return {"commands/index.md": HEAD + index} | made


if __name__ == "__main__":
    for old in (FOLDER / "commands").glob("*.md"):
        old.unlink()
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
