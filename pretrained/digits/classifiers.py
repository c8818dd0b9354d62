"""The classifiers of the coloured-digit models: ``python pretrained/digits/classifiers.py {pair,triple} [--steps n] [--more | --field] [--state folder]``.

They learn from samples of the models themselves, not from the data: two networks do not keep the ratio of
their densities within a class, and a classifier has to tell the models apart as they are. ``--field`` gives a saved classifier its guidance
field. A killed run goes on where it stopped.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path += [str(folder) for folder in Path(__file__).parents[:2]]

import base_samples
import recipes
from base_samples import pool
from coloured_mnist import CLASSES, LICENCE, SETS, proportions
from recipes import table, written_cost, written_steps

import sculpt
from sculpt.classifier.fit import Descent
from sculpt.diffusion.denoiser import Denoiser
from sculpt.diffusion.diffusers.encoder import UNetEncoder
from sculpt.diffusion.diffusers.field import NetworkField
from sculpt.files import replacing
from sculpt.identity import digest
from sculpt.training import read_state

HERE = Path(__file__).parent
OBSERVATIONS = {"pair": 2, "triple": 3}
SAMPLES, STEPS, BATCH, RATE = 4000, 1500, 32, 1e-3
FIELD = {"samples": 16_000, "steps": 4000, "batch": 192, "rate": 1e-3}
"""Of the guidance field: some minutes of a GPU."""
FRESH = 40_000
"""Where the samples begin that no classifier was fitted to: cards and benchmark judge by those."""

ENCODER = {"pair": "green", "triple": "cyan"}
"""Whose way down the classifier starts from: the model that knows most digits."""
BEGUN = {"pair": "green", "triple": "zero-one"}
"""Whose network the field starts from: a small one."""


def fit(
    name: str,
    models: list[Denoiser],
    state: Path,
    steps: int = STEPS,
    n: int = SAMPLES,
    past: Sequence[dict] = (),
    batch: int = BATCH,
    rate: float = RATE,
) -> tuple[sculpt.Classifier, list[dict]]:
    """One of the two classifiers and its runs; after ``past`` ones it begins with the network of the saved classifier."""
    drawn = [pool(model, n, state) for model in models]
    data = [x for x, _ in drawn]
    torch.manual_seed(len(past))  # of the encoder's new layers, which a run that was killed early draws again
    if past:
        network = sculpt.load(HERE / name).requires_grad_(True).network
    else:
        network = UNetEncoder.of(next(model for model in models if model.name == ENCODER[name]))
    device, checkpoint = models[0].device, state / (f"{name}-{len(past)}" if past else name)
    classifier = sculpt.fit(
        models,
        OBSERVATIONS[name],
        odds=len(models) == 2,
        network=network,
        data=data,
        steps=steps,
        batch_size=batch,
        descent=Descent(rate, patience=None, mixed_precision=True),
        seed=len(past),
        checkpoint=checkpoint,
        progress=False,
    )
    # Those of its steps, of all processes if some were killed, and of drawing.
    seconds = read_state(checkpoint / "training")[0]["seconds"] + sum(seconds for _, seconds in drawn)
    run = {"steps": classifier.history[-1]["step"], "samples": n, "seconds": round(seconds)}
    return classifier, [*past, run | {"batch": batch, "rate": rate, "device": device.type}]


def fit_field(
    name: str, models: list[Denoiser], state: Path, past: Sequence[dict], *, samples: int, steps: int, batch: int, rate: float
) -> tuple[sculpt.Classifier, list[dict]]:
    """The saved classifier with a guidance field that begins as the network of a model, and all runs."""
    drawn, saved = [pool(model, samples, state) for model in models], sculpt.load(HERE / name)
    # Of another classifier the field is another.
    heads = {key: value for key, value in saved.state_dict().items() if not key.startswith("vector_field.")}
    checkpoint = state / f"{name}-field-{digest(heads)[:12]}"
    began = next(model for model in models if model.name == BEGUN[name])
    std = float(torch.cat([x for x, _ in drawn]).std())
    classifier = sculpt.fit_field(
        saved,
        models,
        network=NetworkField.of(began, len(models), saved.odds, std),
        data=[x for x, _ in drawn],
        steps=steps,
        batch_size=batch,
        learning_rate=rate,
        checkpoint=checkpoint,
        progress=False,
    )
    note, _ = read_state(checkpoint / "field")
    seconds = note["seconds"] + sum(seconds for _, seconds in drawn)
    gain = -min(row["held_out"] for row in note["curve"])
    run = {"steps": note["step"], "samples": samples, "seconds": round(seconds), "batch": batch, "rate": rate}
    return classifier, [*past, run | {"device": models[0].device.type, "field": True, "gain": gain}]


def finish(name: str, classifier: sculpt.Classifier, models: list[Denoiser], runs: list[dict], state: Path) -> None:
    """Weights, runs and card, all at once: a run that is killed before that is ended by the same command."""
    with replacing(HERE / name) as new:
        classifier.cpu().save_pretrained(new)
        recipes.write_runs(new, runs)
        (new / "README.md").write_text(card(name, classifier, models, runs, state, new))


@torch.no_grad()
def quality(classifier: sculpt.Classifier, models: list[Denoiser], state: Path, n: int = 1000) -> dict[str, float]:
    """Cross-entropy of the terminal head on samples that it has not seen, beside the least possible where classes are drawn alike."""
    loss, hits = 0.0, 0
    for i, model in enumerate(models):
        x, _ = pool(model, n, state, first=FRESH)
        log_p = torch.cat([classifier.terminal(part) for part in x.split(250)])
        loss -= float(log_p[:, i].double().mean()) / len(models)
        hits += int((log_p.argmax(1) == i).sum())
    shares = torch.stack([proportions(model.name) for model in models], -1)
    log_best = (shares / shares.sum(-1, keepdim=True)).log()
    best = -float((shares * log_best).nan_to_num(0.0).sum() / len(models))
    return {"terminal": loss, "least": best, "accuracy": hits / (n * len(models))}


@torch.no_grad()
def by_class(classifier: sculpt.Classifier, models: list[Denoiser], state: Path, n: int = 1000) -> list[tuple[str, ...]]:
    """What the terminal head says of each class, beside what the data's proportions say."""
    from judge import Judge

    judge = Judge.from_pretrained(HERE / "judge")
    x = torch.cat([pool(model, n, state, first=FRESH)[0] for model in models])
    label = judge.score(x).label
    p = torch.cat([classifier.terminal(part) for part in x.split(250)]).exp().double()
    shares = torch.stack([proportions(model.name) for model in models], -1)
    rows = []
    for i in shares.sum(-1).nonzero()[:, 0].tolist():
        own, want = p[label == i], shares[i] / shares[i].sum()
        if len(own) >= 20:
            cells = (f"{100 * a:.0f} % ({100 * b:.0f} %)" for a, b in zip(own.mean(0), want, strict=True))
            rows.append((f"{CLASSES[i][1]} {CLASSES[i][0]}", str(len(own)), *cells))
    return rows


