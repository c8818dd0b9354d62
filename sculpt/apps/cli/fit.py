"""``sculpt fit``: the classifier of a set of checkpoints."""

from __future__ import annotations

import argparse
from typing import Any

from sculpt.apps.cli.options import add_command, add_models, count, load_models, stopped_training

__all__ = ["add", "curve"]

_HELP = """\
The classifier knows its models by their weights: it serves every posterior of them (harmonic means, contrasts, labels), in any
order, with as many labels as --observations or fewer. Training is kept in the folder as it goes; the same command continues a
run that was stopped.

examples
  sculpt fit --model a=cats --model b=outdoors -o cats-outdoors
  sculpt fit --model a=red --model b=green --model c=blue --observations 3 --odds --field -o colours
"""


def add(commands: Any) -> None:
    """Put the command among the others."""
    parser = add_command(
        commands,
        "fit",
        help="train the classifier of a set of checkpoints, once",
        description="Train the classifier that guides every composition of a set of models.",
        epilog=_HELP,
    )
    add_models(parser)
    parser.add_argument(
        "-o", "--output", required=True, metavar="FOLDER", help="where the classifier and its training are kept"
    )
    parser.add_argument("--observations", type=count, default=2, help="labels that a sample may be conditioned on (default: 2)")
    parser.add_argument("--odds", action="store_true", help="take odds as an input")
    parser.add_argument(
        "--field", action="store_true", help="train a guidance field afterwards (diffusion): fewer samples stray"
    )
    parser.add_argument("--steps", type=count, help="of training (default: 4000)")
    parser.add_argument("--batch-size", type=count, help="finished samples per model and step (default: 256)")
    parser.add_argument("--samples", type=count, help="how many to draw from each model to learn from")
    parser.set_defaults(run=_run, stopped=stopped_training)


def _run(options: argparse.Namespace) -> None:
    import sculpt

    models = load_models(options)
    settings = {"steps": options.steps, "batch_size": options.batch_size, "samples": options.samples}
    settings["field"] = options.field or None
    classifier = sculpt.fit(
        list(models.values()),
        options.observations,
        options.odds,
        checkpoint=options.output,
        seed=options.seed,
        **{name: value for name, value in settings.items() if value is not None},
    )
    print(f"{curve(classifier.history)}\nwrote {options.output}")


def curve(history: list[dict[str, float]]) -> str:
    """The training curve in one line."""
    if not history:
        return "no curve was kept"
    kept = next((row for row in history if row.get("kept")), None)
    kept = kept or min(history, key=lambda row: row.get("held_out_joint", row["held_out_terminal"]))
    parts = {"label sets": "held_out_joint", "finished samples": "held_out_terminal"}
    losses = [f"{what} {history[0][key]:.4f} at first, {kept[key]:.4f} kept" for what, key in parts.items() if key in kept]
    return f"{history[-1]['step']} steps, weights of step {kept['step']}; held-out loss in nats of {'; of '.join(losses)}"
