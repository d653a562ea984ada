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
from tailwise.catalog.artifacts import Artifact, artifact_id, finished_folder
from tailwise.catalog.captions import ORIGINAL, find_captions
from tailwise.catalog.catalog import Catalog, Part, Snapshot
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.columns import PartColumn
from tailwise.catalog.embeddings import MODALITIES, check_column, check_one_encoder, column_dimension, column_settings
from tailwise.catalog.files import digest, file_digest, known_record, read_record
from tailwise.catalog.kinds import NAMED_SCORE
from tailwise.catalog.scores import score_artifact, score_column
from tailwise.context import Context
from tailwise.errors import MAX_REJECTED, NotFoundError, UserError
from tailwise.execution.base import KERNEL, Apply
from tailwise.kernels.heads import ACTIVATIONS
from tailwise.requests import OptionValue, ScoreRequest
from tailwise.steps.importing.listed import MATCHES, check_matched
from tailwise.steps.scoring import makers
from tailwise.steps.scoring.head import read_layers
from tailwise.steps.scoring.makers import ScoredPart, ScoreWork, by_part
from tailwise.steps.scoring.target import Target
from tailwise.storage.store_path import looked_up
from tailwise.text import command_line

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
    column = make_score(catalog, snapshot, request, context or Context())
    return (column.read(part) for part in catalog.parts(snapshot))


def make_score(catalog: Catalog, snapshot: Snapshot, request: ScoreRequest, context: Context) -> PartColumn:
    """Return the column of a score; see `score_parts`."""
    return score_column(_make(catalog, snapshot, request, context))


def score_figures(catalog: Catalog, snapshot: Snapshot, request: ScoreRequest) -> dict[str, int]:
    """Return what the making of a score counted, other than samples: of a file, of clusters near a target; for others nothing."""
    summary = read_record(_make(catalog, snapshot, request, Context()) / layout.MANIFEST)["summary"]
    return {name: value for name, value in summary.items() if name not in {"samples", "scored"}}


def score_config(request: ScoreRequest) -> dict[str, Any]:
    """Return the request as JSON values, defaults filled in, for the config of an artifact; `score_inputs` has the hashes of its files.

    Raises:
        UserError: no such option, or out of bounds.
    """
    options = score_options(request).items()
    usual = (*MODALITIES, "captions", "column", "match", "activation")
    stated = {name: value for name, value in options if name not in usual or value != OPTIONS[name].default}
    return {"name": request.name, **{name: value for name, value in stated.items() if OPTIONS[name].decides}}


def score_inputs(catalog: Catalog, snapshot: Snapshot, request: ScoreRequest) -> dict[str, str]:
    """Name and hash of each thing that a score is made from, for the inputs of an artifact.

    Raises:
        UserError: no such score or option, or what it is made from is missing.
    """
    if (named := _named(catalog, snapshot, request)) is not None:
        return {f"{NAMED_SCORE.prefix}{request.name}": artifact_id(named)}
    score_options(request)  # refuses bad ones
    found = {f"score's {name}": _INPUTS[name](catalog, snapshot, request) for name in find_score(request).inputs}
    return {name: value for name, value in found.items() if value is not None}


def _named(catalog: Catalog, snapshot: Snapshot, request: ScoreRequest) -> dict[str, Any] | None:
    """Return the manifest of the score of this name that `make_named_score` made; None if the request means another one."""
    if request.options or request.name in SCORES or request.name not in NAMED_SCORE.finished(catalog.folder):
        return None
    manifest = read_record(NAMED_SCORE.path(catalog.folder, request.name) / layout.MANIFEST)
    if (number := manifest["identity"]["config"]["snapshot"]) != snapshot.number:
        raise UserError(
            f"the score {request.name!r} was made for snapshot {number}, and this is for {snapshot.number}: make one for that snapshot "
            f"with {command_line('score', catalog.folder, '…')}, under another name"
        )
    return manifest


# --- making and keeping -----------------------------------------------------------------------------------------------


