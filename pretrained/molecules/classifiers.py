r"""The classifiers of the molecule policies at β = 32: ``python pretrained/molecules/classifiers.py {seh-sa,seh-sa-qed} [--steps n] [--more]``.

A molecule is written in one way, so the guided chain's density q and the composition's density π up to a constant are both known
exactly. That gives the total variation between them without bias from anything learned:

.. math:: \mathrm{TV} = \tfrac12 E_q \bigl| \tfrac{\pi}{q Z} - 1 \bigr|, \qquad Z = E_q \tfrac{\pi}{q}
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))

import recipes
from recipes import table

import sculpt
from sculpt.actions.paths import path_ratios
from sculpt.classifier.fit import Descent
from sculpt.files import replacing
from sculpt.formula import label_sets
from sculpt.training import read_state

HERE = Path(__file__).parent
BETA, RATE, SAMPLES, REUSE = 32, 1e-3, 8_000, 5
OBSERVATIONS = {"seh-sa": 2, "seh-sa-qed": 3}
BATCH = {"seh-sa": 32, "seh-sa-qed": 16}  # trajectories of each model a step


def fit(name: str, steps: int, state: Path, more: bool) -> None:
    models = [sculpt.load(HERE / part, beta=BETA) for part in name.split("-")]
    odds, settings = len(models) == 2, {"steps": steps, "batch_size": BATCH[name], "descent": Descent(RATE)}
    # The pair overlaps by three percent, the three by less than a millionth: only compositions show compositions.
    settings |= {"samples": SAMPLES, "reuse": REUSE, "composed": True}
    runs = recipes.read_runs(HERE / name) if more else []
    if more:
        settings["network"] = sculpt.load(HERE / name).requires_grad_(True).network
    checkpoint = state / (f"{name}-{len(runs)}" if more else name)
    classifier = sculpt.fit(models, OBSERVATIONS[name], odds=odds, checkpoint=checkpoint, seed=len(runs), **settings)
    runs.append({"steps": steps, "seconds": round(read_state(checkpoint / "training")[0]["seconds"])})
    with replacing(HERE / name) as new:
        classifier.save_pretrained(new)
        recipes.write_runs(new, runs)
        (new / "README.md").write_text(card(new, models, classifier, runs))


def card(folder: Path, models: list, classifier: sculpt.Classifier, runs: list[dict]) -> str:
    name, n, rows = folder.name, len(models), []
    for labels in [s for k in range(2, n + 1) for s in label_sets(n, k)]:
        for odds in [0.05, 0.5, 0.95] if n == 2 else [None]:
            weights = None if odds is None else [odds, 1 - odds]
            tv, ess = distance(sculpt.posterior(models, labels, weights), classifier)
            named = ", ".join(models[i].name.split("[")[0] for i in labels)
            rows.append((named, str(odds or ""), f"{tv:.3f}", f"{100 * ess:.0f} %"))
    listed, names = ", ".join(model.name for model in models), ", ".join(f'"{part}"' for part in name.split("-"))
    recipe = f"`python pretrained/molecules/classifiers.py {name} --steps {runs[0]['steps']}`"
    recipe += "".join(f", `{name} --more --steps {run['steps']}`, which begins with its network" for run in runs[1:])
    size, minutes = sum(p.numel() for p in classifier.parameters()), " and ".join(f"{run['seconds'] / 60:.0f}" for run in runs)
    return recipes.card(
        folder,
        f"It steers compositions of {listed} with up to {OBSERVATIONS[name]} observations{' at any odds' if n == 2 else ''}.",
        f"""
models = [sculpt.load(f"pretrained/molecules/{{name}}", beta={BETA}) for name in ({names})]
samples = sculpt.posterior(models, {tuple(range(n))}).sample(1000, sculpt.load("pretrained/molecules/{name}"))
""",
        {
            "data": f"{SAMPLES:,} trajectories at a time of each base model, and of compositions",
            "network": f"causal transformer over fragments, heads over actions; {size:,} parameters",
            "recipe": f"{recipe}: `sculpt.fit`, {BATCH[name]} trajectories of each model a step",
            "cost": f"{minutes} CPU minutes on one thread",
        },
        title=f"{name}: a classifier of {n} molecule policies",
        after=f"""Total variation between the guided chain and the exact composition of the base models, and the effective sample size of exact weights,
both from 2,000 guided samples and exact path densities; what `correct=True` then does is not in it.

{table(("labels", "odds of the first", "total variation", "effective sample size"), rows)}""",
        licence="the project's; no third-party data",
    )


@torch.no_grad()
def distance(composition: sculpt.Composition, classifier: sculpt.Classifier, n: int = 2000) -> tuple[float, float]:
    """Total variation to the composition, and effective sample size per sample."""
    guided = composition.guided(classifier)
    x = guided.sample(n, generator=torch.Generator().manual_seed(0)).x
    log_w = composition.formula.value(path_ratios(composition.models, x)) - path_ratios([guided], x)[:, 0]
    ratio = torch.softmax(log_w, 0) * n
    return float((ratio - 1).abs().mean() / 2), float(1 / ratio.square().mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=OBSERVATIONS)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--more", action="store_true", help="begin with the network of the saved classifier")
    parser.add_argument("--state", type=Path, default=Path("train_state/molecules"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    fit(options.name, options.steps, options.state, options.more)
