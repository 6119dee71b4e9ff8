"""How every `sagan` command fails: one line on stderr and an exit code, no traceback."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

EXPECTED = (ArithmeticError, ImportError, NotImplementedError, OSError, TypeError, ValueError)
"""Errors that this package raises with a message made for users."""


class OneLineErrors(click.Group):
    """Ends every failure of every command with one line on stderr.

    Exit code 2 for usage, 130 for an interrupt, 1 for any other; SAGAN_TRACEBACK=1 adds the traceback.
    """

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run, and turn what is raised into an exit code."""
        try:
            result = super().main(*args, standalone_mode=False, **extra)  # type: ignore[call-overload]
        except Exception as error:
            if not standalone_mode:
                raise
            if isinstance(error, click.exceptions.NoArgsIsHelpError):
                error.show()
                sys.exit(error.exit_code)
            if os.environ.get("SAGAN_TRACEBACK"):
                traceback.print_exc()
            click.echo(f"sagan: {_one_line(error)}", err=True)
            sys.exit(_exit_code(error))
        if standalone_mode:
            sys.exit(result if isinstance(result, int) else 0)  # an int: the code of click's own --help
        return result


@contextmanager
def usage() -> Iterator[None]:
    """Inside, a wrong value or a missing file is the user's slip: exit code 2."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise click.UsageError(str(error)) from error


def _exit_code(error: Exception) -> int:
    if isinstance(error, click.exceptions.Abort):  # what click makes of an interrupt
        return 130
    return error.exit_code if isinstance(error, click.ClickException) else 1


def _one_line(error: Exception) -> str:
    if isinstance(error, click.exceptions.Abort):
        return "interrupted"
    if isinstance(error, click.ClickException):
        text = error.format_message()
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error)
        if not isinstance(error, EXPECTED):
            text = f"{type(error).__name__}: {text}; SAGAN_TRACEBACK=1 shows where"
    return " ".join(text.split()) or type(error).__name__