def _make(catalog: Catalog, snapshot: Snapshot, request: ScoreRequest, context: Context) -> Path:
    """Makes a score unless it is there; returns its folder."""
    if (named := _named(catalog, snapshot, request)) is not None:
        return finished_folder(NAMED_SCORE.path(catalog.folder, request.name), named["identity"])
    config = {"score": score_config(request), "snapshot": snapshot.number}
    inputs = {"snapshot": snapshot.id, **score_inputs(catalog, snapshot, request)}
    artifact = score_artifact(catalog, request.name, config, inputs)
    work = ScoreWork(catalog, snapshot, artifact.folder, request.name, score_options(request), context)
    return write_score(artifact, work, find_score(request).make)


def write_score(
    artifact: Artifact,
    work: ScoreWork,
    make: Callable[[ScoreWork], Mapping[str, Any] | None],
    *,
    needed: bool = False,
) -> Path:
    """Make a score in its artifact unless it is there; return its folder. If it is `needed`, some sample must have it."""
    with artifact:
        if not artifact.done:
            figures = make(work) or {}
            work.context.executor.forget()  # heads and targets: the next score of this name may have others
            scored = sum(work.context.executor.map(Apply(partial(_count_scored, work.column)), work.parts, KERNEL))
            if needed and not scored:
                raise UserError(f"not one of {work.snapshot.rows:,} samples would have the score {work.name!r}")
            artifact.finish({"samples": work.snapshot.rows, "scored": scored, **figures})
    if "strict" in work.options:
        summary = read_record(artifact.folder / layout.MANIFEST)["summary"]
        check_matched(work.options["strict"], summary, work.options["file"])
    return artifact.folder


def _count_scored(column: PartColumn, part: Part) -> int:
    return int((~np.isnan(column.read(part))).sum())


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreOption:
    """An option of scores."""

    default: OptionValue | None  # None if it must be given
    good: Callable[[Any], bool]  # returns True for a good value
    bound: str  # describes good values, for errors
    decides: bool = True  # True if its value is part of the score's config; False for a path, which its hash replaces


@dataclass(frozen=True)
class Score:
    """A score that samples can have."""

    make: Callable[[ScoreWork], Mapping[str, Any] | None]  # writes every part; may return figures for the summary
    inputs: tuple[str, ...] = ("samples",)  # names in _INPUTS
    options: tuple[str, ...] = ()  # names in OPTIONS
    minimum: float | None = None  # least score that stays, where a filter gives no rule


def _is_whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


OPTIONS: dict[str, ScoreOption] = {
    "batch_size": ScoreOption(32_768, lambda value: _is_whole(value, 2, 1 << 20), f"between 2 and {1 << 20:,} samples"),
    "repetitions": ScoreOption(5, lambda value: _is_whole(value, 1, 1000), "between 1 and 1,000"),
    "temperature": ScoreOption(
        0.01, lambda value: isinstance(value, int | float) and 0.005 <= value <= 100, "between 0.005 and 100"
    ),
    "seed": ScoreOption(0, lambda value: _is_whole(value, -(1 << 63), 1 << 63), "a whole number"),
    "image": ScoreOption("image", lambda value: isinstance(value, str), "the name of a column"),
    "text": ScoreOption("text", lambda value: isinstance(value, str), "the name of a column"),
    "norm": ScoreOption("2", makers.NORMS.__contains__, f"one of {', '.join(makers.NORMS)}"),
    "target": ScoreOption(None, lambda value: isinstance(value, str), "a path", decides=False),
    "clustering": ScoreOption("main", lambda value: isinstance(value, str), "the name of a clustering"),
    "captions": ScoreOption(ORIGINAL, lambda value: isinstance(value, str), "a name of captions"),
    "file": ScoreOption(None, lambda value: isinstance(value, str), "a path", decides=False),
    "column": ScoreOption("", lambda value: isinstance(value, str), "the name of a column"),
    "match": ScoreOption("", ("", *MATCHES).__contains__, f"one of {', '.join(MATCHES)}"),
    "strict": ScoreOption(0.0, lambda value: 0 <= value <= 1, "between 0 and 1", decides=False),
    "head": ScoreOption(None, lambda value: isinstance(value, str), "a path", decides=False),
    "activation": ScoreOption("", ("", *ACTIVATIONS).__contains__, f"one of {', '.join(ACTIVATIONS)}"),
    "max_rejected": ScoreOption(MAX_REJECTED, lambda value: 0 <= value <= 1, "between 0 and 1", decides=False),
}

