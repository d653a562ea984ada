"""A recipe is a YAML file: what is trained, in one or several phases, and what to expect of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tailwise.errors import UserError
from tailwise.recipes.yaml_file import read_yaml
from tailwise.text import did_you_mean

FOLDER = Path(__file__).parent
HERE = "{folder}"  # in a value: the folder that the recipe lies in


@dataclass(frozen=True)
class Phase:
    """One training with its own optimizer and schedule; each but the first starts from the weights that the one before it left.

    Attributes:
        epochs: of the plan; or None.
        samples_seen: in place of epochs; or None.
        checkpoint_every: batches between checkpoints, at most; None for a twentieth of the training.
        global_batch: samples per optimizer step, over all ranks and accumulation; None to leave it to `batch_size`.
        lanes: see `tailwise.loader.Loader`; None for the default.
        block: likewise.
        compose: likewise.
        open_clip: arguments of open_clip's trainer, without the dashes.
    """

    epochs: int | None = None
    samples_seen: int | None = None
    checkpoint_every: int | None = None
    global_batch: int | None = None
    lanes: int | None = None
    block: int | None = None
    compose: str | None = None
    open_clip: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A training as it was published, or measured.

    Attributes:
        name: short.
        about: what it trains.
        source: where the settings come from.
        command: how to run it.
        plan: the `tailwise plan` command that it is meant for.
        expect: hardware, time and scores, and who measured them.
        phases: at least one.
    """

    name: str
    about: str
    source: str
    command: str
    plan: str
    expect: Mapping[str, Any]
    phases: tuple[Phase, ...]


def load_recipe(name: str) -> Recipe:
    """Reads a recipe.

    Args:
        name: of a recipe that comes with the package, or the path of a .yaml file.

    Raises:
        UserError: there is none of this name, or it isn't as it must be.
    """
    return _recipe(*read_yaml(name, FOLDER))


def _recipe(path: Path, content: object) -> Recipe:
    where = f"recipe {path}"
    values = as_mapping(where, content, [item.name for item in fields(Recipe)])
    check_values(where, values, ("name", "about", "source", "command", "plan"), ("expect", "phases"))
    if not isinstance(values["phases"], list) or not values["phases"]:
        raise UserError(f"{where}: phases is {values['phases']!r}: must be a list of at least one phase")
    phases = tuple(
        _phase(f"{where}, phase {number}", item, path.parent) for number, item in enumerate(values["phases"], 1)
    )
    return Recipe(**{**values, "phases": phases})


def _phase(where: str, content: object, folder: Path) -> Phase:
    values = as_mapping(where, content, [item.name for item in fields(Phase)])
    for name in ("epochs", "samples_seen", "checkpoint_every", "global_batch", "lanes", "block"):
        value = values.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"{where}: {name} is {value!r}: must be a whole number of at least 1")
    if (values.get("epochs") is None) == (values.get("samples_seen") is None):
        raise UserError(f"{where}: give either epochs or samples_seen")
    if not isinstance(values.get("compose", ""), str):
        raise UserError(f"{where}: compose is {values['compose']!r}: must be text")
    arguments = values.get("open_clip") or {}
    if not isinstance(arguments, Mapping):
        raise UserError(f"{where}: open_clip is {arguments!r}: must be arguments and values")
    placed = {str(name): with_folder(value, folder) for name, value in arguments.items()}
    return Phase(**{**values, "open_clip": placed})


def with_folder(value: Any, folder: Path) -> Any:  # noqa: ANN401  (whatever YAML holds)
    """The same, with the recipe's folder in place of {folder}."""
    if isinstance(value, str):
        return value.replace(HERE, str(folder))
    if isinstance(value, Mapping):
        return {name: with_folder(item, folder) for name, item in value.items()}
    return [with_folder(item, folder) for item in value] if isinstance(value, list) else value


def check_values(
    where: str, values: Mapping[str, Any], texts: Collection[str], others: Collection[str] = (), remedy: str = "add it"
) -> None:
    """Refuse values of a recipe that lack one of `texts` or `others`, or hold another kind of value.

    Raises:
        UserError: one is missing, one of `texts` is no text, or "expect" no mapping.
    """
    for name in (*texts, *others):
        if values.get(name) is None:
            raise UserError(f"{where} lacks {name!r}: {remedy.format(name=name)}")
    for name in texts:
        if not isinstance(values[name], str):
            raise UserError(f"{where}: {name} is {values[name]!r}: must be text")
    if not isinstance(values.get("expect", {}), Mapping):
        raise UserError(f"{where}: expect is {values['expect']!r}: must be names and values")


def as_mapping(where: str, content: object, known: Collection[str]) -> dict[str, Any]:
    """`content`, if it is names and values, and all names are known.

    Raises:
        UserError: it isn't; names the nearest known name.
    """
    if not isinstance(content, Mapping):
        raise UserError(f"{where} is {type(content).__name__}, not names and values ({', '.join(known)})")
    for name in content:
        if name not in known:
            raise UserError(f"{where} has {name!r}, which means nothing: {did_you_mean(name, known)}")
    return dict(content)
