"""``sculpt molecules``: molecules of a formula over reward policies, with their scores, as a file or a folder of shards."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sculpt.apps.cli.options import (
    add_classifier,
    add_command,
    add_device,
    classifier_folder,
    count,
    make_road,
    named_paths,
    near,
    new_folder,
)
from sculpt.apps.cli.shards import add_shards, own_device, row, sharded, write_shards
from sculpt.apps.cli.words import said
from sculpt.apps.formulas import TextFormula
from sculpt.shipped import CLONE
from sculpt.shipped import shelf as fetched

if TYPE_CHECKING:
    from sculpt.classifier.guide import Guide
    from sculpt.composition import Composition
    from sculpt.model import BaseModel
    from sculpt.roads import Road

__all__ = ["add"]

POLICIES = {"smiles": "smiles", "fragments": "molecules"}
"""What molecules are made of, and the folder of ``pretrained`` whose models make them so."""

_HELP = """\
formulas
  seh                           what one policy makes, in proportion to its reward to the power beta
  seh & sa                      high under both
  seh - sa                      high under seh and not under sa
  (seh & sa) - qed              nested; see sculpt sample --help for all that a formula can be

policies
  smiles (the default) write drug-like molecules as SMILES: the prior is a language model of MOSES, and seh, sa and qed are that prior
  times a reward to the power beta. A few strings are no molecules; tables leave them out. fragments assemble trees of fragments, heavier
  molecules of higher rewards; their models are in pretrained/molecules.

the exponent beta
  --beta 32 is for all models, --beta seh=64 for one. SMILES policies know some exponents from 0 to 64, fragments all from 0 to 96. The
  higher, the better the best and the less varied all are; 32 is a good start. One folder at two exponents is two models:
    sculpt molecules "hot - seh" --model hot=pretrained/smiles/seh --beta hot=64 --beta seh=32 -o hot.csv

roads
  A classifier fitted for the formula's models is taken by itself where the models' folder has one; --correct makes it exact for its
  terminal head, --correct-densities without that head: right where the classifier's card doubts it, with the particles of --particles.
  Without a classifier, or with --no-classifier, densities are tracked: nothing to train, every formula.

what is written, by the name of -o
  .parquet .csv                 each different molecule once, with count, weight and rewards
  .sdf                          the same as structures in the plane
  .smi                          all molecules, one SMILES a line
  .png .svg                     the first 24 molecules with their scores
  .safetensors                  all samples, weights and diagnostics: sculpt.Samples.load reads them back
  folder/                       shards of parquet, for any number of molecules: a killed run continues when it is started again,
                                and accelerate launch (or torchrun) shares the work among processes and machines

examples
  sculpt molecules "seh & sa" -n 1000 --beta 32 -o both.parquet
  sculpt molecules "seh & sa & qed" -n 24 --beta 64 -o best.png
  sculpt molecules "seh & sa" -n 1000 --beta 32 --policies fragments -o heavy.sdf
  accelerate launch --num_processes 8 -m sculpt molecules "seh & sa" -n 1000000 --beta 32 -o library/
