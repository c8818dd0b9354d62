"""Messages of the package in the words of the command: its options are not Python's arguments."""

from __future__ import annotations

import re

__all__ = ["said"]

OPTIONS = {
    "n": "-n",
    "checkpoint": "-o",
    "steps": "--steps",
    "particles": "--particles",
    "batch_size": "--batch-size",
    "learning_rate": "--learning-rate",
    "samples": "--samples",
    "observations": "--observations",
    "strength": "--strength",
    "anchor": "--anchor",
    "classifier": "--classifier",
    "seed": "--seed",
    "shard": "--shard",
    "device": "--device",
    "dtype": "--dtype",
    "rewards": "--rewards",
}
"""What Python calls an argument -> the option."""

CALLS = {
    r"(?:sculpt\.)?Guided\(classifier, correct=True\)": "--classifier FOLDER --correct",
    r"(?:sculpt\.)?Tracked\(particles=(\d+)\)": r"--particles \1",
    r"sculpt\.fit\(models, observations=(\w+)\)": r"sculpt fit --observations \1",
    r"sculpt\.fit\(models, odds=True\)": "sculpt fit --odds",
    r"sculpt\.(fit|distill)\b(?:\([^()]*\))?": r"sculpt \1",
    r"sculpt\.generate\b": "the command",
    r"Call load\('[^']*'\)": "Leave --with out",
    r"Call load\('[^']*', (\w+)=…": r"Pass --with \1=NUMBER",
    r"\bcorrect=True": "--correct",
    r"\bodds=True": "--odds",
    r"\bfield=True": "--field",
}
"""What is more than one argument, or none with a value."""

_NAMES = "|".join(OPTIONS)
_VALUE = re.compile(rf"(?<![\w./\\'\"-])({_NAMES})=(\.\.\.|…|[^\s,;:)(]*[^\s,;:.)(])?")
_REFUSED = re.compile(rf"^((?:(?:{_NAMES})(?:, )?)+): not an option")


def said(text: str) -> str:
    """The message as the command says it.

    Args:
        text: of an error, a warning or a verdict.
    """
    for call, option in CALLS.items():
        text = re.sub(call, option, text)
    text = _REFUSED.sub(lambda found: f"{', '.join(OPTIONS[name] for name in found[1].split(', '))}: not an option", text)
    return _VALUE.sub(lambda found: f"{OPTIONS[found[1]]} {found[2] or ''}".rstrip(), text)
