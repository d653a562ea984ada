"""Scores under names that users give: from a file, by a head on embeddings, or as a mix of other scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Catalog, Snapshot
from tailwise.catalog.columns import PartColumn
from tailwise.catalog.drops import Survivors
from tailwise.catalog.files import read_record
from tailwise.catalog.kinds import NAMED_SCORE
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.kernels.moments import exact_sums, mean_and_deviation
from tailwise.requests import NamedScoreRequest, ScoreRequest
from tailwise.steps.scoring.makers import ScoreWork
from tailwise.steps.scoring.mix import Mix
from tailwise.steps.scoring.scores import (
    SCORES,
    find_score,
    make_score,
    score_config,
    score_inputs,
    score_options,
    write_score,
)


def make_named_score(
    catalog: Catalog | str | Path, request: NamedScoreRequest, context: Context | None = None
) -> Mapping[str, Any]:
    """Give each sample of the newest snapshot a score that other commands find by its name.

    Args:
        catalog: or its path.
        request: the name, and where the score comes from.
        context: runs the tasks and shows progress.

    Returns:
        Figures: samples, scored (samples that have it); of a file also matched_by, names (distinct ones), names_matched (that belong to a
        sample), samples_matched.

    Raises:
        UserError: the name is that of a score there is, or the file, the head or the mix is not as it must be, or gives no sample a score.
    """
    context = context or Context()
    catalog = Catalog.open(catalog)
    if request.name in SCORES:
        raise UserError(f"`name` {request.name!r} is the name of a score that there always is: give another")
    place, snapshot = NAMED_SCORE.path(catalog.folder, request.name), catalog.snapshot()
    make: Callable[[ScoreWork], Mapping[str, Any] | None]
    if request.mix is not None:
        mix = Mix(request.mix)
        if request.name in mix.names:
            raise UserError(
                f"`mix` {request.mix}: {request.name} is the name of the mix itself: give it another `name`"
            )
        mixed = _Mixed.of(catalog, snapshot, request, mix)
        config, inputs, options, make = mixed.config, mixed.inputs, {}, mixed.make
    else:
        score = request.score
        config = {"score": score_config(score), "snapshot": snapshot.number}
        inputs = {"snapshot": snapshot.id, **score_inputs(catalog, snapshot, score)}
        options, make = score_options(score), find_score(score).make
    files = {name: str(path) for name in ("file", "head") if (path := getattr(request, name)) is not None}
    artifact = Artifact(place, "score", config, inputs, files=files)
    work = ScoreWork(catalog, snapshot, artifact.folder, request.name, options, context)
    folder = write_score(artifact, work, make, needed=True)
    return dict(read_record(folder / layout.MANIFEST)["summary"])


@dataclass(frozen=True)
class _Mixed:
    """A mix of scores."""

    mix: Mix
    scores: Mapping[str, ScoreRequest]  # by name
    survivors: Survivors  # over which scores are standardised
    config: dict[str, Any]
    inputs: dict[str, str]

    @classmethod
    def of(cls, catalog: Catalog, snapshot: Snapshot, request: NamedScoreRequest, mix: Mix) -> _Mixed:
        """Give each score of a mix the options that it takes; a UserError names an option that none takes."""
        scores = {}
        for name in mix.names:
            takes = SCORES[name].options if name in SCORES else ()
            scores[name] = ScoreRequest(name, {key: request.options[key] for key in takes if key in request.options})
        for idle in request.options.keys() - {key for score in scores.values() for key in score.options}:
            raise UserError(f"`{idle}` does nothing with the scores of `mix`: {', '.join(mix.names)}")
        survivors = Survivors(catalog, request.without, snapshot)
        inputs = {"snapshot": snapshot.id, **survivors.inputs}
        for name, score in scores.items():
            found = score_inputs(catalog, snapshot, score)
            inputs |= {
                label if label.startswith(str(NAMED_SCORE.prefix)) else f"{label} of {name}": value
                for label, value in found.items()
            }
        parts = [score_config(score) for score in scores.values()]
        config = {"mix": mix.text, "score": {"name": request.name, "of": parts}, "without": list(request.without)}
        return cls(mix, scores, survivors, {**config, "snapshot": snapshot.number}, inputs)

    def make(self, work: ScoreWork) -> None:
        """Write the mix."""
        columns = {
            name: make_score(work.catalog, work.snapshot, score, work.context) for name, score in self.scores.items()
        }
        moments = {name: self._moments(work, name, columns[name]) for name in sorted(self.mix.standardised)}
        for part in work.context.progress(work.parts, f"mixing {work.name}", len(work.parts)):
            values = {name: np.asarray(column.read(part)).astype(np.float64) for name, column in columns.items()}
            with np.errstate(all="ignore"):
                mixed = np.asarray(self.mix(values, moments), np.float64).astype(np.float32)
            work.column.write(part, mixed)

    def _moments(self, work: ScoreWork, name: str, column: PartColumn) -> tuple[float, float]:
        """Return mean and standard deviation of a score over the samples that no list drops and that have it."""
        sums = np.zeros_like(exact_sums(np.empty(0, np.float32)))
        for part in work.parts:
            values = column.read(part)[self.survivors.keeps(part.span)]
            values = values[~np.isnan(values)]
            if np.isinf(values).any():
                raise UserError(
                    f"z({name}) needs finite scores, and {name} is infinite for some samples: filter them first"
                )
            sums += exact_sums(values)
        if not sums[0].any():
            raise UserError(f"z({name}): not one sample that takes part has a {name}")
        mean, deviation = mean_and_deviation(sums)
        if not deviation > 0 or not math.isfinite(deviation):
            raise UserError(f"z({name}) means nothing: {name} is {mean:g} for all samples that take part; leave it out")
        return mean, deviation
