# ruff: noqa: F401  (modules are imported to register their commands)
"""The command line: parse, call, print. Everything heavy is imported inside the commands, so that --help answers at once."""

from __future__ import annotations

import inspect
import io
import itertools
import logging
import os
import re
import resource
import shlex
import signal
import sys
import traceback
import warnings
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from types import TracebackType
from typing import Annotated, NoReturn

import typer
from typer import Option

from tailwise import __version__
from tailwise.cli import demo, evaluate, plan, pool, prepare, removal, report, run
from tailwise.cli.app import app, choose_executor, close_executor, say_note
from tailwise.cli.panels import STEPS
from tailwise.cli.printing import say
from tailwise.errors import PartDoneError, UserError
from tailwise.log import LOGGER, print_error, show_log
from tailwise.text import is_unicode, plain

__all__ = ["app", "main"]

COMMANDS = tuple(itertools.chain(*STEPS.values()))  # in the order of the work
IN_PARTS = ("embed", "filter", "cluster")  # commands that --part can divide
MOST_FILES = 65_536
SHARED = ("--quiet", "--verbose", "--skip-lost")  # options of all commands
SHARED_VALUES = ("--executor", "--ray-address", "--part")  # those with a value
for command in app.registered_commands:  # in Markdown, each example has to be a paragraph
    command.name = command.name or getattr(command.callback, "__name__", "")
    command.help = re.sub(r"\n(?= *tailwise )", "\n\n", inspect.getdoc(command.callback) or "")
    command.rich_help_panel = next(step for step, names in STEPS.items() if command.name in names)
app.registered_commands.sort(key=lambda command: COMMANDS.index(command.name or ""))


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, Option("--version", help="Print the version.", is_eager=True)] = False,
    quiet: Annotated[bool, Option("--quiet", help="Print only JSON, warnings and errors.")] = False,
    verbose: Annotated[bool, Option("--verbose", help="Show what each step does, on standard error.")] = False,
    executor: Annotated[
        str | None, Option(envvar="TAILWISE_EXECUTOR", help="Where work runs: local or ray.  [default: local]")
    ] = None,
    ray_address: Annotated[
        str | None,
        Option(
            envvar="TAILWISE_RAY_ADDRESS",
            help="Ray cluster: auto, HOST:PORT, ray://HOST:PORT, or local to start one here.  [default: auto]",
        ),
    ] = None,
    part: Annotated[
        str | None,
        Option(
            metavar="I/N",
            help="embed, filter, cluster --extends: run part I of N of the items, beside other processes; then run without.",
        ),
    ] = None,
    skip_lost: Annotated[
        bool,
        Option(
            "--skip-lost",
            envvar="TAILWISE_SKIP_LOST",
            help="On Ray: if an item kills its worker three times, run all others before the command fails.",
        ),
    ] = False,
) -> None:
    if version:
        say(f"tailwise {__version__}")
        raise typer.Exit
    if quiet and verbose:
        raise UserError("--quiet and --verbose cannot be combined: give one of them")
    if context.invoked_subcommand is None:
        raise UserError("no command is given: tailwise --help lists all commands")
    if quiet or verbose:
        show_log(logging.WARNING if quiet else logging.DEBUG)
    if part is not None and context.invoked_subcommand not in IN_PARTS:
        raise UserError(f"--part is for {', '.join(IN_PARTS)}: run {context.invoked_subcommand} without it")
    choose_executor(name=executor or None, ray_address=ray_address or None, skip_lost=skip_lost or None, part=part)
    LOGGER.debug("tailwise %s, Python %s", __version__, sys.version)


class _InterruptedError(BaseException):
    """Ctrl-C, or SIGTERM; not a KeyboardInterrupt, which Typer would end the process on without a word."""


_interrupts: list[int] = []  # signals that came


def _interrupt(number: int, _: object) -> None:
    _interrupts.append(number)
    raise _InterruptedError


def _run(words: list[str]) -> None:
    """Run a command. An error that comes from an interruption is raised as one: another rank has ended, or a library caught it."""
    try:
        for word in words:
            if not is_unicode(word):
                raise UserError(f"{word!r} is not UTF-8: arguments and paths must be; rename the file")
        sys.exit(app(words, prog_name="tailwise", standalone_mode=False))
    except Exception:
        if any(_interrupts):  # or this call lets a waiting signal raise
            raise _InterruptedError from None
        raise


