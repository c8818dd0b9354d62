"""What several commands take, and what becomes of it: models by name, conditions, the device, the road."""

from __future__ import annotations

import argparse
import ast
import difflib
import keyword
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sculpt.apps.formulas import FUNCTIONS

if TYPE_CHECKING:
    from sculpt.classifier.guide import Guide
    from sculpt.model import BaseModel
    from sculpt.roads import Road

__all__ = [
    "OneLine",
    "add_classifier",
    "add_command",
    "add_device",
    "add_models",
    "classifier_folder",
    "conditions",
    "count",
    "device",
    "load_models",
    "make_road",
    "named_paths",
    "near",
    "new_folder",
    "seed",
    "stopped_training",
]


class OneLine(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of the commands are."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument ([^:]+):", lambda found: f"{found[1].split('/')[-1]}:", message)
        self.exit(2, f"sculpt: error: {message}. All options: {self.prog} --help.\n")


def count(text: str) -> int:
    """A number of things."""
    return _whole(text, 1)


def seed(text: str) -> int:
    """A seed."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text) >= least):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no whole number from {least} on")
    return int(text)


def add_command(commands: Any, name: str, **texts: str) -> argparse.ArgumentParser:
    """A command, with the option that all of them have."""
    parser: argparse.ArgumentParser = commands.add_parser(name, formatter_class=argparse.RawDescriptionHelpFormatter, **texts)
    parser.add_argument("--traceback", action="store_true", help="on an error, show where it came from")
    return parser


def add_models(parser: argparse.ArgumentParser) -> None:
    """The options that :func:`load_models` reads."""
    parser.add_argument(
        "--model", action="append", required=True, metavar="NAME=PATH",
        help="a base model: a folder, a Hub id (owner/name), or what is shipped (sculpt/digits-cyan); repeat",
    )  # fmt: skip
    parser.add_argument(
        "--with", dest="condition", action="append", default=[], metavar="[NAME.]KEY=VALUE",
        help="a condition of one model or of all, e.g. cat.prompt='a cat', beta=32; repeat",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="of the networks")
    add_device(parser, "result")


def add_device(parser: argparse.ArgumentParser, result: str) -> None:
    """Where networks run, and the seed."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    parser.add_argument("--seed", type=seed, default=0, help=f"the same seed gives the same {result} (default: 0)")


def add_classifier(
    parser: argparse.ArgumentParser, things: str, default: str = "", batch: str = "states that go through a network at once"
) -> None:
    """The options of the roads that every command has."""
    parser.add_argument("--classifier", metavar="FOLDER", help=f"from sculpt fit{default}")
    correct = parser.add_mutually_exclusive_group()
    correct.add_argument("--correct", action="store_true", help=f"weigh and select guided {things} until they are exact")
    correct.add_argument(
        "--correct-densities", dest="correct", action="store_const", const="densities",
        help="the same by the models' own densities in place of the classifier's terminal head (GFlowNets)",
    )  # fmt: skip
    parser.add_argument("--particles", type=count, help="the population of tracked densities and of --correct (at least n)")
    parser.add_argument("--batch-size", type=count, help=batch)
    parser.set_defaults(anchor=None, strength=None, reject=False)


def make_road(options: argparse.Namespace, classifier: Guide | None, anchor: BaseModel | None = None) -> Road:
    """The road that the options describe."""
    import sculpt

    if options.reject:
        return sculpt.Rejection(classifier, anchor=anchor)
    if classifier is None:
        return sculpt.Tracked(particles=options.particles)
    strength = 1.0 if options.strength is None else options.strength
    return sculpt.Guided(classifier, anchor=anchor, strength=strength, correct=options.correct, particles=options.particles)


def named_paths(pairs: Sequence[str]) -> dict[str, str]:
    """Paths by name."""
    paths: dict[str, str] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        name = unicodedata.normalize("NFKC", name)  # as formulas read it
        if not (equals and name.isidentifier() and not keyword.iskeyword(name) and path):
            raise ValueError(
                f"--model {pair}: expected NAME=PATH with a name of letters and digits, e.g. --model a={pair.strip('=')}."
            )
        if name in paths:
            raise ValueError(f"--model {name} was given twice: {paths[name]} and {path}.")
        if name in FUNCTIONS:
            raise ValueError(f"--model {name}: that is the name of a function; choose another.")
        paths[name] = path
    return paths


def load_models(options: argparse.Namespace) -> dict[str, BaseModel]:
    """The base models by name."""
    import torch

    import sculpt

    paths = named_paths(options.model)
    given = conditions(options.condition, list(paths))
    dtype = getattr(torch, options.dtype) if options.dtype else None
    models: dict[str, BaseModel] = {}
    for name, path in paths.items():
        model = sculpt.load(path, device=device(options), dtype=dtype, **given[name])
        if isinstance(model, sculpt.Classifier):
            raise ValueError(f"--model {name}: {paths[name]} is a classifier. Pass it as --classifier.")
        if isinstance(model, sculpt.Diffusion):
            model.name = name  # as the user calls it here, in formulas and in messages
        models[name] = model
    return models


def classifier_folder(path: str) -> Path:
    """Where a classifier is; refuses what is none."""
    from sculpt.hub import kind_of, locate

    folder = locate(path)
    if kind_of(folder) != "classifier":
        raise ValueError(f"{path} is not a classifier. Make one: sculpt fit --model ... -o FOLDER.")
    return folder


def device(options: argparse.Namespace) -> str:
    """The device that was asked for, or the best that is there."""
    import torch

    chosen = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"--device {chosen}: torch {torch.__version__} sees no CUDA device here. Leave it out, or pass --device cpu."
        )
    try:
        found = torch.empty(0, device=chosen).device.type
    except Exception as error:  # each kind of device has its own
        raise ValueError(f"--device {chosen}: {str(error).partition(chr(10))[0]:.200}") from None
    if found == "meta":
        raise ValueError("--device meta holds no numbers. Pass cpu, cuda, cuda:1 or mps.")
    return chosen


def near(name: str, known: Sequence[str]) -> str:
    """What may have been meant, or all that there is."""
    close = difflib.get_close_matches(name, known, n=3)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"there are {', '.join(known)}." if known else "there is none."


def new_folder(output: Path) -> str:
    """What to add to the message that a file was written: that its folder was made for it. Ask before it is."""
    return "" if output.parent.is_dir() else f" (and made the folder {output.parent})"


def stopped_training(options: argparse.Namespace) -> str:
    """What is true after an interruption: the state that the folder keeps, if it keeps one."""
    from sculpt.resuming import saved_step

    steps = [saved_step(Path(options.output) / part) for part in ("field", "training")]
    if (step := next((step for step in steps if step is not None), None)) is None:
        return "No state was saved yet: the same command begins anew."
    of = " of the field" if steps[0] is not None else ""
    return f"The same command continues from step {step:,}{of}, the last that {options.output} keeps."


def conditions(pairs: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Conditions by model."""
    given: dict[str, dict[str, Any]] = {name: {} for name in names}
    for pair in pairs:
        left, equals, text = pair.partition("=")
        name, dot, key = left.rpartition(".")
        if not (equals and key.isidentifier()) or (dot and name not in given):
            raise ValueError(
                f"--with {pair}: expected KEY=VALUE or NAME.KEY=VALUE with a model's name ({', '.join(filter(None, names))})."
            )
        if key in ("device", "dtype", "path_or_hub_id"):
            raise ValueError(f"--with {pair}: {key} is no condition, but an option of its own.")
        try:
            value = ast.literal_eval(text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            value = text
        for target in [name] if dot else names:
            given[target][key] = value
    return given
