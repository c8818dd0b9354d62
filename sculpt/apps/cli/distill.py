"""``sculpt distill``: a composition of checkpoints as a checkpoint of its own."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sculpt.apps.cli.options import (
    add_classifier,
    add_command,
    add_models,
    classifier_folder,
    count,
    load_models,
    make_road,
    named_paths,
    stopped_training,
)
from sculpt.apps.cli.sample import check_road
from sculpt.apps.formulas import TextFormula

__all__ = ["add"]

_HELP = """\
The student learns from samples of a road and is a base model when it has: one network a step, composed again, sampled and inspected as
any other. GFlowNets and language models learn to balance with the composition's own log-density, and from samples of their own; their
road only has to find what they would miss. The folder's README.md says how far the student is from what it should be.

Training is kept in the folder as it goes; the same command continues a run that was stopped.

examples
  sculpt distill "a & b" --model a=pretrained/grid/circle1 --model b=pretrained/grid/circle2 -o both
  sculpt distill "seh & sa & qed" --model seh=pretrained/molecules/seh --model sa=pretrained/molecules/sa \\
      --model qed=pretrained/molecules/qed --with beta=32 -o seh-sa-qed-32
  sculpt distill "cats & outdoors" --model cats=cats --model outdoors=outdoors --classifier cats-outdoors -o outdoor-cats
and then
  sculpt sample "both" --model both=both -n 1000 -o both.npz
"""


def add(commands: Any) -> None:
    """Put the command among the others."""
    parser = add_command(
        commands,
        "distill",
        help="make one checkpoint of a composition",
        description="Train one network to be a composition of pretrained models.",
        epilog=_HELP,
    )
    parser.add_argument("formula", help='over the models\' names, e.g. "a & b"; see sculpt sample --help')
    add_models(parser)
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="where the model and its training are kept")
    add_classifier(parser, "samples", batch="samples a step of training")
    parser.add_argument("--anchor", metavar="NAME", help="which observed model's chain is steered (default: the first)")
    parser.add_argument("--strength", type=float, help="what the guidance of a diffusion model is multiplied with (default: 1)")
    parser.add_argument("--reject", action="store_true", help="learn from rejection, with the classifier's terminal head")
    parser.add_argument("--steps", type=count, help="of training (default: what suits the family)")
    parser.add_argument("--learning-rate", type=float, metavar="RATE", help="at its highest (default: what suits the family)")
    parser.add_argument("--samples", type=count, help="how many of the road's to learn from")
    parser.set_defaults(run=_run, stopped=stopped_training)


def _run(options: argparse.Namespace) -> None:
    import sculpt

    # What is quickly checked comes first: nothing is loaded for a slip of the pen.
    output, paths = Path(options.output), named_paths(options.model)
    if output.exists() and not output.is_dir():
        raise ValueError(f"-o {output} is a file, expected a folder. Pass another path.")
    formula = TextFormula(options.formula, paths)
    check_road(options, formula, list(paths))
    folder = classifier_folder(options.classifier) if options.classifier else None
    models = load_models(options)
    classifier = None if folder is None else sculpt.load(folder, device=next(iter(models.values())).device)
    composition = formula.compose(models)
    chosen = classifier is not None or options.reject or options.particles
    settings = {name: getattr(options, name) for name in ("steps", "batch_size", "learning_rate", "samples")}
    sculpt.distill(
        composition,
        make_road(options, classifier, models.get(options.anchor)) if chosen else None,
        checkpoint=output,
        seed=options.seed,
        **{name: value for name, value in settings.items() if value is not None},
    )
    about = json.loads((output / "distillation.json").read_text())
    for what, value in about["measured"].items():
        print(f"{what:>32}  {value:.4g}" if isinstance(value, float) else f"{what:>32}  {value}")
    print(f"wrote {output}")
