"""Errors become a message and an exit code; logging is set up once."""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from secateur.errors import Interrupted, InvalidOptionError, SecateurError

EXIT_REFUSED = 3
EXIT_FAILED = 4  # a condition of --fail-if holds, or cells of a grid or checks of this machine failed
EXIT_INTERRUPTED = 130
_LESS_MEMORY = (
    "`secateur prune --dry-run` tells what a run takes; "
    "--dtype bfloat16, fewer --samples or a shorter --length take less"
)
LEVELS = ("debug", "info", "warning", "error")

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


def say(text: str, style: str | None = None) -> None:
    """Print for the reader: no markup in it, no colours of numbers."""
    out.print(text, style=style, markup=False, highlight=False)


def note(text: str) -> None:
    """The same beside the result, on stderr."""
    err.print(text, markup=False, highlight=False)


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn typed errors and Ctrl-C into messages on stderr and exit codes."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except SecateurError as error:
            err.print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False)
            _log("%s", error)
            raise typer.Exit(EXIT_REFUSED) from error
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            err.print(f"[bold red]error:[/] out of memory; {_LESS_MEMORY}", highlight=False)
            _log("out of memory: %s", error)
            raise typer.Exit(EXIT_REFUSED) from error
        except KeyboardInterrupt as interrupt:
            note(str(interrupt) if isinstance(interrupt, Interrupted) else "interrupted; no output was written")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:  # the reader of our output is gone, as in `secateur methods | head`
            sys.stderr.close()
            raise typer.Exit(0) from None

    return call


def _log(message: str, error: Exception) -> None:
    """For the log file. Where logging was not started, Python's last resort would print it once more."""
    if logging.getLogger("secateur").handlers:
        logging.getLogger("secateur.cli").error(message, error)


def start_logging(level: str, file: Path | None) -> None:
    """Log to stderr, and to a file if there is one."""
    if level.lower() not in LEVELS:
        raise InvalidOptionError(f"--log-level is one of {', '.join(LEVELS)}, not {level!r}")
    logger = logging.getLogger("secateur")
    logger.setLevel(level.upper() if file is None else min(logging.INFO, logging.getLevelName(level.upper())))
    screen = logging.StreamHandler()
    screen.setLevel(level.upper())
    screen.addFilter(lambda record: record.name != "secateur.cli")  # printed already
    screen.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    handlers: list[logging.Handler] = [screen]
    if file is not None:
        try:
            handlers.append(logging.FileHandler(file, encoding="utf-8"))
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            why = getattr(error, "strerror", None) or error
            raise InvalidOptionError(f"--log-file {str(file)[:200]} cannot be written: {why}") from error
        handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    for old in logger.handlers:
        old.close()
    logger.handlers = handlers
    logger.propagate = False
    warnings.simplefilter("once")


def _escape(text: str) -> str:
    """No markup, and no character that the terminal cannot show (half of a surrogate pair: a byte that is no UTF-8)."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("[", "\\[")


def _out_of_memory(error: Exception) -> bool:
    """torch has one class for a device's memory and, on the CPU, a plain RuntimeError."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)
