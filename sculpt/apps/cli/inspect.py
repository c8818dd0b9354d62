"""``sculpt inspect``: what is in a checkpoint."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
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
    parser.add_argument("path", help="a folder, or a Hub id (owner/name)")
    parser.add_argument(
        "--with", dest="condition", action="append", default=[], metavar="KEY=VALUE",
        help="a condition that loading needs, e.g. beta=32",
    )  # fmt: skip
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    import sculpt
    from sculpt.hub import kind_of, locate

    folder = locate(options.path)
    rows = [("path", folder), ("kind", kind_of(folder))]
    rows += _about(sculpt.load(folder, **conditions(options.condition, [""])[""]))
    for path in sorted(folder.rglob("*.safetensors")):
        if "training" not in path.parts:
            sha = hashlib.sha256(path.read_bytes()).hexdigest()
            rows.append((str(path.relative_to(folder)), f"{path.stat().st_size / 2**20:.2f} MiB, sha256 {sha[:16]}…"))
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:>{width}}  {value}" for name, value in rows))


def _about(loaded: Any) -> Iterator[tuple[str, Any]]:
    """What a person wants to know of a classifier, or of a base model of any family."""
    import sculpt

    if isinstance(loaded, sculpt.Classifier):
        yield "models", ", ".join(f"{n} ({key[:12]})" for n, key in zip(loaded.names, loaded.keys, strict=True))
        yield "observations", loaded.observations
        yield "odds", "an input" if loaded.odds else "equal"
        yield "training", curve(loaded.history)
        return
    yield "name", loaded.name
    yield "key", loaded.key
    if isinstance(loaded, sculpt.Diffusion):
        network: Any = loaded.model
        config = loaded.scheduler.config
        yield "network", f"{type(network).__name__}, {sum(p.numel() for p in network.parameters()):,} parameters"
        yield "shape", " × ".join(map(str, loaded.shape)) + (", latents" if loaded.autoencoder is not None else "")
        yield "scheduler", f"{type(loaded.scheduler).__name__}, {config.get('beta_schedule') or 'its own path'}"
        yield "predicts", loaded.schedule.prediction_type
        yield "noise levels", f"{loaded.s_min:.4g} to {loaded.s_max:.4g}"
    elif isinstance(loaded, sculpt.GFlowNet):
        yield "environment", f"{type(loaded.env).__name__}, {loaded.env.n_actions} actions"
        yield "condition", ", ".join(f"{k}={v:g}" for k, v in loaded.condition.items()) or "none"