_PAIRED = ("image embeddings", "text embeddings")
SCORES: dict[str, Score] = {  # docs/reference/scores.md describes them
    "clip-score": Score(by_part(makers.clip_score), _PAIRED, MODALITIES),
    "cliploss": Score(makers.cliploss, _PAIRED, ("batch_size", "repetitions", "temperature", "seed", *MODALITIES)),
    "normsim": Score(by_part(makers.normsim), ("image embeddings", "target"), ("target", "norm", "image")),
    "near-target": Score(makers.near_target, ("clustering", "target of clusters"), ("target", "clustering"), minimum=1),
    "caption-characters": Score(by_part(makers.caption_characters), ("samples", "captions"), ("captions",)),
    "caption-words": Score(by_part(makers.caption_words), ("samples", "captions"), ("captions",)),
    "width": Score(by_part(partial(ScoredPart.numbers, column="width"))),
    "height": Score(by_part(partial(ScoredPart.numbers, column="height"))),
    "pixels": Score(by_part(makers.pixels)),
    "aspect-ratio": Score(by_part(makers.aspect_ratio)),
    "image-bytes": Score(by_part(partial(ScoredPart.numbers, column="image_bytes"))),
}
COLUMN = Score(by_part(makers.column_of_samples), ("column",))  # a numeric column of the samples
# By the option that says where they come from: a file of scores, joined by names of samples; linear layers on embeddings.
_MADE_FROM = {
    "file": Score(makers.scores_of_file, ("file",), ("file", "column", "match", "strict", "max_rejected")),
    "head": Score(by_part(makers.head), ("image embeddings", "head"), ("head", "image", "activation")),
}


def find_score(request: ScoreRequest) -> Score:
    """Return how the score of a request is made."""
    found = next((score for option, score in _MADE_FROM.items() if option in request.options), None)
    return found or SCORES.get(request.name, COLUMN)


def score_options(request: ScoreRequest) -> dict[str, OptionValue]:
    """Return all options of a score, defaults filled in; a UserError names a bad one."""
    score = find_score(request)
    for name in request.options:
        if name not in score.options:
            takes = ", ".join(f"`{option}`" for option in score.options) or "no options"
            raise UserError(f"`{name}` does nothing with the score {request.name!r}, which takes {takes}")
    options: dict[str, OptionValue] = {}
    for name in score.options:
        value = request.options.get(name, OPTIONS[name].default)
        if value is None:
            raise UserError(f"the score {request.name!r} needs `{name}`")
        if not OPTIONS[name].good(value):
            raise UserError(f"`{name}` {value}: must be {OPTIONS[name].bound}")
        options[name] = value
    return options


def _column(catalog: Catalog, request: ScoreRequest, modality: str) -> str:
    """Return the column of embeddings of a modality that the request names."""
    return check_column(catalog, str(score_options(request)[modality]), modality)


def _embeddings_id(catalog: Catalog, snapshot: Snapshot, request: ScoreRequest, modality: str) -> str:
    column = _column(catalog, request, modality)
    catalog.require_embeddings(column, snapshot)
    return catalog.embedding_id(column, snapshot)


def _dimension(catalog: Catalog, snapshot: Snapshot, column: str) -> int:
    catalog.require_embeddings(column, snapshot)
    return column_dimension(catalog, column) or 0


