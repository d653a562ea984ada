"""A pipeline is a YAML file: the commands that take a pool from import to exports, in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from tailwise.recipes.recipe import with_folder
from tailwise.recipes.schema import Text, Texts, Values, read_as
from tailwise.recipes.yaml_file import read_yaml
from tailwise.spelling import OLD_COMMANDS, new_spelling

FOLDER = Path(__file__).parents[1] / "recipes" / "run"


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        command: its name.
        options: its options without the leading dashes, and its arguments by name; values as in YAML.
    """

    command: str
    options: Values

    def __post_init__(self) -> None:
        """Give command and options their present names."""
        object.__setattr__(self, "command", OLD_COMMANDS.get(self.command, self.command))
        options = {new_spelling(self.command, name.replace("_", "-")): value for name, value in self.options.items()}
        object.__setattr__(self, "options", options)

    @property
    def label(self) -> str:
        """What tells it from other steps of the same command: command:name."""
        name = self.options.get("name")
        return f"{self.command}:{name}" if name is not None else self.command


def _command_and_options(content: object) -> object:
    if isinstance(content, Mapping) and len(content) == 1:
        ((command, options),) = content.items()
        if options is None or isinstance(options, Mapping):
            return {"command": str(command), "options": options}
    raise ValueError("must be one command and its options, such as cluster: {k: 500}")


Steps = tuple[Annotated[Step, BeforeValidator(_command_and_options)], ...]


@dataclass(frozen=True)
class Pipeline:
    """A pipeline as it was published, or measured.

    Attributes:
        name: short.
        about: what it does.
        steps: at least one.
        source: where the settings come from.
        expect: what to expect of it, and who measured that.
        sources: what is imported; may be left to the command line.
        catalog: where to; likewise.
        output: folder for exports; likewise.
    """

    name: Text
    about: Text
    steps: Annotated[Steps, Field(min_length=1, description="a list of at least one step")]
    source: Text = ""
    expect: Values = field(default_factory=dict)
    sources: Texts = ()
    catalog: Text | None = None
    output: Text | None = None


def load_pipeline(name: str) -> Pipeline:
    """Reads a pipeline.

    Args:
        name: of a pipeline that comes with the package, or the path of a .yaml file.

    Raises:
        UserError: there is none of this name, or it isn't as it must be.
    """
    path, content = read_yaml(name, FOLDER)
    return read_as(Pipeline, with_folder(content, path.parent), f"recipe {path}")
