"""What all commands share: the application, and how catalogs are opened, progress is shown, and mistakes are refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from tailwise.errors import UserError
from tailwise.printing import is_quiet

if TYPE_CHECKING:
    from tailwise.catalog import Catalog
    from tailwise.plan.plan import Plan

app = typer.Typer(
    help="Decide which image-text samples to train CLIP on, and in which epoch.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
Result = TypeVar("Result")

CatalogPath = Annotated[Path, typer.Argument(metavar="CATALOG", help="Folder of the catalog.")]
PlanName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the plan.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print figures as JSON.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; one a processor by default.", show_default=False)]
Without = Annotated[
    list[str] | None,
    typer.Option(
        help="A drop list (of dedup or filter), whose samples take no part; may be given again.", show_default=False
    ),
]
AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code", help="Let the recipe run code and commands of its own. Read it first.", show_default=False
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it exists.")]


def open_catalog(path: Path) -> Catalog:
    """The catalog in a folder."""
    from tailwise.catalog import Catalog

    return Catalog.open(path)


def open_plan(path: Path, name: str) -> Plan:
    """A plan of the catalog in a folder."""
    from tailwise.plan.plan import Plan

    return Plan(open_catalog(path), name)


def with_bars(task: Callable[[Any], Result]) -> Result:
    """Return the result of a task that takes a `Track`; show its progress, unless --quiet is given."""
    from tailwise.progress import bars, silent

    return task(silent if is_quiet() else bars)


def parse_bytes(text: str, option: str = "--max-memory") -> int:
    """The number of bytes that an option like 8GB names."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    try:
        size = float(text[:-2]) * units[text[-2:].upper()]
    except (KeyError, ValueError):
        size = math.nan
    if not 0 < size < math.inf:
        raise UserError(f"{option} {text!r}: give a number above 0 and one of {', '.join(units)}, such as 8GB")
    return int(size)


def refuse_given(options: Mapping[str, object], why: str) -> None:
    """Refuses options that the user gave and that would do nothing."""
    for option, value in options.items():
        if value is not None:
            raise UserError(f"{option} does nothing {why}")
