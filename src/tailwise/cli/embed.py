"""Embeddings from the shards themselves."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from tailwise.cli.app import AsJson, CatalogPath, Workers, app, open_catalog, with_bars
from tailwise.cli.printing import say


class Columns(str, Enum):
    """What is embedded."""

    image = "image"
    text = "text"
    both = "both"


class Precision(str, Enum):
    """What the model computes in."""

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"
    fp16 = "fp16"


class Pooling(str, Enum):
    """How a vision model's tokens become one row."""

    cls = "cls"
    mean = "mean"
    pooler = "pooler"


class Backend(str, Enum):
    """What computes images."""

    auto = "auto"
    torch = "torch"
    openvino = "openvino"


@app.command()
def embed(
    catalog: CatalogPath,
    encoder: Annotated[
        str,
        typer.Option(
            metavar="ENCODER",
            help="open_clip:MODEL/PRETRAINED, transformers:NAME_OR_FOLDER, checkpoint:PATH, lite0[:PIXELS] (a small ImageNet network, "
            "downloads nothing), or pixels (colours and edges, for tests only).",
        ),
    ],
    column: Annotated[Columns, typer.Option(help="What is embedded: images, captions, or both.")] = Columns.image,
    model: Annotated[
        str | None,
        typer.Option(
            help="checkpoint: its model's name for open_clip, or local-dir:FOLDER; what the run tells by default.",
            show_default=False,
        ),
    ] = None,
    pooling: Annotated[
        Pooling | None,
        typer.Option(
            help="transformers, vision models: cls for DINO and ViT by default, else pooler.", show_default=False
        ),
    ] = None,
    precision: Annotated[
        Precision, typer.Option(help="auto: bf16 where the device multiplies it natively, else fp32.")
    ] = Precision.auto,
    backend: Annotated[
        Backend, typer.Option(help="Images on a CPU. auto: OpenVINO where it is installed, else torch.")
    ] = Backend.auto,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda (all GPUs), cuda:N.")] = "auto",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="256 on a GPU, 64 on a CPU by default.", show_default=False)
    ] = None,
    max_rejected: Annotated[
        float, typer.Option(min=0, max=1, help="Stop when more than this share of the samples can't be embedded.")
    ] = 0.1,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Make embeddings of images and captions, from the shards themselves, by an encoder and with its own preprocessing.

    Goes on where it stopped: finished shards, and parts of the catalog that have embeddings, are skipped. Images that can't be decoded
    and empty captions are counted by reason and listed in CATALOG/rejected; their samples stay, without embedding.

    Examples:

      tailwise embed my-catalog --encoder open_clip:ViT-B-32/datacomp_xl_s13b_b90k --column both

      tailwise embed my-catalog --encoder transformers:facebook/dinov2-base

      tailwise embed my-catalog --encoder checkpoint:logs/my-run --column text
    """
    from dataclasses import asdict

    from tailwise.cli.printing import print_json, print_rejections, rejected_json
    from tailwise.encoders import EncoderOptions
    from tailwise.stages.embed import EmbedOptions
    from tailwise.stages.embed import embed as run

    loading = EncoderOptions(model, pooling.value if pooling else None, device, precision.value, backend.value)
    options = EmbedOptions(column.value, loading, batch_size, max_rejected)
    opened = open_catalog(catalog)
    report = with_bars(lambda track: run(opened, encoder, options, workers=workers, track=track))
    if as_json:
        totals = {"embedded": report.embedded, "lacking": report.lacking}
        print_json({**totals, "columns": [asdict(made) for made in report.columns], **rejected_json(report.rejections)})
        return
    for made in report.columns:
        speed = f", {made.samples / made.seconds:,.0f} samples/s" if made.samples else ""
        say(
            f"{made.column} embeddings: {made.embedded:,} of {made.lacking:,} samples that had none, by {encoder} "
            f"({made.dimension} dimensions, {made.precision}, {made.backend}{speed})"
        )
        if made.truncated:
            say(f"{made.truncated:,} captions are longer than the model reads, and were truncated")
    print_rejections(report.rejections)
