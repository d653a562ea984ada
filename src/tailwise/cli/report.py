"""The report."""

from __future__ import annotations

from tailwise.cli.app import AsJson, CatalogPath, app, open_catalog, takes, with_progress
from tailwise.cli.following import suggest_step
from tailwise.cli.printing import print_json, say
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
