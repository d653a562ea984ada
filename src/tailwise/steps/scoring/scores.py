"""Scores: one float32 per sample, from embeddings, samples, or a file. Made once for a snapshot, and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog, Snapshot
from tailwise.catalog.embeddings import check_one_encoder
from tailwise.catalog.files import digest, file_digest, read_record
from tailwise.catalog.scores import score_artifact, score_column
from tailwise.context import Context
from tailwise.errors import NotFoundError, UserError
from tailwise.rejects import MAX_REJECTED
from tailwise.requests import OptionValue, ScoreRequest
from tailwise.steps.scoring import makers
from tailwise.steps.scoring.makers import NORMS, ScoreWork
from tailwise.steps.scoring.target import Target

Scores = npt.NDArray[np.float32]


def score_parts(
    catalog: Catalog, snapshot: Snapshot, request: ScoreRequest, context: Context | None = None
) -> Iterator[Scores]:
    """A score of every sample, part by part; made the first time, and kept in the catalog.

    Args:
        catalog: with what the score is made from.
        snapshot: whose rows.
        request: which score.
        context: runs the tasks and shows progress.

    Returns:
        float32 [rows] for each part of the snapshot, in row order, mapped; NaN where a sample has no score.

    Raises:
        UserError: no such score or option, or what it is made from is missing.
    """
    context = context or Context()
    column = score_column(_make(catalog, snapshot, request, context))
    return (column.read(part) for part in catalog.parts(snapshot))


def score_figures(catalog: Catalog, snapshot: Snapshot, request: ScoreRequest) -> dict[str, int]:
    """Return what the making of a score counted, other than samples: "keys" of its file, and "keys_without_sample".

    Empty where the score is not of a file.
    """
    summary = read_record(_make(catalog, snapshot, request, Context()) / layout.MANIFEST)["summary"]
    return {name: value for name, value in summary.items() if name.startswith("keys")}


def score_config(request: ScoreRequest) -> dict[str, Any]:
    """Return the request as JSON values, defaults filled in, for the config of an artifact; `score_inputs` has the hashes of its files.

    Raises:
        UserError: no such option, or out of bounds.
    """
    options = _options(request)
    return {"name": request.name, **{name: value for name, value in options.items() if OPTIONS[name].decides}}


def score_inputs(catalog: Catalog, snapshot: Snapshot, request: ScoreRequest) -> dict[str, str]:
    """Name and hash of each thing that a score is made from, for the inputs of an artifact.

    Raises:
        UserError: no such score or option, or what it is made from is missing.
    """
    options = _options(request)
    return {
        f"score's {name}": _INPUTS[name](catalog, snapshot, request.name, options) for name in _score(request).inputs
    }


# --- making and keeping -----------------------------------------------------------------------------------------------


def _make(catalog: Catalog, snapshot: Snapshot, request: ScoreRequest, context: Context) -> Path:
    """Makes a score unless it is there; returns its folder."""
    config = {"score": score_config(request), "snapshot": snapshot.number}
    inputs = {"snapshot": snapshot.id, **score_inputs(catalog, snapshot, request)}
    with score_artifact(catalog, request.name, config, inputs) as artifact:
        if not artifact.done:
            column = score_column(artifact.folder)
            work = ScoreWork(catalog, snapshot, artifact.folder, request.name, _options(request), context)
            figures = _score(request).make(work) or {}
            scored = sum(int((~np.isnan(column.read(part))).sum()) for part in catalog.parts(snapshot))
            artifact.finish({"samples": snapshot.rows, "scored": scored, **figures})
    return artifact.folder


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreOption:
    """An option of scores.

    Attributes:
        default: None if it must be given.
        good: whether a value is.
        bound: what a good value is, for errors.
        decides: whether its value is part of what a score is; False for a path, which its hash replaces.
    """

    default: OptionValue | None
    good: Callable[[Any], bool]
    bound: str
    decides: bool = True


@dataclass(frozen=True)
class Score:
    """A score that samples can have.

    Attributes:
        summary: what it is.
        source: the paper, or the tool whose files hold it.
        make: writes every part; may return figures for the summary.
        inputs: names of what it is made from.
        options: names of OPTIONS that it takes.
    """

    summary: str
    source: str
    make: Callable[[ScoreWork], Mapping[str, int] | None]
    inputs: tuple[str, ...]
    options: tuple[str, ...] = ()


def _is_whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


OPTIONS: dict[str, ScoreOption] = {
    "batch_size": ScoreOption(32_768, lambda value: _is_whole(value, 2, 1 << 20), f"between 2 and {1 << 20:,} samples"),
    "repetitions": ScoreOption(5, lambda value: _is_whole(value, 1, 1000), "between 1 and 1,000"),
    "temperature": ScoreOption(
        0.01, lambda value: isinstance(value, int | float) and 0.005 <= value <= 100, "between 0.005 and 100"
    ),
    "seed": ScoreOption(0, lambda value: _is_whole(value, -(1 << 63), 1 << 63), "a whole number"),
    "norm": ScoreOption("2", NORMS.__contains__, f"one of {', '.join(NORMS)}"),
    "target": ScoreOption(None, lambda value: isinstance(value, str), "a path", decides=False),
    "file": ScoreOption(None, lambda value: isinstance(value, str), "a path", decides=False),
    "max_rejected": ScoreOption(MAX_REJECTED, lambda value: 0 <= value <= 1, "between 0 and 1", decides=False),
}

_WANG = "Wang et al. 2024, arXiv 2405.19547"
_SIZES = "img2dataset's width and height"
SCORES: dict[str, Score] = {
    "clip-score": Score(
        "cosine of image and text embedding",
        "CLIPScore, Hessel et al. 2021, arXiv 2104.08718",
        makers.by_part(makers.clip_score),
        ("image embeddings", "text embeddings"),
    ),
    "cliploss": Score(
        "the CLIP score, less what the pair would get in a random batch anyway",
        _WANG,
        makers.cliploss,
        ("image embeddings", "text embeddings"),
        ("batch_size", "repetitions", "temperature", "seed"),
    ),
    "normsim": Score(
        "norm of the cosines to a target set: their root of squares (2), or the greatest (inf)",
        _WANG,
        makers.by_part(makers.normsim),
        ("image embeddings", "target"),
        ("target", "norm"),
    ),
    "caption-characters": Score(
        "Unicode characters of the caption", "the .txt", makers.of_samples(["caption"], makers.caption_characters), ("samples",)
    ),
    "caption-words": Score(
        "words of the caption, between white space", "the .txt", makers.of_samples(["caption"], makers.caption_words), ("samples",)
    ),
    "width": Score("of the image", _SIZES, makers.of_samples(["width"], partial(makers.numbers, column="width")), ("samples",)),
    "height": Score("of the image", _SIZES, makers.of_samples(["height"], partial(makers.numbers, column="height")), ("samples",)),
    "pixels": Score("width × height", _SIZES, makers.of_samples(["width", "height"], makers.pixels), ("samples",)),
    "aspect-ratio": Score("longer / shorter side", _SIZES, makers.of_samples(["width", "height"], makers.aspect_ratio), ("samples",)),
    "image-bytes": Score(
        "size of the image file", "the tar", makers.of_samples(["image_bytes"], partial(makers.numbers, column="image_bytes")), ("samples",)
    ),
}  # fmt: skip
COLUMN = Score(
    "a numeric column of the samples", "img2dataset's sidecar", makers.by_part(makers.column_of_samples), ("column",)
)
FILE = Score(
    "a column of a Parquet, TSV or CSV file, joined by uid or key",
    "a file",
    makers.column_of_file,
    ("file",),
    ("file", "max_rejected"),
)


def _score(request: ScoreRequest) -> Score:
    return FILE if "file" in request.options else SCORES.get(request.name, COLUMN)


def _options(request: ScoreRequest) -> dict[str, OptionValue]:
    """All options of the score, defaults filled in."""
    score = _score(request)
    for name in request.options:
        if name not in score.options:
            takes = ", ".join(map(_parameter, score.options)) or "no options"
            raise UserError(f"{_parameter(name)} does nothing with the score {request.name!r}, which takes {takes}")
    options: dict[str, OptionValue] = {}
    for name in score.options:
        value = request.options.get(name, OPTIONS[name].default)
        if value is None:
            raise UserError(f"the score {request.name!r} needs {_parameter(name)}")
        if not OPTIONS[name].good(value):
            raise UserError(f"{_parameter(name)} {value}: must be {OPTIONS[name].bound}")
        options[name] = value
    return options


def _parameter(name: str) -> str:
    return f"`{name}`"


def _embeddings_id(column: str) -> Callable[[Catalog, Snapshot, str, Mapping[str, Any]], str]:
    def find(catalog: Catalog, snapshot: Snapshot, name: str, options: Mapping[str, Any]) -> str:  # noqa: ARG001
        catalog.embedding_parts(column, snapshot)  # refuses if there are none
        return catalog.embedding_id(column, snapshot)

    return find


def _text_id(catalog: Catalog, snapshot: Snapshot, name: str, options: Mapping[str, Any]) -> str:
    image, text = (catalog.embedding_parts(column, snapshot)[0].shape[1] for column in ("image", "text"))
    if image != text:
        raise UserError(
            f"image embeddings have {image} dimensions and text embeddings {text}: a {name} needs both of one CLIP model"
        )
    check_one_encoder(catalog, f"a {name}")
    return _embeddings_id("text")(catalog, snapshot, name, options)


def _samples_id(catalog: Catalog, snapshot: Snapshot, name: str, options: Mapping[str, Any]) -> str:  # noqa: ARG001
    paths = [catalog.samples_path(part.number) for part in catalog.parts(snapshot)]
    return digest([read_record(layout.marker(path))["digest"] for path in paths])


def _column_id(catalog: Catalog, snapshot: Snapshot, name: str, options: Mapping[str, Any]) -> str:
    there = {
        column: None
        for part in catalog.parts(snapshot)
        for column in makers.numeric_columns(catalog.samples_path(part.number))
    }
    if name not in there:
        raise UserError(
            f"no score {name!r}: use {', '.join(SCORES)}, a numeric column of the samples ({', '.join(there)}), "
            "or a column of a file (`file`)"
        )
    return _samples_id(catalog, snapshot, name, options)


def _target_id(catalog: Catalog, snapshot: Snapshot, name: str, options: Mapping[str, Any]) -> str:  # noqa: ARG001
    target = Target(options["target"])
    target.check(catalog.embedding_parts("image", snapshot)[0].shape[1])
    return target.id


def _file_id(catalog: Catalog, snapshot: Snapshot, name: str, options: Mapping[str, Any]) -> str:  # noqa: ARG001
    path = Path(options["file"]).expanduser()
    if not path.is_file():
        raise NotFoundError(
            f"`file` {path} is no file: give a .parquet, .tsv or .csv file with {name!r} and uid, key or image_path"
        )
    return file_digest(path)


_INPUTS: dict[str, Callable[[Catalog, Snapshot, str, Mapping[str, Any]], str]] = {
    "image embeddings": _embeddings_id("image"),
    "text embeddings": _text_id,
    "samples": _samples_id,
    "column": _column_id,
    "target": _target_id,
    "file": _file_id,
}