def main() -> None:
    """Runs the command line: exit code 0 ok, 1 failed, 2 the user's mistake."""
    if sys.getfilesystemencoding() != "utf-8":  # of a locale that knows other letters only; keys and paths are UTF-8
        os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding}:replace")  # the terminal knows no more
        words = [sys.executable, "-X", "utf8", "-m", "tailwise", *sys.argv[1:]]
        os.execv(sys.executable, [word.encode("utf-8", "surrogateescape") for word in words])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    _show_foreign_text_safely()
    show_log(logging.INFO)
    with suppress(OSError, ValueError):  # large catalogs have many files
        now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MOST_FILES if most == resource.RLIM_INFINITY else min(most, MOST_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, wanted), most))
    try:
        _run(_shared_first(sys.argv[1:]))
    except PartDoneError as end:
        say_note(str(end))
        sys.exit(0)
    except (UserError, BrokenExecutor, OSError, ArithmeticError) as error:
        _fail(error)
    except _InterruptedError:
        for number in (signal.SIGINT, signal.SIGTERM):  # torchrun sends it twice; the advice is printed whole
            signal.signal(number, signal.SIG_IGN)
        if os.environ.get("RANK", "0") == "0":  # of several ranks, one gives the advice
            print_error(f"tailwise: interrupted; {_how_to_resume(sys.argv[1:])}")
        sys.exit(1)
    except Exception as error:
        if not hasattr(error, "format_message"):  # Typer's own errors, whose class differs from version to version
            raise
        if message := error.format_message():  # without one, the help was printed
            command = getattr(getattr(error, "ctx", None), "command_path", "tailwise")
            print_error(f"tailwise: {message.rstrip('.')} (see {command} --help)")
        sys.exit(2)
    finally:
        sys.excepthook = _print_traceback  # Typer has put its own there
        close_executor()


def _fail(error: Exception) -> NoReturn:
    if isinstance(error, OSError):
        from tailwise.catalog.files import refuse_many_files

        try:
            refuse_many_files(error)
        except UserError as refused:
            error = refused
    if isinstance(error, OSError) and error.filename is not None and error.strerror:  # without the number
        error = OSError(f"{error.filename}: {error.strerror}")
    killed = "a worker process was killed (out of memory?); try fewer --workers"
    print_error(f"tailwise: {killed if isinstance(error, BrokenExecutor) else error}")
    sys.exit(2 if isinstance(error, UserError) else 1)


class _PlainRecord(logging.LogRecord):
    """A log record of any library, made safe to show on one line."""

    def getMessage(self) -> str:  # noqa: N802  (logging's name)
        return "\n".join(map(plain, super().getMessage().split("\n")))


def _show_foreign_text_safely() -> None:
    """Make all that libraries print, log and warn of safe for the terminal: it may quote keys, captions and paths."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows only ASCII gets "?" for the rest
    logging.setLogRecordFactory(_PlainRecord)
    warnings.formatwarning = lambda message, category, *_, **__: f"{category.__name__}: {plain(message)}\n"


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    for line in "".join(traceback.format_exception(kind, error, trace)).splitlines():
        print_error(line)


def _shared_first(words: list[str]) -> list[str]:
    """Return the words with the options of all commands in front: they may also stand after the command, before a --."""
    return [*itertools.chain(*_split_shared(words))]


def _split_shared(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the options of all commands, with their values, and all other words."""
    at = [*words, "--"].index("--")
    shared, own, left = list[str](), list[str](), iter(words[:at])
    for word in left:
        (shared if word.partition("=")[0] in SHARED + SHARED_VALUES else own).append(word)
        if word in SHARED_VALUES:
            shared += itertools.islice(left, 1)
    return shared, [*own, *words[at:]]


def _how_to_resume(words: list[str]) -> str:
    """Return the advice after an interruption: a training needs --resume, all other commands resume by themselves."""
    at = words.index("--") if "--" in words else len(words)
    if _split_shared(words)[1][:1] != ["train"] or "--resume" in words[:at]:
        return "run the same command again to go on"
    command = shlex.join([*words[:at], "--resume", *words[at:]])
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return f"to go on, start the same ranks with: -m tailwise {command}"
    return f"to go on, run: tailwise {command}"
