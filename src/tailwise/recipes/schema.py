"""Recipes as dataclasses: pydantic checks YAML values against their annotations, and an error becomes one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from tailwise.errors import UserError
from tailwise.text import did_you_mean

UNKNOWN = ("unexpected_keyword_argument", "invalid_key")
KINDS = {"integer": "a whole number", "number": "a number", "string": "text", "array": "a list"}
KINDS |= {"boolean": "true or false"}
BOUNDS = {"minimum": "of at least", "maximum": "and at most"}
T = TypeVar("T")


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
