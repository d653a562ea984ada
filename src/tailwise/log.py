"""The log of the package: one logger, and how the command line shows it."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

from tailwise.text import plain

LOGGER = logging.getLogger("tailwise")  # the parent of all loggers of the package
LEVEL = "TAILWISE_LOG_LEVEL"  # environment variable that hands the level on to worker processes


class _Lines(logging.Handler):
    """Shows a record as one line on standard error: a note as it is, others with their level, details with time and module."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno == logging.INFO else f"tailwise: {record.levelname.lower()}: "
        detail = f"{record.relativeCreated / 1000:.1f} s, {record.name}: " if record.levelno < logging.INFO else ""
        print_error(f"{level}{detail}{record.getMessage()}")


def show_log(level: int) -> None:
    """Show the package's log, in worker processes too, from a level on: WARNING is --quiet, DEBUG --verbose."""
    os.environ[LEVEL] = str(level)
    LOGGER.setLevel(level)
    if not LOGGER.handlers:
        LOGGER.addHandler(_Lines())
    LOGGER.propagate = False  # open_clip's trainer would show it again


def is_quiet() -> bool:
    """Return whether only JSON, warnings and errors are printed."""
    return LOGGER.level >= logging.WARNING


def print_error(line: object) -> None:
    """Print one line on standard error, with --quiet too."""
    write_line(sys.stderr, line)


def write_line(stream: TextIO, line: object) -> None:
    """Write a line and its end at once: lines of several processes do not mix, even where Python's streams have no buffer."""
    stream.write(f"{plain(line)}\n")
    stream.flush()
