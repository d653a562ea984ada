"""A recipe is a YAML file: a training in one or several phases, and the results to expect.

`base: NAME` starts from another recipe. Each key of the file replaces the base's; `phases` lists what changes in each phase.

YAML is read within bounds, because a few bytes of aliases in a foreign recipe can unfold to gigabytes.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from tailwise.errors import NotFoundError, UserError
from tailwise.text import did_you_mean, is_unicode

MAX_BYTES = 256 * 1024  # of a file; tailwise's largest recipe has 3 KB
MAX_DEPTH = 50
MAX_DIGITS = 100  # of a whole number; Python refuses to print numbers of more than 4,300
MAX_NODES = 10_000  # values, with all aliases unfolded; 50 characters count as one more value
UNKNOWN = ("unexpected_keyword_argument", "invalid_key")
KINDS = {"integer": "a whole number", "number": "a number", "string": "text", "array": "a list"}
KINDS |= {"boolean": "true or false"}
BOUNDS = {"minimum": "of at least", "maximum": "and at most"}
T = TypeVar("T")
FOLDER = Path(__file__).parent
HERE = "{folder}"  # in a value: the recipe's folder
BASE = "base"  # key of the recipe that another one starts from
LENGTHS = ("epochs", "samples_seen")  # of a phase; one of them is given


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """PyYAML's safe loader, which also refuses deep nesting, aliases that unfold too far, and duplicate keys."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.name = "the text"  # for the places in errors
        self._depth = self._unfolded = 0
        self._sizes: dict[int, int] = {}  # of each composed node, by id

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        """Compose one node, and count its values with all aliases unfolded."""
        mark = self.peek_event().start_mark
        alias = self.check_event(yaml.AliasEvent)
        before, self._depth = self._unfolded, self._depth + 1
        if self._depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(None, None, f"is nested deeper than {MAX_DEPTH} levels", mark)
        node: yaml.Node = super().compose_node(parent, index)
        self._depth -= 1
        if alias and id(node) not in self._sizes:
            raise yaml.MarkedYAMLError(None, None, "an alias refers to the value that holds it", mark)
        own = 1 + (self._check(node) // 50 if isinstance(node, yaml.ScalarNode) else 0)
        self._unfolded += self._sizes[id(node)] if alias else own
        self._sizes.setdefault(id(node), self._unfolded - before)
        if self._unfolded > MAX_NODES:
            raise yaml.MarkedYAMLError(None, None, f"unfolds to more than {MAX_NODES:,} values", mark)
        return node

    @staticmethod
    def _check(node: yaml.ScalarNode) -> int:
        """Return the length of a value; refuse values that files, paths and messages cannot hold."""
        if node.tag.endswith(":int") and len(node.value) > MAX_DIGITS:
            raise yaml.MarkedYAMLError(None, None, f"holds a number of more than {MAX_DIGITS} digits", node.start_mark)
        if "\0" in node.value or not is_unicode(node.value):
            raise yaml.MarkedYAMLError(None, None, "holds a NUL or half a character", node.start_mark)
        return len(node.value)

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Compose a mapping whose keys differ."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[tuple[str, object]] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(None, None, f"has the key {key.value!r} twice", key.start_mark)
            seen.add((key.tag, key.value))
        return node


def parse_yaml(text: str, where: str) -> Any:  # noqa: ANN401  (whatever YAML holds)
    """Return the value of a YAML text, or raise a UserError that names it by `where`: "recipe r.yaml"."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: dates and numbers that do not exist
        raise UserError(f"{where} can't be read: {error}") from error


def read_yaml(name: str, folder: Path) -> tuple[Path, Any]:
    """Return path and content of a recipe: the `name` of one in `folder`, or the path of a regular .yaml file of at most MAX_BYTES."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    remedy = f"give {', '.join(sorted(item.stem for item in folder.glob('*.yaml')))}, or the path of a .yaml file"
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"recipe {path} is no regular file: {remedy}")
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f"recipe {path} is larger than {MAX_BYTES:,} bytes, which is the bound: shorten it")
        text = content.decode("utf-8")
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no recipe {name!r}: {remedy}") from error
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path with a NUL
        raise UserError(f"recipe {path} can't be read: {error}") from error
    return path, parse_yaml(text, f"recipe {path}")


def _named(given: object) -> object:
    if isinstance(given, Mapping):
        return {str(name): value for name, value in given.items()}
    return {} if given is None else given


Text = Annotated[str, Field(strict=True)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(lambda given: [given] if isinstance(given, str) else given or ())]
NAMED = BeforeValidator(_named)
Values = Annotated[Mapping[str, Any], NAMED]
Natural = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, ge=1)]


