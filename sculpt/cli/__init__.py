"""The command ``sculpt``: demo, sample, fit, molecules, inspect."""

from __future__ import annotations

import argparse
import importlib
import io
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sculpt.cli import molecules
from sculpt.cli.formulas import compose
from sculpt.cli.options import add_correct, conditions, count, device, load_models, named_paths

__all__ = ["compose", "main"]

_SAMPLE = """\
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
  --reject                      rejection with the classifier's terminal head: slow and plain

examples
  sculpt sample "a & b" --model a=cats --model b=outdoors --classifier cats-outdoors -n 64 -o both.png
  sculpt sample "a - b" --model a=pretrained/grid/circle1 --model b=pretrained/grid/circle2 -n 5000 -o only.npz
  sculpt sample "cat & dog" --model cat=owner/name --model dog=owner/name \\
      --with cat.prompt="a cat" --with dog.prompt="a dog" --classifier pets -o pets.png
"""

_FIT = """\
The classifier knows its models by their weights: it serves every posterior of them (harmonic means, contrasts, labels), in any
order, with as many labels as --observations or fewer. Training is kept in the folder as it goes; the same command continues a
run that was stopped.

examples
  sculpt fit --model a=cats --model b=outdoors -o cats-outdoors
  sculpt fit --model a=red --model b=green --model c=blue --observations 3 --odds -o colours
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for what the user can put right, 130 when interrupted."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.run is None:
        parser.print_help()
        return 0
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
    from sculpt import __version__

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="sculpt",
        formatter_class=raw,
        description="Compose pretrained diffusion models and GFlowNets when you sample from them.",
        epilog="start with\n  sculpt demo\nand go on with\n  sculpt inspect FOLDER\n  sculpt sample --help",
    )
    parser.add_argument("--version", action="version", version=f"sculpt {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="on an error, show where it came from")
    parser.set_defaults(run=None, stopped=lambda _: "Nothing was written.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    demo = commands.add_parser(
        "demo", parents=[common], help="the main jobs, with pictures and tables (under two minutes)", formatter_class=raw,
        description="digits: three image models and what is composed of them (in a clone of the repository).\n"
        "molecules: bind sEH and can be made, from two pretrained policies (in a clone, too).\n"
        "discs: three discs in the plane on every road, each measured against the exact answer.",
    )  # fmt: skip
    demo.add_argument("parts", nargs="*", metavar="PART", help="digits, molecules, discs (default: all)")
    demo.add_argument("-o", "--output", default="demo", metavar="FOLDER", help="where pictures and tables go (default: demo)")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo)

    models = argparse.ArgumentParser(add_help=False, parents=[common])
    models.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="NAME=PATH",
        help="a base model: a folder, or a Hub id (owner/name); repeat",
    )
    models.add_argument(
        "--with", dest="condition", action="append", default=[], metavar="[NAME.]KEY=VALUE",
        help="a condition of one model or of all, e.g. cat.prompt='a cat', beta=32; repeat",
    )  # fmt: skip
    models.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    models.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="of the networks")
    models.add_argument("--seed", type=int, default=0, help="the same seed gives the same result (default: 0)")

    sample = commands.add_parser(
        "sample", parents=[models], formatter_class=raw, help="sample a composition of checkpoints",
        description="Sample a composition of pretrained models.", epilog=_SAMPLE,
    )  # fmt: skip
    sample.add_argument("formula", help='over the models\' names, e.g. "a & b"')
    sample.add_argument("-n", type=count, default=16, help="how many samples (default: 16)")
    sample.add_argument("-o", "--output", required=True, metavar="FILE", help=".png, .npz, .safetensors, or .smi for molecules")
    sample.add_argument("--classifier", metavar="FOLDER", help="from sculpt fit")
    sample.add_argument("--steps", type=count, help="noise levels of a diffusion model (default: 32 guided, 128 tracked)")
    sample.add_argument("--particles", type=count, help="the population of tracked densities and of --correct")
    add_correct(sample, "samples")
    sample.add_argument("--anchor", metavar="NAME", help="which observed model's chain is steered (default: the first)")
    sample.add_argument("--strength", type=float, help="what the guidance of a diffusion model is multiplied with (default: 1)")
    sample.add_argument("--reject", action="store_true", help="rejection with the classifier's terminal head")
    sample.add_argument("--batch-size", type=count, help="states that go through a network at once")
    sample.set_defaults(run=_sample)

    fit = commands.add_parser(
        "fit", parents=[models], formatter_class=raw, help="train the classifier of a set of checkpoints, once",
        description="Train the classifier that guides every composition of a set of models.", epilog=_FIT,
    )  # fmt: skip
    fit.add_argument("-o", "--output", required=True, metavar="FOLDER", help="where the classifier and its training are kept")
    fit.add_argument("--observations", type=count, default=2, help="labels that a sample may be conditioned on (default: 2)")
    fit.add_argument("--odds", action="store_true", help="take odds as an input")
    fit.add_argument("--steps", type=count, help="of training (default: 4000)")
    fit.add_argument("--batch-size", type=count, help="finished samples per model and step (default: 256)")
    fit.add_argument("--samples", type=count, help="how many to draw from each model to learn from")
    fit.set_defaults(run=_fit, stopped=lambda o: f"The same command continues from the last checkpoint in {o.output}.")

    molecules.add(commands, common)

    inspect = commands.add_parser(
        "inspect", parents=[common], help="what is in a checkpoint",
        description="Tell what a checkpoint holds: kind, key, shape, noise levels, size.",
        epilog="example\n  sculpt inspect pretrained/grid/circle1", formatter_class=raw,
    )  # fmt: skip
    inspect.add_argument("path", help="a folder, or a Hub id (owner/name)")
    inspect.add_argument(
        "--with",
        dest="condition",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a condition that loading needs, e.g. beta=32",
    )
    inspect.set_defaults(run=_inspect)
    return parser


# ----------------------------------------------------------------------------------------------------------------- commands


def _demo(options: argparse.Namespace) -> None:
    homes = {"digits": "sculpt.diffusion.demo", "molecules": "sculpt.molecules.demo", "discs": "sculpt.demo"}
    parts = options.parts or list(homes)
    if unknown := [part for part in parts if part not in homes]:
        raise ValueError(f"There is no demo {unknown[0]!r}; there are {', '.join(homes)}.")
    for i, part in enumerate(parts):
        if i:
            print("\n" + "─" * 100 + "\n")
        importlib.import_module(homes[part]).run(options.output, seed=options.seed)


def _sample(options: argparse.Namespace) -> None:
    import torch

    import sculpt

    output = Path(options.output)
    if output.suffix not in _WRITERS:
        raise ValueError(f"Cannot write {output.name}: expected a name that ends in {', '.join(_WRITERS)}.")
    if output.is_dir():
        raise ValueError(f"{output} is a folder; pass the file to write.")
    if options.reject and not options.classifier:
        raise ValueError("--reject accepts by the classifier's terminal head: pass --classifier FOLDER, from sculpt fit.")
    if options.reject and (options.correct or options.particles or options.strength is not None):
        raise ValueError(
            "--correct and --particles belong to a population of particles and --strength to guidance; rejection has neither. "
            "Leave them or --reject out."
        )
    # The formula first: a slip in it should not cost the loading of the models.
    paths = named_paths(options.model)
    compose(options.formula, dict.fromkeys(paths))
    models = load_models(options)
    composition = compose(options.formula, models)
    classifier = sculpt.load(options.classifier, device=device(options)) if options.classifier else None
    if classifier is not None and not isinstance(classifier, sculpt.Classifier):
        raise ValueError(f"{options.classifier} is not a classifier. Make one: sculpt fit --model ... -o FOLDER.")
    if options.anchor is not None and options.anchor not in models:
        raise ValueError(f"--anchor {options.anchor}: the models are {', '.join(models)}.")
    settings = {
        "steps": options.steps,
        "batch_size": options.batch_size,
        "anchor": models.get(options.anchor),
        "generator": torch.Generator().manual_seed(options.seed),
    }
    if options.reject:
        samples = sculpt.reject(composition, options.n, classifier, **{k: v for k, v in settings.items() if v is not None})
    elif hasattr(composition, "models"):
        own = {"particles": options.particles, "correct": options.correct, "strength": options.strength}
        samples = composition.sample(options.n, classifier, **own, **settings)
    else:
        settings = {name: value for name, value in settings.items() if value is not None and name != "anchor"}
        samples = composition.sample(options.n, **settings)
    _WRITERS[output.suffix](samples, output)
    print(f"{samples.diagnostics}\nwrote {output}")


def _fit(options: argparse.Namespace) -> None:
    import sculpt

    models = load_models(options)
    settings = {"steps": options.steps, "batch_size": options.batch_size, "samples": options.samples}
    classifier = sculpt.fit(
        list(models.values()),
        options.observations,
        options.odds,
        checkpoint=options.output,
        seed=options.seed,
        **{name: value for name, value in settings.items() if value is not None},
    )
    print(f"{_curve(classifier.history)}\nwrote {options.output}")


def _inspect(options: argparse.Namespace) -> None:
    import hashlib

    import sculpt
    from sculpt.hub import kind_of, locate

    folder = locate(options.path)
    kind = kind_of(folder)
    loaded = sculpt.load(folder, **conditions(options.condition, [""])[""])
    rows: list[tuple[str, Any]] = [("path", folder), ("kind", kind)]
    if kind == "classifier":
        rows += [("models", ", ".join(f"{n} ({key[:12]})" for n, key in zip(loaded.names, loaded.keys, strict=True)))]
        rows += [("observations", loaded.observations), ("odds", "an input" if loaded.odds else "equal")]
        rows += [("training", _curve(loaded.history))]
    else:
        rows += [("name", loaded.name), ("key", loaded.key)]
    if kind == "diffusion":
        config = loaded.scheduler.config
        rows += [
            ("network", f"{type(loaded.model).__name__}, {sum(p.numel() for p in loaded.model.parameters()):,} parameters"),
            ("shape", " × ".join(map(str, loaded.shape)) + (", latents" if loaded.autoencoder is not None else "")),
            ("scheduler", f"{type(loaded.scheduler).__name__}, {config.get('beta_schedule') or 'its own path'}"),
            ("predicts", loaded.schedule.prediction_type),
            ("noise levels", f"{loaded.s_min:.4g} to {loaded.s_max:.4g}"),
        ]
    elif kind == "gflownet":
        rows += [("environment", f"{type(loaded.env).__name__}, {loaded.env.n_actions} actions")]
        rows += [("condition", ", ".join(f"{k}={v:g}" for k, v in loaded.condition.items()) or "none")]
    for path in sorted(folder.rglob("*.safetensors")):
        if "training" not in path.parts:
            sha = hashlib.sha256(path.read_bytes()).hexdigest()
            rows.append((str(path.relative_to(folder)), f"{path.stat().st_size / 2**20:.2f} MiB, sha256 {sha[:16]}…"))
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:>{width}}  {value}" for name, value in rows))


def _curve(history: list[dict[str, float]]) -> str:
    """The training curve in one line."""
    if not history:
        return "no curve was kept"
    best = min(history, key=lambda row: row["held_out_joint"])
    return (
        f"{history[-1]['step']} steps; held-out loss of the label sets {history[0]['held_out_joint']:.4f} at first, "
        f"{best['held_out_joint']:.4f} at best (step {best['step']}); terminal {best['held_out_terminal']:.4f} nats"
    )


# ------------------------------------------------------------------------------------------------------------------ writing


def _write_picture(samples: Any, path: Path) -> None:
    import torch

    from sculpt import plots

    if hasattr(samples, "draw"):
        return samples.draw(24).save(path)
    shown = samples.decode()
    if isinstance(shown, torch.Tensor) and shown.ndim == 4 and shown.shape[1] in (1, 3):
        figure = plots.image_grid(shown, title=samples.diagnostics.formula)
    elif samples.x.ndim == 2 and samples.x.shape[1] == 2:
        figure = plots.points2d(samples.x, title=samples.diagnostics.formula)
    else:
        raise ValueError(
            f"There is no picture of samples of shape {tuple(samples.x.shape[1:])}. Write them as .npz or .safetensors."
        )
    plots.save(figure, path)


def _arrays(samples: Any) -> dict[str, Any]:
    return {"x": samples.x.cpu()} | ({} if samples.log_weights is None else {"log_weights": samples.log_weights.cpu()})


def _write_npz(samples: Any, path: Path) -> None:
    import numpy as np

    from sculpt.files import replace_file

    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{name: value.numpy() for name, value in _arrays(samples).items()})
    replace_file(path, buffer.getvalue())


def _write_safetensors(samples: Any, path: Path) -> None:
    from safetensors.torch import save

    from sculpt.files import replace_file

    replace_file(
        path,
        save({name: value.contiguous() for name, value in _arrays(samples).items()}, {"formula": samples.diagnostics.formula}),
    )


def _write_smiles(samples: Any, path: Path) -> None:
    from sculpt.files import replace_file

    smiles = getattr(samples, "smiles", None)
    if smiles is None:
        raise ValueError("These samples are no molecules and have no SMILES. Write them as .npz or .safetensors.")
    replace_file(path, ("\n".join(smiles) + "\n").encode())


_WRITERS = {".png": _write_picture, ".npz": _write_npz, ".safetensors": _write_safetensors, ".smi": _write_smiles}

if __name__ == "__main__":
    sys.exit(main())