def card(
    name: str,
    classifier: sculpt.Classifier,
    models: list[Denoiser],
    runs: list[dict],
    state: Path,
    folder: Path | None = None,
) -> str:
    """Of the classifier whose weights are in its folder, or are about to be."""
    fields, runs = [run for run in runs if run.get("field")], [run for run in runs if not run.get("field")]
    q, names, more = quality(classifier, models, state), [model.name for model in models], len(runs) > 1
    size = sum(p.numel() for key, p in classifier.named_parameters() if not key.startswith("vector_field."))
    recipe = f", `{name} --more`, which begins with its network" * more
    observed = f"{OBSERVATIONS[name]} observations" + " at any odds" * classifier.odds
    least = f"({q['least']:.4f} if classes came as in the data and were drawn alike)"
    rows = {
        "cross-entropy of the terminal head": f"{q['terminal']:.4f} nats {least}",
        "it names the model that made an image": f"{100 * q['accuracy']:.1f} %",
    }
    head = ("class, by the judge", "samples", *(f"made by {name}" for name in names))
    said = "What it says of an image of each class, on average, and in brackets what the data's proportions would say:"
    drawn, last = " and ".join(f"{run['samples']:,}" for run in runs), "the last " * more
    return recipes.card(
        folder or HERE / name,
        f"It steers compositions of {', '.join(names)} with up to {observed}.",
        f"""
models = [sculpt.load(f"pretrained/digits/{{name}}") for name in {json.dumps(names)}]
classifier = sculpt.load("pretrained/digits/{name}")
images = sculpt.posterior(models, {tuple(range(len(models)))}).sample(16, classifier).decode()
""",
        {
            "data": f"{drawn} samples of each model, {last}at {base_samples.STEPS} steps",
            "network": f"the encoder of {ENCODER[name]} to begin with, {size:,} parameters",
            "recipe": f"`python pretrained/digits/classifiers.py {name}`{recipe}: `sculpt.fit`, {written_steps(runs, BATCH)} samples of each model",
            "cost": f"{written_cost(runs)}, the samples included",
            **({"guidance field": of_field(fields[-1], name, classifier)} if fields else {}),
        },
        title=f"{name}: a classifier of {len(models)} coloured-digit models",
        measured="\n\n".join(
            [
                table(("on 1,000 new samples of each model", ""), rows.items()),
                said,
                table(head, by_class(classifier, models, state)),
            ]
        ),
        licence=LICENCE,
    )


def of_field(run: dict, name: str, classifier: sculpt.Classifier) -> str:
    """Where the field comes from."""
    size = sum(p.numel() for p in classifier.field.parameters())
    return (
        f"`classifiers.py {name} --field`: the network of {BEGUN[name]} to begin with, {size:,} parameters in half precision, "
        f"{written_steps([run], FIELD['batch'])} samples of each model, of {run['samples']:,}; {written_cost([run])}, the samples included"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=OBSERVATIONS)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--samples", type=int, help="of each base model")
    parser.add_argument("--more", action="store_true", help="begin with the network of the saved classifier")
    parser.add_argument("--field", action="store_true", help="give the saved classifier a guidance field")
    parser.add_argument("--batch", type=int, help="samples of each model a step")
    parser.add_argument("--rate", type=float, help="of learning")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--state", type=Path, default=Path("train_state/digits"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.more and options.field:
        parser.error("--field is trained beside the heads: run --more first")
    torch.set_num_threads(options.threads)
    models = [sculpt.load(HERE / name, device=options.device) for name in SETS[options.name]]
    usual = FIELD if options.field else {"samples": SAMPLES, "steps": STEPS, "batch": BATCH, "rate": RATE}
    how = {key: value if (given := getattr(options, key)) is None else given for key, value in usual.items()}
    if options.field:
        past = [run for run in recipes.read_runs(HERE / options.name) if not run.get("field")]
        classifier, runs = fit_field(options.name, models, options.state, past, **how)
    else:
        past = recipes.read_runs(HERE / options.name) if options.more else []
        past = [run for run in past if not run.get("field")]
        classifier, runs = fit(
            options.name, models, options.state, how["steps"], how["samples"], past, how["batch"], how["rate"]
        )
    finish(options.name, classifier, models, runs, options.state)
