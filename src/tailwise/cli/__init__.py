# ruff: noqa: A004, F401  (modules are imported to register their commands)
"""The command line: parse, call, print. Everything heavy is imported inside the commands, so that --help answers at once."""

from __future__ import annotations

import io
import signal
import sys
from concurrent.futures import BrokenExecutor
from typing import Annotated

import typer

from tailwise import __version__
from tailwise.cli import (
    cluster,
    compare,
    dedup,
    demo,
    embed,
    evaluate,
    export,
    filter,
    group,
    plan,
    pool,
    removal,
    run,
    train,
)
from tailwise.cli.app import app
from tailwise.errors import UserError
from tailwise.printing import say

__all__ = ["app", "main"]

# All commands, in the order of the work; --help lists them so.
COMMANDS = (
    *("import", "embed", "dedup", "filter", "cluster", "group", "plan", "explain"),
    *("draw", "export", "train", "evaluate", "compare", "run"),
    *("status", "why", "removed", "remove", "verify", "relocate", "demo"),
)
app.registered_commands.sort(
    key=lambda command: COMMANDS.index(command.name or getattr(command.callback, "__name__", ""))
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        say(f"tailwise {__version__}")
        raise typer.Exit


class _InterruptedError(BaseException):
    """Ctrl-C, or SIGTERM; not a KeyboardInterrupt, which Typer would end the process on without a word."""


def _interrupt(*_: object) -> None:
    raise _InterruptedError


def main() -> None:
    """Runs the command line: exit code 0 ok, 1 failed, 2 the user's mistake."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows only ASCII gets "?" for the rest
    try:
        app()
    except UserError as error:
        say(f"tailwise: {error}", error=True)
        sys.exit(2)
    except BrokenExecutor:
        say("tailwise: a worker process was killed (out of memory?); try fewer --workers", error=True)
        sys.exit(1)
    except (OSError, ArithmeticError) as error:
        say(f"tailwise: {error}", error=True)
        sys.exit(1)
    except _InterruptedError:
        say("tailwise: interrupted; run the same command again to go on", error=True)
        sys.exit(1)
