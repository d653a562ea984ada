"""A pipeline is a YAML file: the commands that take a pool from import to exports, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tailwise.errors import UserError
from tailwise.recipes.recipe import Text, Texts, Values, read_as, read_yaml, with_folder
from tailwise.text import OLD_COMMANDS, new_spelling

FOLDER = Path(__file__).parents[1] / "recipes" / "run"
STEPS = (
    "import",
    "captions",
    "concepts",
    "embed",
    "dedup",
    "score",
    "filter",
    "cluster",
    "group",
    "plan",
    "train",
    "draw",
    "export",
    "excluded",
)
TRAINER = "open-clip"  # option of train: the arguments of open_clip's trainer, by name


@dataclass(frozen=True)
class Step:
    """One command."""

    command: str  # its name
    options: Values  # its options without the leading dashes, and its arguments by name; values as in YAML

    def __post_init__(self) -> None:
        """Give command and options their present names."""
        object.__setattr__(self, "command", OLD_COMMANDS.get(self.command, self.command))
        options = {new_spelling(self.command, name.replace("_", "-")): value for name, value in self.options.items()}
        object.__setattr__(self, "options", options)

    @property
    def label(self) -> str:
        """Label that distinguishes steps of the same command: command:name, and embed:column."""
        name = self.options.get("column" if self.command == "embed" else "name")
        return f"{self.command}:{name}" if name is not None else self.command


@dataclass(frozen=True)
class Option:
    """An option or an argument of a command, as a step gives it."""

    parameter: str  # name in Python
    names: Sequence[str]  # names in recipes; a switch may have a second one, which turns it off
    kind: Any  # type of the value
    default: Any  # value that it has where the step does not give it; `inspect.Parameter.empty` if the step has to
    argument: bool  # whether it stands without its name on the command line
    mapping: Any = None  # type of a mapping that a recipe may give in place of a text

    def read(self, name: str, value: object) -> Any:  # noqa: ANN401  (of the option's kind)
        """Return a value of YAML, or a text, as the command takes it; a UserError says what is allowed. The path of the catalog stays."""
        if isinstance(value, PurePath):
            return value
        if self.mapping is not None and isinstance(value, Mapping):
            return read_as(self.mapping, value, name)
        if self.kind == list[str]:
            pairs = [f"{key}={item}" for key, item in value.items()] if isinstance(value, Mapping) else value
            return [str(each) for each in (pairs if isinstance(pairs, list) else [pairs])]
        if self.kind is bool:
            return read_as(bool, value, name) == (name == self.names[0])
        return read_as(self.kind, value if isinstance(value, list | Mapping) else str(value), name)


@dataclass(frozen=True)
class Command:
    """A command that a step can be."""

    options: Mapping[str, Option]  # all that it takes, by the names in recipes, in the order of the command line
    # takes the values of all parameters; returns the call, with its request made and checked
    ready: Callable[..., Callable[..., None]]

    def words(self, given: Mapping[str, Any]) -> list[str]:
        """Return what a user would type after the command, for values by name."""
        flags: list[str] = []
        arguments: dict[str, list[str]] = {}
        for name, value in given.items():
            if isinstance(value, Mapping):
                value = ",".join(f"{key}={item}" for key, item in value.items())  # noqa: PLW2901
            option, texts = self.options[name], [str(each) for each in (value if isinstance(value, list) else [value])]
            if option.argument:
                if name != TRAINER and any(text.startswith("-") for text in texts):  # the line would give an option
                    raise UserError(f"{name} is {value!r}: must not begin with a dash")
                arguments[name] = ["--"] * (name == TRAINER) + texts
            elif option.kind is bool:
                flags += [f"--{shown}" for shown in option.names[not value :][:1]]
            else:
                flags += [word for text in texts for word in (f"--{name}", text)]
        return [*flags, *(text for name in self.options for text in arguments.get(name, ()))]


def _command_and_options(content: object) -> object:
    if isinstance(content, Mapping) and len(content) == 1:
        ((command, options),) = content.items()
        if options is None or isinstance(options, Mapping):
            return {"command": str(command), "options": options}
    raise ValueError("must be one command and its options, such as cluster: {k: 500}")


Steps = tuple[Annotated[Step, BeforeValidator(_command_and_options)], ...]


@dataclass(frozen=True)
class Pipeline:
    """A pipeline as it was published, or measured."""

    name: Text  # short
    about: Text  # what it does
    steps: Annotated[Steps, Field(min_length=1, description="a list of at least one step")]
    source: Text = ""  # where the settings come from
    expect: Values = field(default_factory=dict)  # what to expect of it, and who measured that
    sources: Texts = ()  # what is imported; may be left to the command line
    catalog: Text | None = None  # where to; may be left to the command line
    output: Text | None = None  # folder for exports; may be left to the command line
    executor: Text | None = None  # where work runs; the command line and the environment go first
    ray_address: Text | None = None  # cluster of the executor ray


def load_pipeline(name: str) -> Pipeline:
    """Return a valid pipeline: the `name` of one that comes with tailwise, or the path of a .yaml file."""
    path, content = read_yaml(name, FOLDER)
    return read_as(Pipeline, with_folder(content, path.parent), f"recipe {path}")


def with_settings(steps: Sequence[Step], settings: Sequence[str]) -> list[Step]:
    """Return steps with other options, given as STEP.OPTION=VALUE; STEP is a label, or a command that only one step has."""
    changed = list(steps)
    for text in settings:
        target, _, value = text.partition("=")
        label, dot, option = target.rpartition(".")
        found = [step for step in changed if label == step.label] or [step for step in changed if label == step.command]
        if not dot or not value or len(found) != 1:
            labels = ", ".join(step.label for step in steps)
            raise UserError(f"`settings` {text!r}: give STEP.OPTION=VALUE, where STEP is one of {labels}")
        setting = Step(found[0].command, {option: value})
        changed[changed.index(found[0])] = Step(setting.command, {**found[0].options, **setting.options})
    return changed
