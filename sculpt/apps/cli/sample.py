"""``sculpt sample``: a composition of checkpoints, by any road."""

from __future__ import annotations

import argparse
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
    new_folder,
)
from sculpt.apps.cli.shards import add_shards, own_device, sharded, write_shards
from sculpt.apps.cli.words import said
from sculpt.apps.formulas import TextFormula

__all__ = ["add", "check_road"]

ENDINGS = (".png", ".npz", ".safetensors")
OF_MOLECULES = (".parquet", ".csv", ".sdf", ".smi", ".svg")

_HELP = """\
formulas
  a & b                         harmonic mean: likely under both
  a - b                         contrast: likely under a and not under b
  a | b                         mixture: either
  (a | b) - c                   nested; note that & binds more loosely than -, as in Python
  harmonic_mean(a, b, odds=0.2) odds between the two
  posterior([a, b, c], [0, 1])  observed labels among three models
  product([a, b], [1, -0.5])    any real powers; product([a], [1.5]) tempers
  power_mean([a, b], -2)        between the minimum (-inf) and the maximum (inf)

roads
  with --classifier             guided; --correct makes it exact for the classifier's terminal head, and on GFlowNets
                                --correct-densities without that head, at the cost of all models
  without                       tracked densities: nothing to train, best in few dimensions and on GFlowNets
  --reject                      rejection with the classifier's terminal head: slow and plain; GFlowNets need no classifier for it

what is written, by the name of -o
  .safetensors                  samples, weights and diagnostics: sculpt.Samples.load reads them back
  .npz                          the same arrays for NumPy
  .png                          a picture
  .parquet .csv .sdf .smi .svg  molecules
  folder/                       shards for any number of samples, with an index in parquet: a killed run continues when it is
                                started again, and torchrun (or accelerate launch) shares the work. sculpt.Library reads them

examples
  sculpt sample "a & b" --model a=cats --model b=outdoors --classifier cats-outdoors -n 64 -o both.png
  sculpt sample "a - b" --model a=pretrained/grid/circle1 --model b=pretrained/grid/circle2 -n 5000 -o only.npz
  sculpt sample "cat & dog" --model cat=owner/name --model dog=owner/name \\
      --with cat.prompt="a cat" --with dog.prompt="a dog" --classifier pets -o pets.png
  torchrun --nproc-per-node 8 -m sculpt sample "a & b" --model a=cats --model b=outdoors --classifier cats-outdoors -n 100000 -o both/
"""


def add(commands: Any) -> None:
    """Put the command among the others."""
    parser = add_command(
        commands,
        "sample",
        help="sample a composition of checkpoints",
        description="Sample a composition of pretrained models.",
        epilog=_HELP,
    )
    parser.add_argument("formula", help='over the models\' names, e.g. "a & b"')
    add_models(parser)
    parser.add_argument("-n", type=count, default=16, help="how many samples (default: 16)")
    parser.add_argument("-o", "--output", required=True, metavar="PATH", help="its name says what is written: see below")
    add_classifier(parser, "samples")
    parser.add_argument("--anchor", metavar="NAME", help="which observed model's chain is steered (default: the first)")
    parser.add_argument("--strength", type=float, help="what the guidance of a diffusion model is multiplied with (default: 1)")
    parser.add_argument("--reject", action="store_true", help="rejection with the classifier's terminal head")
    parser.add_argument("--steps", type=count, help="noise levels of a diffusion model (default: 32 guided, 128 tracked)")
    add_shards(parser, "samples")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    import torch

    import sculpt
    from sculpt.samples import Samples, check_name
    from sculpt.tables import needs

    # What is quickly checked comes first: nothing is loaded for a slip of the pen.
    output, paths = Path(options.output), named_paths(options.model)
    if sharded(options):
        needs("pyarrow", "A folder of shards")
    else:
        check_name(output, (*ENDINGS, *OF_MOLECULES))
    formula = TextFormula(options.formula, paths)
    check_road(options, formula, list(paths))
    folder = classifier_folder(options.classifier) if options.classifier else None
    models = load_models(options)
    composition = formula.compose(models)
    if composition.samples_class is Samples and not sharded(options):
        check_name(output, ENDINGS)
    if options.reject and folder is None and not composition.knows_density:
        raise ValueError(f"--reject: {composition} does not know its densities. Pass --classifier FOLDER, from sculpt fit.")
    classifier = None if folder is None else sculpt.load(folder, device=own_device(options))
    road = None if formula.is_one_model else make_road(options, classifier, models.get(options.anchor))
    if sharded(options):
        write_shards(options, composition, road)
        return
    made = new_folder(output)
    samples = composition.sample(
        options.n,
        road,
        steps=options.steps,
        batch_size=options.batch_size,
        generator=torch.Generator().manual_seed(options.seed),
    )
    samples.save(output)
    print(f"{said(str(samples.diagnostics))}\nwrote {output}{made}")


def check_road(options: argparse.Namespace, formula: TextFormula, names: list[str]) -> None:
    """Refuse options that do not go together."""
    if options.anchor is not None and options.anchor not in names:
        raise ValueError(f"--anchor {options.anchor}: the models are {', '.join(names)}.")
    if options.reject and (options.correct or options.particles or options.strength is not None):
        raise ValueError(
            "--correct and --particles belong to a population of particles and --strength to guidance; rejection has neither. "
            "Leave them or --reject out."
        )
    guidance = {"--correct": options.correct, "--strength": options.strength is not None}
    guidance["--anchor"] = options.anchor is not None and not options.reject
    roads = guidance | {"--classifier": options.classifier, "--particles": options.particles, "--reject": options.reject}
    if formula.is_one_model and (given := [name for name, value in roads.items() if value]):
        raise ValueError(f"{formula.text} is one model, and {', '.join(given)} belong to compositions. Leave them out.")
    if not options.classifier and (given := [name for name, value in guidance.items() if value]):
        raise ValueError(
            f"{', '.join(given)}: guided sampling only. Pass --classifier FOLDER, from sculpt fit, or leave it out."
        )
    if options.classifier and options.particles and not options.correct:
        raise ValueError(
            "--particles belongs to a population with weights, and guided sampling has none: add --correct, or leave --classifier out."
        )
