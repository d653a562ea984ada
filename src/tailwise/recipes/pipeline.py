"""A pipeline is a YAML file: the commands that take a pool from import to exports, in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tailwise.errors import UserError
from tailwise.recipes.recipe import as_mapping, check_values, with_folder
from tailwise.recipes.yaml_file import read_yaml
from tailwise.spelling import OLD_COMMANDS, new_spelling

FOLDER = Path(__file__).parent / "run"


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        command: its name.
        options: its options without the leading dashes, and its arguments by name; values as in YAML.
    """

    command: str
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Give command and options their present names."""
        object.__setattr__(self, "command", OLD_COMMANDS.get(self.command, self.command))
        options = {new_spelling(self.command, name): value for name, value in self.options.items()}
        object.__setattr__(self, "options", options)

    @property
    def label(self) -> str:
        """What tells it from other steps of the same command: command:name."""
        name = self.options.get("name")
        return f"{self.command}:{name}" if name is not None else self.command


@dataclass(frozen=True)
class Pipeline:
    """A pipeline as it was published, or measured.

    Attributes:
        name: short.
        about: what it does.
        source: where the settings come from.
        expect: what to expect of it, and who measured that.
        steps: at least one.
        sources: what is imported; may be left to the command line.
        catalog: where to; likewise.
        output: folder for exports; likewise.
    """

    name: str
    about: str
    source: str
    expect: Mapping[str, Any]
    steps: tuple[Step, ...]
    sources: tuple[str, ...] = field(default=())
    catalog: str | None = None
    output: str | None = None


def load_pipeline(name: str) -> Pipeline:
    """Reads a pipeline.

    Args:
        name: of a pipeline that comes with the package, or the path of a .yaml file.

    Raises:
        UserError: there is none of this name, or it isn't as it must be.
    """
    path, content = read_yaml(name, FOLDER)
    where = f"recipe {path}"
    values = as_mapping(where, content, [item.name for item in fields(Pipeline)])
    values = {"source": "", "expect": {}, **values}
    optional = [item for item in ("catalog", "output") if item in values]
    check_values(where, values, ("name", "about", "source", *optional), ("steps",))
    sources = texts_of(f"{where}: sources", values.get("sources", []))
    if not isinstance(values["steps"], list) or not values["steps"]:
        raise UserError(f"{where}: steps is {values['steps']!r}: must be a list of at least one step")
    steps = steps_of(where, with_folder(values["steps"], path.parent))
    return Pipeline(**{**values, "steps": steps, "sources": sources})


def texts_of(where: str, given: object) -> tuple[str, ...]:
    """Return a text, or a list of texts, as a tuple.

    Raises:
        UserError: it is neither.
    """
    values = [given] if isinstance(given, str) else given
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise UserError(f"{where} is {given!r}: must be a list of folders, files or patterns")
    return tuple(values)


def steps_of(where: str, given: object) -> tuple[Step, ...]:
    """Return a list of commands as steps.

    Raises:
        UserError: it is none.
    """
    if not isinstance(given, list):
        raise UserError(f"{where} is {given!r}: must be a list of commands")
    return tuple(_step(f"{where}, step {number}", item) for number, item in enumerate(given, 1))


def _step(where: str, content: object) -> Step:
    if not isinstance(content, Mapping) or len(content) != 1:
        raise UserError(
            f"{where} is {content!r}: must be one command and its options, such as cluster: {{clusters: 500}}"
        )
    ((command, options),) = content.items()
    if options is not None and not isinstance(options, Mapping):
        raise UserError(f"{where}: {command} is given {options!r}: must be options and values")
    return Step(str(command), {str(name).replace("_", "-"): value for name, value in (options or {}).items()})
