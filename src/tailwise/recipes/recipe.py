"""A recipe is a YAML file: a training in one or several phases, and the results to expect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from tailwise.errors import UserError
from tailwise.recipes.schema import Positive, Text, Values, read_as
from tailwise.recipes.yaml_file import read_yaml

FOLDER = Path(__file__).parent
HERE = "{folder}"  # in a value: the recipe's folder


@dataclass(frozen=True)
class Phase:
    """One training with its own optimizer and schedule; each phase after the first starts from the weights of the one before."""

    epochs: Positive | None = None  # epochs of the plan; None with `samples_seen`
    samples_seen: Positive | None = None  # number of samples; None with `epochs`
    checkpoint_every: Positive | None = None  # most batches between checkpoints; None for a twentieth of the training
    # samples per optimizer step, over all ranks and accumulation; None to leave it to `batch_size`
    global_batch: Positive | None = None
    lanes: Positive | None = None  # see `tailwise.Loader`; None for the default
    block: Positive | None = None  # see `tailwise.Loader`; None for the default
    compose: Text | None = None  # see `tailwise.Loader`; None for the default
    open_clip: Values = field(default_factory=dict)  # arguments of open_clip's trainer, without the dashes


@dataclass(frozen=True)
class Recipe:
    """A training as it was published or measured."""

    name: Text  # short name
    about: Text  # description of the training
    source: Text  # where the settings come from
    command: Text  # command that runs it
    plan: Text  # the `tailwise plan` command that it is meant for
    expect: Values  # hardware, time and scores, and who measured them
    phases: Annotated[tuple[Phase, ...], Field(min_length=1, description="a list of at least one phase")]


def load_recipe(name: str) -> Recipe:
    """Return a valid recipe: the `name` of one that comes with tailwise, or the path of a .yaml file."""
    path, content = read_yaml(name, FOLDER)
    recipe = read_as(Recipe, with_folder(content, path.parent), f"recipe {path}")
    for number, phase in enumerate(recipe.phases, 1):
        if (phase.epochs is None) == (phase.samples_seen is None):
            raise UserError(f"recipe {path}, phase {number}: give either epochs or samples_seen")
    return recipe


def with_folder(value: Any, folder: Path, mark: str = HERE) -> Any:  # noqa: ANN401  (whatever YAML holds)
    """Return a value of YAML with a folder instead of a mark: by default the recipe's folder."""
    if isinstance(value, str):
        return value.replace(mark, str(folder))
    if isinstance(value, Mapping):
        return {name: with_folder(item, folder, mark) for name, item in value.items()}
    return [with_folder(item, folder, mark) for item in value] if isinstance(value, list) else value
