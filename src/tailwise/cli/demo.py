"""The demonstration: demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailwise.cli.app import app, with_bars


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder for pool and catalog.")] = Path("demo"),
    images: Annotated[int, typer.Option(min=500, help="Images in the pool.")] = 6400,
) -> None:
    """Make a long-tailed pool of drawings, plan it with both methods, and show who gains.

    Example:

      tailwise demo
    """
    from tailwise.demo.run import run
    from tailwise.printing import print_demo

    result = with_bars(lambda track: run(folder, images, track))
    print_demo(result)
