"""The bridge from request classes to commands: a field becomes an option, with its default, and its docstring as help."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo

from tailwise.cli.app import app
from tailwise.errors import UserError
from tailwise.requests import OPTION

if TYPE_CHECKING:
    from tailwise.pipeline.steps import Command

PLAIN = (list[str], str, bool, int, float, Path)  # what Typer parses; of several, the first


def takes(request: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a request class; it is called with the request as `request`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [*inspect.signature(command, eval_str=True).parameters.values()]
        hints = get_type_hints(request)
        mappings = {name for name, hint in hints.items() if get_origin(hint) is Mapping}
        options = _options(request, hints)
        at = next(number for number, item in enumerate(own) if item.name == "request")

        def ready(**given: Any) -> Callable[..., None]:  # noqa: ANN401
            asked = {name: given.pop(name) for name in options}
            kept = {name: value for name, value in asked.items() if value is not None}
            pairs = {name: _pairs(name, value) for name, value in kept.items() if name in mappings}
            return partial(command, **given, request=request(**kept | pairs))

        def call(**given: Any) -> None:  # noqa: ANN401
            ready(**given)()

        call.ready = ready  # type: ignore[attr-defined]
        call.__name__, call.__doc__, call.__annotations__ = command.__name__, command.__doc__, {}
        parameters = [*own[:at], *options.values(), *own[at + 1 :]]
        call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in parameters]
        )
        return call

    return decorate


def step_commands() -> dict[str, Command]:
    """Return the commands that steps of recipes can be, as `run` takes them: by the signatures that Typer parses."""
    from pydantic import Field

    from tailwise.pipeline.steps import STEPS, Command, Option

    calls = {item.name or getattr(item.callback, "__name__", ""): item.callback for item in app.registered_commands}
    commands = {}
    for command in STEPS:
        call: Any = calls[command]
        options: dict[str, Option] = {}
        for item in inspect.signature(call, eval_str=True).parameters.values():
            hint, shown = get_args(item.annotation)
            kind, argument = _kind(hint), isinstance(shown, ArgumentInfo)
            spelt = shown.default if isinstance(shown.default, str) else item.name  # the first argument of typer.Option
            names = [name.lstrip("-") for name in spelt.replace("_", "-").split("/")]
            bounded = kind if shown.min is None else Annotated[kind, Field(ge=shown.min)]
            options |= dict.fromkeys(names, Option(item.name, names, bounded, item.default, argument))
        commands[command] = Command(options, getattr(call, "ready", partial(partial, call)))
    return commands


def _options(request: type, hints: Mapping[str, Any]) -> dict[str, inspect.Parameter]:
    helps = _helps(request)
    options = {}
    own = request.__annotations__
    for item in sorted(fields(request), key=lambda item: item.name not in own):  # those of a base come last
        name, kind = item.name, _kind(hints[item.name])
        needed = item.default is MISSING and item.default_factory is MISSING
        default = item.default if item.default is not MISSING and item.default not in ("", ()) else None
        shown = typer.Option(
            "/".join(f"--{each}" for each in _spelt(item)),
            help=helps[name],
            show_default=default is not None and kind is not bool,
            metavar="NAME=VALUE" if get_origin(hints[name]) is Mapping else None,
        )
        options[name] = inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if needed else default,
            annotation=Annotated[kind if needed or default is not None else kind | None, shown],
        )
    return options


def _spelt(item: Field[Any]) -> list[str]:
    """Return the names of the option of a field, without dashes: two for a switch."""
    names: str = item.metadata.get(OPTION, item.name.replace("_", "-"))
    return names.split("/")


def _helps(request: type) -> dict[str, str]:
    """Return the help of each option: what the docstrings of a class and its bases say of the fields."""
    docstrings = "\n".join(each.__doc__ or "" for each in request.__mro__)
    found = re.findall(r"^        (\w+): (.+(?:\n {12}.+)*)$", docstrings, re.MULTILINE)
    spelt = {item.name: _spelt(item)[0] for item in fields(request)}

    def option(name: re.Match[str]) -> str:
        return f"--{spelt.get(name[1], name[1].replace('_', '-'))}"

    return {name: re.sub(r"`(\w+)`", option, re.sub(r"\s*\n\s+", " ", text)) for name, text in found}


def _kind(hint: Any) -> Any:  # noqa: ANN401  (a type)
    """Return the type that Typer parses: a list of texts for sequences and mappings, else the plain type of a union."""
    if get_origin(hint) in {Mapping, Sequence}:
        return list[str]
    return next(each for each in PLAIN if each in {*get_args(hint), hint})


def _pairs(parameter: str, texts: list[str]) -> dict[str, float]:
    """Return texts NAME=VALUE as names and numbers; a UserError names the parameter."""
    pairs: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name in pairs:
            raise UserError(f"`{parameter}` {name} is given twice: give it once")
        try:
            pairs[name] = float(value)
        except ValueError as error:
            raise UserError(f"`{parameter}` {text!r}: give NAME=VALUE, with a number as value") from error
    return pairs
