"""The bridge from request classes to commands: a field becomes an option, with its default and its help."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from tailwise.cli.app import is_typed
from tailwise.requests import as_given, numbers_of
from tailwise.text import dashed

PLAIN = (list[str], str, bool, int, float, Path)  # what Typer parses; of several, the first


def takes(request: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a request class; it is called with the request as `request`."""
    options, hints = _options(request), get_type_hints(request)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def ready(**given: Any) -> Callable[..., None]:  # noqa: ANN401
            asked = {name: value for name in options if (value := given.pop(name)) is not None}
            pairs = {name: numbers_of(name, asked[name]) for name in asked if get_origin(hints[name]) is Mapping}
            return partial(command, **given, request=request(**asked | pairs))

        def call(**given: Any) -> None:  # noqa: ANN401
            with as_given(name for name, option in options.items() if any(map(is_typed, spelt_out(option)))):
                made = ready(**given)
            made()

        own = inspect.signature(command, eval_str=True).parameters
        shown = [each for name in own for each in (options.values() if name == "request" else [own[name]])]
        signature = inspect.Signature([each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in shown])
        call.__name__, call.__doc__ = command.__name__, command.__doc__
        vars(call).update(ready=ready, __signature__=signature)
        return call

    return decorate


def _options(request: type) -> dict[str, inspect.Parameter]:
    """Return the options of a request class by field, those of a base last."""
    hints = {name: get_args(hint) for name, hint in get_type_hints(request, include_extras=True).items()}
    spelt = {name: more[0] if more else dashed(name) for name, (_, _, *more) in hints.items()}
    options = {}
    for item in sorted(fields(request), key=lambda item: item.name not in request.__annotations__):
        hint, text, *_ = hints[item.name]
        needed = item.default is MISSING and item.default_factory is MISSING
        default = None if item.default in (MISSING, "", ()) else item.default
        text = re.sub(r"`(\w+)`", lambda name: spelt.get(name[1], dashed(name[1])).partition("/")[0], text)
        shown = typer.Option(spelt[item.name], help=text, show_default=default is not False)
        shown.metavar = "NAME=VALUE" if get_origin(hint) is Mapping else None
        options[item.name] = inspect.Parameter(
            item.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if needed else default,
            annotation=Annotated[plain_type(hint) | None, shown],
        )
    return options


def spelt_out(option: inspect.Parameter) -> list[str]:
    """Return the names of an option on the command line: --NAME, and --NO-NAME of a switch that has one."""
    return str(get_args(option.annotation)[1].default).split("/")


def plain_type(hint: Any) -> Any:  # noqa: ANN401  (a type)
    """Return the type that Typer parses: a list of texts for sequences and mappings, else the plain type of a union."""
    if get_origin(hint) in {Mapping, Sequence}:
        return list[str]
    return next(each for each in PLAIN if each in {*get_args(hint), hint})