def read_as(kind: type[T], content: object, where: str, missing: str = "add it") -> T:
    """Return YAML content as a dataclass, whose annotations are the bounds.

    Raise a UserError if a name is unknown, or a value is missing or not allowed; it has the nearest known name, or what is allowed. `where`
    names the content in it ("recipe r.yaml"); `missing` is the remedy for a missing value, where KEY stands for its name.
    """
    adapter: TypeAdapter[list[T]] = TypeAdapter(list[kind], config={"extra": "forbid"})  # type: ignore[valid-type]
    try:
        return adapter.validate_python([content])[0]
    except ValidationError as failed:
        first = min(failed.errors(), key=lambda error: error["type"] not in UNKNOWN)
        raise UserError(_line(adapter.json_schema(), first, where, missing)) from None


def _line(root: dict[str, Any], error: Mapping[str, Any], where: str, missing: str) -> str:
    """Return an error message with the place of the error; the JSON schema `root` has names and bounds."""
    schema, places = root, [where]
    for part in error["loc"]:
        parent, listed, known = schema, "items" in schema, schema.get("properties", {})
        schema = parent.get("items") or known.get(part) or parent.get("additionalProperties") or {}
        schema = schema.get("anyOf", [schema])[0]  # the other alternative is null
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        if not listed:
            places.append(str(part))
        elif parent is not root:
            places[-1] = f"{places[-1].removesuffix('s')} {part + 1}"
    *outer, name = places
    value, above = error["input"], ", ".join(outer)
    if error["type"] in UNKNOWN:
        return f"{above} has {name!r}, which means nothing: {did_you_mean(name, known)}"
    if error["type"] == "missing" or (value is None and name in parent.get("required", ())):
        return f"{above} lacks {name!r}: {missing.replace('KEY', '.'.join(places[1:]))}"
    place = ", ".join(places) if listed else f"{above}: {name}"
    return f"{place} is {value!r}: {error.get('ctx', {}).get('error') or f'must be {_allowed(schema)}'}"


def _allowed(schema: Mapping[str, Any]) -> str:
    if names := schema.get("properties"):
        return f"names and values ({', '.join(names)})"
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    bounds = [f"{words} {schema[bound]:g}" for bound, words in BOUNDS.items() if bound in schema]
    return schema.get("description") or " ".join([KINDS.get(schema["type"], "names and values"), *bounds])


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
    captions: Values = field(default_factory=dict)  # weights of joined captions by name; empty for samples' own
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
    path, content = _read(name)
    where = f"recipe {path}"
    if isinstance(content, Mapping) and BASE in content:
        below, base = _read(read_as(Text, content[BASE], f"{where}: {BASE}"))
        if not isinstance(base, Mapping) or BASE in base:
            raise UserError(
                f"{where}: {BASE} is {content[BASE]!r}, which has a {BASE} itself or is no recipe: name another"
            )
        content = _changed(base, {key: value for key, value in content.items() if key != BASE}, where, below)
    recipe = read_as(Recipe, content, where)
    for number, phase in enumerate(recipe.phases, 1):
        if (phase.epochs is None) == (phase.samples_seen is None):
            raise UserError(f"{where}, phase {number}: give either epochs or samples_seen")
    return recipe


def _read(name: str) -> tuple[Path, Any]:
    path, content = read_yaml(name, FOLDER)
    return path, with_folder(content, path.parent)


def _changed(base: Mapping[str, Any], changes: Mapping[str, Any], where: str, below: Path) -> dict[str, Any]:
    """Return the content of a base with the changes of another recipe; a UserError if its phases are not those of the base."""
    content = {**base, **changes}
    phases, own = (given.get("phases") for given in (base, changes))
    if isinstance(phases, list) and own is not None:
        if not isinstance(own, list) or len(own) != len(phases):
            raise UserError(
                f"{where}: phases must list {len(phases)} changes, one for each phase of {below}; {{}} is none"
            )
        content["phases"] = [_changed_phase(*pair) for pair in zip(phases, own, strict=True)]
    return content


def _changed_phase(phase: Any, change: Any) -> Any:  # noqa: ANN401  (whatever YAML holds)
    if not isinstance(phase, Mapping) or not isinstance(change or {}, Mapping):
        return change
    change = change or {}
    kept = {key: value for key, value in phase.items() if key not in LENGTHS or not change.keys() & set(LENGTHS)}
    below, above = phase.get("open_clip"), change.get("open_clip")
    if isinstance(below, Mapping) and isinstance(above, Mapping):
        change = {**change, "open_clip": {**below, **above}}
    return {**kept, **change}


def with_folder(value: Any, folder: Path | str, mark: str = HERE) -> Any:  # noqa: ANN401  (whatever YAML holds)
    """Return a value of YAML with a folder, or a text, instead of a mark: by default the recipe's folder. All names become text."""
    if isinstance(value, str):
        return value.replace(mark, str(folder))
    if isinstance(value, Mapping):
        return {str(name): with_folder(item, folder, mark) for name, item in value.items()}
    return [with_folder(item, folder, mark) for item in value] if isinstance(value, list) else value
