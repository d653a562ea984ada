"""Parts that all commands share: the application, opening of catalogs, progress, refusal of mistakes, and options made of requests."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer import Argument, Option
from typer.core import TyperGroup

from tailwise.cli.following import say_following, suggest_typed
from tailwise.cli.panels import into_panels
from tailwise.cli.printing import say
from tailwise.errors import UserError
from tailwise.log import is_quiet
from tailwise.requests import as_given, numbers_of
from tailwise.text import OLD_COMMANDS, dashed, new_spelling

if TYPE_CHECKING:
    from tailwise.catalog import Catalog
    from tailwise.context import Context
    from tailwise.execution.base import Executor
    from tailwise.plan.plan import Plan

# Parameters that errors of the library name, and that no command has by this name: the option that stands for each.
_ELSEWHERE = {"on_damaged": "--damaged", "cache_folder": "--cache", "max_memory_bytes": "--max-memory"}
_SAME = (
    *("set", "static", "accum_freq", "dist_url", "logs", "warmup", "pretrained", "imagenet_val", "imagenet_v2"),
    *("executor", "ray_address", "part", "skip_lost"),
)
_ELSEWHERE |= {name: dashed(name) for name in _SAME}
_TYPED: dict[str, str] = {}  # the options of this command: present spelling, and as they were typed
_TRIALS = {"compare": "--gate", "dedup": "--suggest"}  # options that have a command only print, beside --dry-run
PLAIN = (list[str], str, bool, int, float, Path)  # what Typer parses; of several, the first


def _respelled(command: str, word: str) -> str:
    """Return an option as it was typed, with its present name and its value."""
    option, sign, value = word.partition("=")
    new = f"--{new_spelling(command, option[2:])}" if option.startswith("--") else option
    _TYPED[new] = option
    return new + sign + value


class _Commands(TyperGroup):
    """The commands. Errors of the library name parameters in backticks; they leave here with the options of the command line."""

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401
        super().__init__(**settings)
        for name, command in {"tailwise": self, **self.commands}.items():
            into_panels(name, command.params)

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401  (Typer's own class, which differs from version to version)
        say_following(drop=True)  # of a command that failed
        try:
            result = super().invoke(ctx)
            say_following(drop="--json" in _TYPED)
            return result
        except UserError as error:
            error.args = (as_options(str(error), ctx.invoked_subcommand),)
            raise

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # noqa: ANN401
        """Find the command, with old spellings replaced in front of a `--`."""
        name, *words = args
        name = OLD_COMMANDS.get(name, name)
        own = words.index("--") if "--" in words else len(words)
        _TYPED.clear()
        trials = {"--dry-run", _TRIALS.get(name)}
        if trials & {*words[:own]}:
            suggest_typed(name, *(word for at, word in enumerate(words) if word not in trials or at > own))
        return super().resolve_command(ctx, [name, *(_respelled(name, word) for word in words[:own]), *words[own:]])


app = typer.Typer(
    cls=_Commands,
    help="Decide which image-text samples to train CLIP on, and in which epoch.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


@cache
def tree() -> Any:  # noqa: ANN401
    """Return all commands as the parser knows them."""
    return typer.main.get_command(app)


def is_typed(option: str) -> bool:
    """Return whether this command was given an option, --NAME."""
    return option in _TYPED


def as_options(message: str, command: str | None = None) -> str:
    """Return a message of the library, with the options of the command line instead of parameters in backticks."""
    commands = tree()
    options = dict(_ELSEWHERE)
    # Where a name has two options, that of the given command counts.
    for one in (*commands.commands.values(), *([commands.commands[command]] if command else [])):
        options |= {item.name: item.opts[0] for item in one.params if item.opts[0].startswith("--")}

    def shown(found: re.Match[str]) -> str:
        option = options.get(found[1], found[0])
        return _TYPED.get(option, option)

    return re.sub(r"`(\w+)`", shown, message)


def say_note(text: str, *, error: bool = False) -> None:
    """Print a note of the library, on standard error if `error`."""
    say(as_options(text), error=error)


def path_of(folder: str) -> Path:
    """Return the path of a catalog."""
    from tailwise.storage.store_path import path_of as path

    return path(folder)


def _plan_names(ctx: typer.Context) -> list[str]:
    """Return the plans of the catalog that stands before, for the Tab key."""
    from tailwise.catalog.kinds import PLAN

    with suppress(UserError, OSError):  # a store that cannot be reached: the shell would show the error as a name
        return PLAN.finished(ctx.params["catalog"]) if ctx.params.get("catalog") else []
    return []


CatalogPath = Annotated[
    Path, Argument(metavar="CATALOG", help="Folder of the catalog, or its URL (s3://, gs://, az://).", parser=path_of)
]
PlanName = Annotated[str, Argument(metavar="NAME", help="Name of the plan.", autocompletion=_plan_names)]
AsJson = Annotated[bool, Option("--json", help="Print figures as JSON.")]
Workers = Annotated[int | None, Option(min=1, help="Processes; one a processor by default.")]
AllowCode = Annotated[bool, Option("--allow-code", help="Let the recipe run its code and commands. Read it first.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace OUTPUT if it exists.")]


def open_catalog(path: Path) -> Catalog:
    """The catalog in a folder."""
    from tailwise.catalog import Catalog

    return Catalog.open(path)


def open_plan(path: Path, name: str) -> Plan:
    """A plan of the catalog in a folder."""
    from tailwise.plan.plan import Plan

    return Plan(open_catalog(path), name)


_asked: dict[str, Any] = {}  # of the executor, for this command
_opened: list[Executor] = []  # by this command, one at most


def choose_executor(**asked: str | bool | None) -> None:
    """Take arguments of `open_executor`, and check the name; values that were given before stay."""
    for name, value in asked.items():
        if value is not None:
            _asked.setdefault(name, value)
    if "name" in _asked:
        from tailwise.execution.executors import check_executor

        check_executor(_asked["name"])


def close_executor() -> None:
    """End the workers of a command, and forget which executor was asked for."""
    _asked.clear()
    while _opened:
        _opened.pop().close()


def with_progress() -> Context:
    """Return a context with the executor that was asked for; it shows progress, unless --quiet is given."""
    from tailwise.context import Context
    from tailwise.execution.executors import open_executor
    from tailwise.progress import bars, silent

    track = silent if is_quiet() else bars
    if not _opened:
        _opened.append(open_executor(**_asked, progress=track))
    return Context(track, _opened[0])


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
        mappings = {name: each for name in hints for each in get_args(hints[name]) if get_origin(each) is Mapping}
        vars(call).update(ready=ready, mappings=mappings, __signature__=signature)
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
