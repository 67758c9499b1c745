"""Run a verb that is one function: its signature is the command line, its ``Args:`` the help."""

import inspect
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jsonargparse import ArgumentParser

from fine_tune.errors import UserError, nearest
from fine_tune.quiet import start_console

POSITIONAL = "run"  # what may be typed without a flag


def run_function(verb: str, function: Callable[..., Any], args: list[str]) -> int:
    """Parse ``args`` by the function's signature and call it; return the exit code."""
    start_console()
    parser = ArgumentParser(prog=f"python -m fine_tune {verb}", exit_on_error=False)
    positional = POSITIONAL in inspect.signature(function).parameters
    parser.add_argument("--config", action="config", help="YAML file of these settings")
    parser.add_function_arguments(function, as_positional=positional)
    known = [option for action in parser._actions for option in action.option_strings]
    unknown = [
        arg.split("=")[0] for arg in args if arg.startswith("--") and arg.split("=")[0] not in known
    ]
    try:
        if unknown:
            raise UserError(*(f"unknown flag '{flag}'{nearest(flag, known)}" for flag in unknown))
        try:
            values = parser.parse_args(args)
        except Exception as error:  # jsonargparse raises errors of several classes
            raise UserError(str(error).strip()) from error
        with exits_on_sigterm():
            function(**{k: v for k, v in values.as_dict().items() if k != "config"})
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def exits_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise ``SystemExit(143)``, so that what is half done is cleaned up."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
