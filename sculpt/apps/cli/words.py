"""Messages of the package in the words of the command: its options are not Python's arguments."""

from __future__ import annotations

import re
from collections.abc import Mapping

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


def said(text: str, more: Mapping[str, str] | None = None) -> str:
    """The message as the command says it.

    Args:
        text: of an error, a warning or a verdict.
        more: options of one command alone, by what Python calls them.
    """
    options = OPTIONS | dict(more or {})
    name = "|".join(options)
    for call, option in CALLS.items():
        text = re.sub(call, option, text)
    refused = re.match(rf"((?:{name})(?:, (?:{name}))*): not an option", text)
    if refused:
        text = ", ".join(options[one] for one in refused[1].split(", ")) + text[refused.end(1) :]
    value = rf"(?<![\w./\\'\"-])({name})=(\.\.\.|…|[^\s,;:)(]*[^\s,;:.)(])?"
    return re.sub(value, lambda found: f"{options[found[1]]} {found[2] or ''}".rstrip(), text)
