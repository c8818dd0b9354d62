"""``sculpt inspect``: what is in a checkpoint."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sculpt.apps.cli.fit import curve
from sculpt.apps.cli.options import add_command, conditions

__all__ = ["add"]


def add(commands: Any) -> None:
    """Put the command among the others."""
    parser = add_command(
        commands,
        "inspect",
        help="what is in a checkpoint",
        description="Tell what a checkpoint holds: kind, key, shape, noise levels, size.",
        epilog="example\n  sculpt inspect pretrained/grid/circle1",
    )
    parser.add_argument("path", help="a folder, a Hub id (owner/name), or what is shipped (sculpt/digits-cyan)")
    parser.add_argument(
        "--with", dest="condition", action="append", default=[], metavar="KEY=VALUE",
        help="a condition that loading needs, e.g. beta=32",
    )  # fmt: skip
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    import sculpt
    from sculpt.hub import kind_of, locate

    folder = locate(options.path)
    given = conditions(options.condition, [""])[""]
    rows: list[tuple[str, Any]] = [("path", folder)]
    if (other := _other(folder)) is not None:
        rows.append(("kind", f"{other}, which is not composed"))
    else:
        rows.append(("kind", kind_of(folder)))
        missing = _missing(folder, given)
        loaded = sculpt.load(folder, **(given | missing))
        rows += [row for row in _about(loaded, missing, folder) if row[1] != ""]
    for path in sorted(folder.rglob("*.safetensors")):
        if "training" not in path.parts:
            sha = hashlib.sha256(path.read_bytes()).hexdigest()
            rows.append((str(path.relative_to(folder)), f"{path.stat().st_size / 2**20:.2f} MiB, sha256 {sha[:16]}…"))
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:>{width}}  {value}" for name, value in rows))


def _config(folder: Path) -> dict[str, Any]:
    from sculpt.entries import read_json

    return read_json(folder / "config.json", "checkpoint") if (folder / "config.json").is_file() else {}


def _other(folder: Path) -> str | None:
    """The kind of what sculpt saved that is neither a model nor a classifier, such as the judge of a recipe."""
    kind = _config(folder).get("kind")
    return kind if isinstance(kind, str) and kind not in ("gflownet", "classifier", "training") else None


def _missing(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """A value for each condition that a policy wants and was not given: what is told does not depend on it."""
    from sculpt.tokens.learning import known

    if prompts := [] if "prompt" in given else known(folder):
        first = dict(part.split("=") for part in prompts[0].split(", "))
        return {name: value for name, value in first.items() if name not in given}
    names = _config(folder).get("condition")
    return {name: 0.0 for name in names if name not in given} if isinstance(names, list) else {}


def _about(loaded: Any, missing: dict[str, Any], folder: Path) -> Iterator[tuple[str, Any]]:
    """What a person wants to know of a classifier, or of a base model of any family."""
    import sculpt

    if isinstance(loaded, sculpt.Classifier):
        yield "models", ", ".join(f"{n} ({key[:12]})" for n, key in zip(loaded.names, loaded.keys, strict=True))
        yield "observations", loaded.observations
        yield "odds", "an input" if loaded.odds else "equal"
        yield "training", curve(loaded.history)
        return
    yield "name", loaded.name.partition("[")[0] if missing else loaded.name
    yield "key", "one for each value of its condition" if missing else loaded.key
    network: Any = loaded.networks[0]
    yield "network", f"{type(getattr(network, 'module', network)).__name__}, {loaded.facts['parameters']} parameters"
    if isinstance(loaded, sculpt.Diffusion):
        config = loaded.scheduler.config
        yield "shape", " × ".join(map(str, loaded.shape)) + (", latents" if loaded.autoencoder is not None else "")
        yield "scheduler", f"{type(loaded.scheduler).__name__}, {config.get('beta_schedule') or 'its own path'}"
        yield "predicts", loaded.schedule.prediction_type
        yield "noise levels", f"{loaded.s_min:.4g} to {loaded.s_max:.4g}"
    elif isinstance(loaded, sculpt.GFlowNet):
        yield "environment", f"{type(loaded.env).__name__}, {loaded.env.n_actions} actions"
        said = [f"{k}={v:g}" for k, v in loaded.condition.items() if k not in missing]
        ranges = getattr(network.module, "ranges", {})
        for name in missing:
            low, high = ranges.get(name, (None, None))
            said.append(f"{name}, a number{'' if low is None else f' from {low:g} to {high:g}'}: --with {name}=NUMBER")
        yield "condition", ", ".join(said) or "none"
    elif isinstance(loaded, sculpt.Tokens):
        yield "tokens", f"{loaded.vocabulary.size:,}, up to {loaded.max_length} in a sequence"
        prompt = "" if missing else loaded.vocabulary.text(loaded.prompt)
        yield "prompt", repr(prompt) if prompt else ""
        yield "condition", _one_of(folder) if missing else ""
        usual = vars(type(loaded.sampling)())
        told = {k: f"{len(v)} tokens" if k == "suppress" else v for k, v in vars(loaded.sampling).items() if v != usual[k]}
        yield "sampling", ", ".join(f"{k}={v}" for k, v in told.items())


def _one_of(folder: Path) -> str:
    """The conditions that a language model has prompts for, and how one is asked for."""
    from sculpt.tokens.learning import known

    first, *others = known(folder)
    name = first.partition("=")[0]
    values = [first, *(key.removeprefix(f"{name}=") if "," not in key else key for key in others)]
    example = [first, *others][-3:][0]
    return f"one of {', '.join(values)}: --with {example}"
