"""The demonstration: demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tailwise.cli.app import app, with_bars
from tailwise.printing import say

if TYPE_CHECKING:
    from tailwise.compare.recipe import CompareRecipe
    from tailwise.demo.run import DemoCommands
    from tailwise.recipes.pipeline import Step


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder for all of it.")] = Path("demo"),
    images: Annotated[int, typer.Option(min=1000, help="Drawings in the pool, before near-duplicates.")] = 6400,
) -> None:
    """Draw a long-tailed pool, embed, deduplicate, cluster and plan it, train with and without the plan, and show who gains.

    Prints each command as it could be typed. Minutes on a CPU; nothing is downloaded.

    Example:

      tailwise demo
    """
    from tailwise.demo.run import run
    from tailwise.printing import print_demo

    print_demo(with_bars(lambda track: run(folder, images, demo_commands, say, track)))


def demo_commands(recipe: CompareRecipe) -> DemoCommands:
    """The commands of `tailwise compare`, and what a user would type for them."""
    from tailwise.cli.compare import _commands
    from tailwise.cli.run import _prepare
    from tailwise.demo.run import DemoCommands

    def line(step: Step) -> str:
        return _prepare(step, Path(recipe.catalog), list(recipe.sources), None, None).line

    return DemoCommands(_commands(recipe), line)
