"""The command ``sculpt``: demo, sample, fit, distill, molecules, inspect. Each is a module of this folder."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import warnings
from collections.abc import Sequence

from sculpt.apps.cli import demo, distill, fit, inspect, molecules, sample
from sculpt.apps.cli.options import OneLine
from sculpt.apps.cli.words import said
from sculpt.contents import VERSION

__all__ = ["main"]

EXPECTED = (ValueError, TypeError, OSError, ImportError, RuntimeError, FloatingPointError, MemoryError)
"""Errors that say what the user can put right."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for what the user can put right, 1 for what sculpt does wrong, 130 when interrupted.

    Args:
        arguments: in place of those that the process was started with.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may know fewer letters than a name or a formula has
            stream.reconfigure(errors="backslashreplace")
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.run is None:
        parser.print_help()
        return 0
    _quiet()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(
            f"sculpt: warning: {said(str(message), options.words)}", file=sys.stderr
        )
        try:
            options.run(options)
            sys.stdout.flush()
        except KeyboardInterrupt:
            print(f"\nsculpt: stopped. {options.stopped(options)}", file=sys.stderr)
            return 130
        except BrokenPipeError:  # whoever reads the output has had enough, as head has
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except Exception as error:
            if options.traceback:
                raise
            why = said(" ".join(str(error).split()), options.words) or type(error).__name__
            if isinstance(error, MemoryError) or "allocate memory" in why or "out of memory" in why:
                why = f"there is not enough memory; ask for fewer samples or particles, or a smaller --batch-size ({why})"
            if isinstance(error, EXPECTED):
                print(f"sculpt: error: {why}", file=sys.stderr)
                return 2
            print(
                f"sculpt: error: {type(error).__name__}: {why}. This is a bug in sculpt; run again with --traceback to see where.",
                file=sys.stderr,
            )
            return 1
    return 0


def _quiet() -> None:
    """What other libraries log about themselves is no message of this command; nor are their bars where nobody is looking."""
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _parser() -> argparse.ArgumentParser:
    parser = OneLine(
        prog="sculpt",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Compose pretrained diffusion models, GFlowNets and language models when you sample from them.",
        epilog="start with\n  sculpt demo\nand go on with\n  sculpt inspect FOLDER\n  sculpt sample --help",
    )
    parser.add_argument("--version", action="version", version=f"sculpt {VERSION}")
    parser.set_defaults(run=None, words={}, stopped=lambda _: "Nothing was written.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in (demo, sample, fit, distill, molecules, inspect):
        command.add(commands)
    return parser
