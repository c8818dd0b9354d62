"""The command ``sculpt``: demo, sample, fit, molecules, inspect. Each is a module of this folder."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from sculpt.apps.cli import demo, fit, inspect, molecules, sample
from sculpt.contents import VERSION

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for what the user can put right, 130 when interrupted.

    Args:
        arguments: in place of those that the process was started with.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.run is None:
        parser.print_help()
        return 0
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"sculpt: warning: {message}", file=sys.stderr)
        try:
            options.run(options)
        except KeyboardInterrupt:
            print(f"\nsculpt: stopped. {options.stopped(options)}", file=sys.stderr)
            return 130
        except (ValueError, TypeError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
            if options.traceback:
                raise
            print(f"sculpt: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sculpt",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Compose pretrained diffusion models and GFlowNets when you sample from them.",
        epilog="start with\n  sculpt demo\nand go on with\n  sculpt inspect FOLDER\n  sculpt sample --help",
    )
    parser.add_argument("--version", action="version", version=f"sculpt {VERSION}")
    parser.set_defaults(run=None, stopped=lambda _: "Nothing was written.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in (demo, sample, fit, molecules, inspect):
        command.add(commands)
    return parser