def _text_id(catalog: Catalog, snapshot: Snapshot, request: ScoreRequest) -> str:
    columns = [_column(catalog, request, modality) for modality in MODALITIES]
    image, text = (_dimension(catalog, snapshot, column) for column in columns)
    if image != text:
        raise UserError(
            f"image embeddings have {image} dimensions and text embeddings {text}: a {request.name} needs both of one CLIP model"
        )
    check_one_encoder(catalog, columns, f"a {request.name}")
    return _embeddings_id(catalog, snapshot, request, "text")


def _samples_id(catalog: Catalog, snapshot: Snapshot, _: ScoreRequest) -> str:
    markers = [layout.marker(catalog.samples_path(part.number)) for part in catalog.parts(snapshot)]
    return digest([known_record(marker)["digest"] for marker in looked_up(markers)])


def _column_id(catalog: Catalog, snapshot: Snapshot, request: ScoreRequest) -> str:
    there = {
        column: None
        for part in catalog.parts(snapshot)
        for column in makers.numeric_columns(catalog.samples_path(part.number))
    }
    if request.name not in there:
        raise UserError(
            f"no score {request.name!r}: use {', '.join(SCORES)}, a numeric column of the samples ({', '.join(there)}), "
            "a column of a file (`file`), or a score that `tailwise score` named"
        )
    return _samples_id(catalog, snapshot, request)


def _target_id(catalog: Catalog, snapshot: Snapshot, request: ScoreRequest) -> str:
    target = Target(str(request.options["target"]))
    column = _column(catalog, request, "image")
    target.check(_dimension(catalog, snapshot, column), column_settings(catalog, column))
    return target.id


def _clustering(catalog: Catalog, snapshot: Snapshot, request: ScoreRequest) -> Clustering:
    found = Clustering.open(catalog, str(score_options(request)["clustering"]))
    if not found.has_centroids:
        raise UserError(f"`clustering` {found.name!r} has no centroids: name one that `tailwise cluster` made")
    if found.snapshot.number != snapshot.number:
        raise UserError(
            f"clustering {found.name!r} was made for snapshot {found.snapshot.number}, and this is for {snapshot.number}: "
            f"make one with {command_line('cluster', catalog.folder, extends=found.name, name='…')}"
        )
    return found


def _clustering_id(catalog: Catalog, snapshot: Snapshot, request: ScoreRequest) -> str:
    return _clustering(catalog, snapshot, request).id


def _target_of_clusters_id(catalog: Catalog, snapshot: Snapshot, request: ScoreRequest) -> str:
    target = Target(str(request.options["target"]))
    clustering = _clustering(catalog, snapshot, request)
    target.check(clustering.centroids.shape[1], column_settings(catalog, str(clustering.column)))
    return target.id


def _file_id(_catalog: Catalog, _snapshot: Snapshot, request: ScoreRequest) -> str:
    path = Path(str(request.options["file"])).expanduser()
    if not path.is_file():
        raise NotFoundError(
            f"`file` {path} is no file: give scores and names of samples, in a .parquet, .csv, .tsv, .jsonl, .json or .npy"
        )
    return file_digest(path)


def _head_id(catalog: Catalog, snapshot: Snapshot, request: ScoreRequest) -> str:
    path = Path(str(request.options["head"]))
    found = read_layers(path)[0][0].shape[1]
    if found != (there := _dimension(catalog, snapshot, _column(catalog, request, "image"))):
        raise UserError(
            f"`head` {path} takes embeddings of {found} dimensions, and the catalog's have {there}: name the column of its encoder with "
            "`image`"
        )
    return file_digest(path)


def _captions_id(catalog: Catalog, _: Snapshot, request: ScoreRequest) -> str | None:
    captions = find_captions(catalog, str(score_options(request)["captions"]))
    return None if captions is None else captions.id


_INPUTS: dict[str, Callable[[Catalog, Snapshot, ScoreRequest], str | None]] = {
    "image embeddings": partial(_embeddings_id, modality="image"),
    "text embeddings": _text_id,
    "samples": _samples_id,
    "captions": _captions_id,
    "column": _column_id,
    "target": _target_id,
    "clustering": _clustering_id,
    "target of clusters": _target_of_clusters_id,
    "file": _file_id,
    "head": _head_id,
}
