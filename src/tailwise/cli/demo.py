"""The demonstration: demo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from tailwise.cli.app import app, with_progress
from tailwise.cli.printing import say
from tailwise.errors import UserError


@app.command()
def demo(
    pool: Annotated[
        list[str] | None,
        Argument(
            metavar="[POOL...]", help="Shards (tars, Parquet files, folders) of your own.  [default: a drawn pool]"
        ),
    ] = None,
    output: Annotated[Path | None, Option(help="A new folder.  [default: demo; with a POOL, demo-pool]")] = None,
    samples: Annotated[int | None, Option(min=1000, help="Samples of your pool, at most.  [default: 20000]")] = None,
    images: Annotated[int | None, Option(min=1000, help="Images to draw, without duplicates.  [default: 6400]")] = None,
) -> None:
    """Run all steps on a small pool, from import to training and evaluation.

    Each step is shown as the command to type, with facts about its result. The training is killed once and resumed. Without a
    POOL, the pool is drawn: its concepts and near-duplicates are known. Takes minutes on a CPU; nothing is downloaded.
    Rerun an interrupted demo to resume it.

    Examples:
      tailwise demo
      tailwise demo shards/ embeddings/ --output my-demo --samples 20000
    """
    if (images if pool else samples) is not None:
        raise UserError("--images does nothing with a POOL" if pool else "--samples does nothing without a POOL")
    from tailwise.demo.run import Tools, run_drawn, run_on_pool

    tools = Tools(_invoke, say, with_progress())
    if pool:
        run_on_pool(output or Path("demo-pool"), pool, samples or 20_000, tools)
    else:
        run_drawn(output or Path("demo"), images or 6400, tools)


def _invoke(words: Sequence[str]) -> str:
    """Run a command in this process and return what it prints."""
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        app(list(words), standalone_mode=False)
    return said.getvalue()