"""


def add(commands: Any) -> None:
    """Put the command among the others."""
    parser = add_command(
        commands,
        "molecules",
        help="molecules of a composition of reward policies, with their scores",
        description="Generate molecules from a formula over pretrained reward policies, score them and write them.",
        epilog=_HELP,
    )
    parser.add_argument("formula", help='over policies by name, e.g. "seh & sa"')
    parser.add_argument("-n", type=count, default=1000, help="how many molecules (default: 1000)")
    parser.add_argument("-o", "--output", required=True, metavar="PATH", help="a file, or a folder for shards: see below")
    parser.add_argument("--policies", choices=[*POLICIES], default="smiles", help="how molecules are made (default: smiles)")
    parser.add_argument(
        "--beta", action="append", default=[], metavar="[NAME=]NUMBER",
        help="the exponent of the rewards: of all models or of one; repeat",
    )  # fmt: skip
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME=FOLDER",
        help="where a model is; by default among the policies; repeat",
    )  # fmt: skip
    add_classifier(parser, "molecules", " (default: the shipped one that fits, if any)")
    parser.add_argument("--no-classifier", action="store_true", help="track densities even where a classifier fits")
    parser.add_argument(
        "--rewards", metavar="NAMES",
        help="the scores to write and to sum up (default: seh,sa,qed are written, those that the formula names summed up)",
    )  # fmt: skip
    add_shards(parser, "molecules")
    add_device(parser, "molecules")
    parser.set_defaults(run=_run, words={"beta": "--beta"})


def _run(options: argparse.Namespace) -> None:
    # What is quickly checked comes first: nothing is loaded, sampled or made for a slip of the pen.
    formula = TextFormula(options.formula)
    rewards = None if options.rewards is None else [name.strip() for name in options.rewards.split(",") if name.strip()]
    if options.no_classifier and (options.classifier or options.correct):
        raise ValueError("--classifier and --correct need a classifier: leave --no-classifier out.")
    if formula.is_one_model and options.correct:
        raise ValueError(f"--correct needs a classifier, and none was found for {formula.text}: it is one model. Leave it out.")
    if formula.is_one_model and (options.classifier or options.particles):
        raise ValueError(f"{formula.text} is one model: --classifier and --particles belong to compositions. Leave them out.")
    folders = _folders(formula.names, options.model, POLICIES[options.policies])
    conditions = _conditions(options.beta, folders)

    from sculpt.molecules.results import check_output
    from sculpt.molecules.scores import reward_functions
    from sculpt.tables import needs

    if sharded(options):
        needs("pyarrow", "A folder of shards")
    else:
        check_output(Path(options.output))
    # The weights of seh may be missing: that is told when all else is right.
    reward_functions([name for name in rewards or () if name != "seh"])
    given = classifier_folder(options.classifier) if options.classifier else None

    composition = formula.compose(_models(options, folders, conditions))
    reward_functions(rewards)
    road, whence = None, ""
    if not formula.is_one_model:
        classifier, whence = _classifier(options, composition, given, list(folders.values()))
        road = _road(options, composition, classifier, whence)
    _write(options, composition, road, rewards, whence)


def _models(options: argparse.Namespace, folders: dict[str, Path], conditions: dict[str, dict[str, Any]]) -> dict[str, Any]:
    import sculpt
    from sculpt.molecules import Molecules

    models = {}
    for name, folder in folders.items():
        models[name] = sculpt.load(folder, device=own_device(options), **conditions[name])
        if not issubclass(models[name].samples_class, Molecules):
            raise ValueError(f"{name}: {folder} makes no molecules. Use sculpt sample.")
    return models


def _road(options: argparse.Namespace, composition: Composition, classifier: Guide | None, whence: str) -> Road:
    if options.correct and classifier is None:
        raise ValueError(f"--correct needs a classifier, and none was found for {composition}. Fit one: sculpt fit --help.")
    if options.particles and classifier is not None and not options.correct:
        raise ValueError(
            f"--particles belongs to a population with weights, and the classifier ({whence}) guides without: add --correct, or "
            "--no-classifier to track densities."
        )
    return make_road(options, classifier)


def _write(options: argparse.Namespace, model: BaseModel, road: Road | None, rewards: list[str] | None, whence: str) -> None:
    """Sample into one file or into shards, and tell how good it is."""
    if sharded(options):
        write_shards(options, model, road, whence, rewards=rewards)
        return
    import torch

    generator = torch.Generator().manual_seed(options.seed)
    samples: Any = model.sample(options.n, road, batch_size=options.batch_size, generator=generator)
    made = new_folder(Path(options.output))
    samples.save(options.output, rewards)
    told = f"{samples.diagnostics}\n{row('classifier', whence)}{samples.summary(rewards)}"
    print(f"{said(told)}\nwrote {options.output}{made}")


def _conditions(given: Sequence[str], folders: dict[str, Path]) -> dict[str, dict[str, float]]:
    """``32`` for all models that take a beta, ``seh=96`` for one; those that take one have to get it."""
    common: dict[str, float] = {}
    own: dict[str, dict[str, float]] = {name: {} for name in folders}
    for text in given:
        name, equals, number = text.rpartition("=")
        if equals and name not in own:
            raise ValueError(f"--beta {text}: the formula's models are {', '.join(folders)}.")
        target = own[name] if equals else common
        if target:
            raise ValueError(f"--beta {text}: a beta {f'of {name}' if equals else 'for all models'} was given before.")
        try:
            target["beta"] = float(number)
        except ValueError:
            raise ValueError(f"--beta {text}: expected a number, or NAME=NUMBER, e.g. --beta 32 --beta seh=96.") from None
    from sculpt.hub import asks

    takes = {name: "beta" in asks(folder) for name, folder in folders.items()}
    if bare := [name for name in folders if takes[name] and not (own[name] or common)]:
        raise ValueError(f"Say how peaked {', '.join(bare)} should be: --beta 32 for all models, or --beta {bare[0]}=32.")
    if idle := [name for name in own if own[name] and not takes[name]]:
        raise ValueError(f"--beta {idle[0]}={own[idle[0]]['beta']:g}: {folders[idle[0]]} takes no exponent. Leave it out.")
    return {name: own[name] or (common if takes[name] else {}) for name in folders}


def _shelves(part: str) -> list[Path]:
    """Where shipped models are: below the working directory and beside the package, or else fetched."""
    here = [path for path in (Path("pretrained") / part, CLONE / part) if path.is_dir()]
    return here or [fetched(part)]


def _folders(names: Sequence[str], given: Sequence[str], part: str) -> dict[str, Path]:
    from sculpt.hub import kind_of, locate

    paths = named_paths(given)
    if unused := sorted(set(paths) - set(names)):
        raise ValueError(f"--model {unused[0]}: the formula names {', '.join(names)} only.")
    folders = {}
    for name in names:
        around = [] if name in paths else _shelves(part)
        shipped = [shelf / name for shelf in around if (shelf / name / "config.json").is_file()]
        if name not in paths and not shipped:
            found = {path.parent for shelf in around for path in shelf.glob("*/config.json")}
            known = sorted({folder.name for folder in found if kind_of(folder) != "classifier"})
            raise ValueError(
                f"There is no model {name!r} in pretrained/{part}: {near(name, known)} For one that is elsewhere: --model {name}=FOLDER."
            )
        folders[name] = locate(paths[name]) if name in paths else shipped[0]
        if kind_of(folders[name]) == "classifier":
            raise ValueError(f"{name}: {folders[name]} holds a classifier, expected a policy that makes molecules.")
    return folders


def _classifier(
    options: argparse.Namespace, composition: Composition, given: Path | None, folders: Sequence[Path]
) -> tuple[Guide | None, str]:
    """The classifier that was asked for, or one beside the models that was fitted for just these; and where it is."""
    import sculpt
    from sculpt.entries import read_json

    if given is not None:
        return sculpt.load(given, device=own_device(options)), options.classifier
    keys = sorted(leaf.key for leaf in composition.leaves)
    for shelf in () if options.no_classifier else dict.fromkeys(folder.resolve().parent for folder in folders):
        for path in sorted(shelf.glob("*/config.json")):
            config = read_json(path, "checkpoint")
            if config.get("kind") == "classifier" and sorted(config.get("keys", ())) == keys:
                classifier = sculpt.load(path.parent, device=own_device(options))
                try:
                    sculpt.Guided(classifier).check(composition)
                except ValueError:  # a formula that no classifier steers, or more labels than this one knows
                    continue
                return classifier, f"{path.parent}, found by itself"
    return None, ""
