"""The report, and the demonstration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from tailwise.cli.app import AsJson, CatalogPath, app, open_catalog, takes, with_progress
from tailwise.cli.following import suggest_step
from tailwise.cli.printing import print_json, say
from tailwise.errors import UserError
from tailwise.requests import ReportRequest


@app.command()
@takes(ReportRequest)
def report(catalog: CatalogPath, request: ReportRequest, as_json: AsJson = False) -> None:
    """Show a catalog and its plans on one page: overview, charts, a gallery of clusters, duplicates, and two plans side by side.

    The page opens in a browser from the disk: no server, no connection. It shows captions and small copies of images of the
    pool, so share it as you would share these.

    Examples:
      tailwise report my-catalog --output report
      tailwise report my-catalog --output report --plan epochs --plan subset --samples-per-second 5000
      tailwise report my-catalog --output report --clustering concepts --images 6 --study study
    """
    from tailwise.report.report import make_report

    opened = open_catalog(catalog)
    made = make_report(opened, request, with_progress())
    if as_json:
        figures = {"page": str(made.page), "files": made.files, "size_bytes": made.size_bytes}
        shown = {"clusters": made.clusters, "samples": made.samples, "without_image": made.without_image}
        print_json(figures | shown)
        return
    size = f"{made.size_bytes / 1e6:,.1f} MB in {made.files:,} file{'s' * (made.files > 1)}"
    say(f"report on {made.clusters:,} clusters with {made.samples:,} samples: {size}")
    if made.without_image:
        say(f"note: {made.without_image:,} of these samples have no picture; the page says why")
    say(f"open it: {made.page}")
    suggest_step(opened)


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
