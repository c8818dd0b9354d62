"""Compositions of the coloured-digit models as models of their own: ``python pretrained/digits/distill.py {low-cyan,more-than-low} [--device cuda]``.

Each begins as its anchor's network and learns from the anchor's own samples, each as often as the triple's terminal head keeps it: the
referee's samples, and none are wasted. A killed run goes on where it stopped.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path += [str(folder) for folder in Path(__file__).parents[:2]]

import base_samples
import recipes
from base_samples import pool
from coloured_mnist import LICENCE, SETS, composed, proportions
from judge import Judge
from recipes import table, written_cost

import sculpt
from sculpt.training import read_state

HERE = Path(__file__).parent
LABELS = {"low-cyan": ("zero-one", "cyan"), "more-than-low": ("zero-one", "zero-one", "zero-one")}
"""Name of the model -> what is observed, the anchor first: likely under zero-one and cyan; under zero-one and not the others."""
SAMPLES, STEPS, BATCH, RATE = 32_000, 4000, 512, 4e-4


def composition_of(name: str, models: list) -> sculpt.Composition:
    """The posterior over the triple's models."""
    return sculpt.posterior(models, tuple(SETS["triple"].index(label) for label in LABELS[name]))


@torch.no_grad()
def weighted(
    composition: sculpt.Composition, classifier: sculpt.Classifier, n: int, state: Path
) -> tuple[sculpt.Samples, float]:
    """Samples of the anchor with the log-weights of keeping them, and the seconds that they took."""
    posterior, models = classifier.align(composition.anchored(None), composition.models)
    x, seconds = pool(models[posterior.labels[0]], n, state)
    options = {"labels": posterior.labels, "odds": posterior.odds}
    device = next(classifier.parameters()).device
    log_f = torch.cat([classifier.log_h_terminal(part.to(device), **options).cpu().double() for part in x.split(250)])
    return sculpt.Samples(x, torch.log_softmax(log_f, 0)), seconds


class Asked:
    """What the judge says of samples of a composition."""

    def __init__(self, composition: sculpt.Composition):
        self.judge = Judge.from_pretrained(HERE / "judge")
        self.share = composed(composition.formula, [proportions(name) for name in SETS["triple"]])

    def __call__(self, x: Tensor) -> dict[str, float]:
        scores = self.judge.score(x)
        return {
            "as asked, %": 100 * float((self.share[scores.label] > 0).double().mean()),
            "one clear digit, %": 100 * float(scores.accepted.double().mean()),
            "largest difference of a class's share to the data's, points": 100
            * float((scores.shares - self.share).abs().max()),
        }


def distilled(
    name: str,
    composition: sculpt.Composition,
    classifier: sculpt.Classifier,
    state: Path,
    samples: int,
    *,
    steps: int,
    batch: int,
    rate: float,
    compare: int,
) -> dict:
    """Train the model in a folder of the state; what there is to say of the run."""
    data, seconds = weighted(composition, classifier, samples, state)
    checkpoint = state / f"distilled-{name}"
    sculpt.distill(
        composition,
        sculpt.Rejection(classifier),
        data=data,
        steps=steps,
        batch_size=batch,
        learning_rate=rate,
        checkpoint=checkpoint,
        judge=Asked(composition),
        compare=compare,
        sample_steps=base_samples.STEPS,
        progress=False,
    )
    seconds += read_state(checkpoint / "training")[0]["seconds"]
    run = {"steps": steps, "batch": batch, "samples": samples, "seconds": round(seconds)}
    return run | {"device": next(classifier.parameters()).device.type}


def card(folder: Path, run: dict) -> str:
    """Of the model in this folder."""
    about, name = json.loads((folder / "distillation.json").read_text()), folder.name
    said = {what: f"{value:.3g}" if isinstance(value, float) else f"{value:,}" for what, value in about["measured"].items()}
    observed = ", ".join(LABELS[name])
    return recipes.card(
        folder,
        f"`{about['composition']}` of the coloured-digit models ({observed} observed) as a model of its own: one network, one call a step.",
        f"""
model = sculpt.load("pretrained/digits/{name}")
images = model.sample(16, steps=32).decode()

pipe = diffusers.DDPMPipeline.from_pretrained("pretrained/digits/{name}")  # the same weights without sculpt
""",
        {
            "data": f"{run['samples']:,} samples of {LABELS[name][0]} at {base_samples.STEPS} steps, as often as the triple's terminal head keeps them",
            "network": f"that of {LABELS[name][0]} to begin with",
            "recipe": f"`python pretrained/digits/distill.py {name}`: `sculpt.distill`, {run['steps']:,} steps of {run['batch']}, averaged weights",
            "cost": f"{written_cost([run])}, the samples included",
        },
        measured=table(("fresh samples, beside held-out ones of the target", ""), said.items()),
        weights="unet/diffusion_pytorch_model.safetensors",
        licence=LICENCE,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=LABELS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of the anchor")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rate", type=float, default=RATE, help="of learning")
    parser.add_argument("--compare", type=int, default=1000, help="samples that the card compares")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--state", type=Path, default=Path("train_state/digits"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = [sculpt.load(HERE / name, device=options.device) for name in SETS["triple"]]
    composition = composition_of(options.name, models)
    classifier = sculpt.load(HERE / "triple", device=options.device)
    how = {"steps": options.steps, "batch": options.batch, "rate": options.rate, "compare": options.compare}
    run = distilled(options.name, composition, classifier, options.state, options.samples, **how)
    recipes.publish(options.state / f"distilled-{options.name}", HERE / options.name, [run], functools.partial(card, run=run))
