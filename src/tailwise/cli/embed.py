"""Embeddings from the shards themselves."""

from __future__ import annotations

from tailwise.cli.app import AsJson, CatalogPath, app, open_catalog, with_progress
from tailwise.cli.printing import say
from tailwise.cli.requests import takes
from tailwise.requests import EmbedRequest


@app.command()
@takes(EmbedRequest)
def embed(catalog: CatalogPath, request: EmbedRequest, as_json: AsJson = False) -> None:
    """Make embeddings of images and captions, from the shards themselves, by an encoder and with its own preprocessing.

    Goes on where it stopped: finished shards, and parts of the catalog that have embeddings, are skipped. Images that can't be decoded
    and empty captions are counted by reason and listed in CATALOG/rejected; their samples stay, without embedding.

    Examples:

      tailwise embed my-catalog --encoder open_clip:ViT-B-32/datacomp_xl_s13b_b90k --column both

      tailwise embed my-catalog --encoder transformers:facebook/dinov2-base

      tailwise embed my-catalog --encoder checkpoint:logs/my-run --column text

      tailwise embed my-catalog --encoder transformers:facebook/dinov2-base --column dino --of image  (a second column of images)
    """
    from dataclasses import asdict

    from tailwise.cli.printing import print_json, print_rejections, rejected_json
    from tailwise.steps.embedding.embed import embed as run

    opened = open_catalog(catalog)
    report = run(opened, request, with_progress())
    if as_json:
        totals = {"embedded": report.embedded, "lacking": report.lacking}
        print_json({**totals, "columns": [asdict(made) for made in report.columns], **rejected_json(report.rejections)})
        return
    for made in report.columns:
        speed = f", {made.samples / made.seconds:,.0f} samples/s" if made.samples else ""
        say(
            f"{made.column} embeddings: {made.embedded:,} of {made.lacking:,} samples that had none, by {request.encoder} "
            f"({made.dimension} dimensions, {made.precision}, {made.backend}{speed})"
        )
        if made.truncated:
            say(f"{made.truncated:,} captions are longer than the model reads, and were truncated")
    print_rejections(report.rejections)
