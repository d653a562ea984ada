"""A pipeline is a YAML file: the commands that take a pool from import to exports, in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tailwise.errors import UserError
from tailwise.recipes.recipe import as_mapping, with_folder
from tailwise.recipes.yaml_file import read_yaml

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


def pipeline_names() -> list[str]:
    """Names of the pipelines that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_pipeline(name: str) -> Pipeline:
    """Reads a pipeline.

    Args:
        name: one of `pipeline_names()`, or the path of a .yaml file.

    Raises:
        UserError: there is none of this name, or it isn't as it must be.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    content = read_yaml(path, name, pipeline_names())
    where = f"recipe {path}"
    values = as_mapping(where, content, [item.name for item in fields(Pipeline)])
    values = {"source": "", "expect": {}, **values}
    for item in ("name", "about", "steps"):
        if item not in values:
            raise UserError(f"{where} lacks {item!r}: add it")
    for item in ("name", "about", "source", "catalog", "output"):
        if not isinstance(values.get(item, ""), str):
            raise UserError(f"{where}: {item} is {values[item]!r}: must be text")
    if not isinstance(values["expect"], Mapping):
        raise UserError(f"{where}: expect is {values['expect']!r}: must be names and values")
    given = values.get("sources", [])
    sources = [given] if isinstance(given, str) else given
    if not isinstance(sources, list) or not all(isinstance(item, str) for item in sources):
        raise UserError(f"{where}: sources is {given!r}: must be a list of folders, files or patterns")
    if not isinstance(values["steps"], list) or not values["steps"]:
        raise UserError(f"{where}: steps is {values['steps']!r}: must be a list of at least one step")
    placed = with_folder(values["steps"], path.parent)
    steps = tuple(_step(f"{where}, step {number}", item) for number, item in enumerate(placed, 1))
    return Pipeline(**{**values, "steps": steps, "sources": tuple(sources)})


def _step(where: str, content: object) -> Step:
    if not isinstance(content, Mapping) or len(content) != 1:
        raise UserError(
            f"{where} is {content!r}: must be one command and its options, such as cluster: {{clusters: 500}}"
        )
    ((command, options),) = content.items()
    if options is not None and not isinstance(options, Mapping):
        raise UserError(f"{where}: {command} is given {options!r}: must be options and values")
    return Step(str(command), {str(name).replace("_", "-"): value for name, value in (options or {}).items()})
