r"""seh & sa & qed at β = 32 as one policy: ``python pretrained/molecules/distill.py [--steps n] [--device cuda]``.

A molecule is written in one way, so the composition's own log-density is known exactly, and the policy learns to balance with it
(``sculpt.distill``). It begins as a copy of seh's and is no larger. A killed run goes on where it stopped, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))

import recipes
from recipes import table

import sculpt
from sculpt.files import replacing
from sculpt.molecules import QED, SA, SEH
from sculpt.training import clock_of

HERE = Path(__file__).parent
NAMES, BETA = ("seh", "sa", "qed"), 32
HIGH = {"seh": (SEH, 0.5), "sa": (SA, 0.6), "qed": (QED, 0.25)}  # the paper's "high"
PARTICLES, SAMPLES, BATCH, RATE = 20_000, 8192, 128, 1e-3
NAME = "-".join(NAMES) + "-distilled"


def distill(steps: int, state: Path, device: str) -> None:
    seh, sa, qed = (sculpt.load(HERE / name, beta=BETA, device=device) for name in NAMES)
    options = {"steps": steps, "batch_size": BATCH, "learning_rate": RATE, "samples": SAMPLES, "name": NAME}
    policy = sculpt.distill(seh & sa & qed, sculpt.Tracked(particles=PARTICLES), checkpoint=state, **options)
    about = json.loads((state / "distillation.json").read_text())
    with replacing(HERE / NAME) as new:
        policy.save_pretrained(new)
        (new / "distillation.json").write_text(json.dumps(about, indent=1) + "\n")
        (new / "README.md").write_text(card(new, policy, about, device))


def card(folder: Path, policy: sculpt.GFlowNet, about: dict, device: str, n: int = 5000) -> str:
    policy.sample(100, progress=False)
    clock = clock_of(policy.device)
    started = clock()
    samples = policy.sample(n, generator=torch.Generator().manual_seed(2), progress=False)
    pace = n / (clock() - started)
    molecules = policy.env.molecules(samples.x)
    high = torch.stack([reward()(molecules).nan_to_num(0.0) >= least for reward, least in HIGH.values()])
    rows = [(what, f"{value:.4g}" if isinstance(value, float) else str(value)) for what, value in about["measured"].items()]
    rows += [
        (f"{name} at least {least}", f"{100 * row.float().mean():.1f} %")
        for (name, (_, least)), row in zip(HIGH.items(), high, strict=True)
    ]
    rows += [
        ("all three", f"{100 * high.all(0).float().mean():.1f} %"),
        (f"molecules a second, one thread, {device}", f"{pace:,.0f}"),
    ]
    size = sum(p.numel() for p in policy.module.parameters())
    return recipes.card(
        folder,
        f"`{' & '.join(NAMES)}` at β = {BETA} as one policy: molecules that are high under all three, from one network.",
        f'model = sculpt.load("pretrained/molecules/{NAME}")\nsmiles = model.sample(1000).decode()',
        {
            "data": f"none of ours: its own samples, and {SAMPLES:,} of the composition by tracked densities",
            "network": f"causal transformer over fragments, {size:,} parameters, at first a copy of seh's",
            "recipe": f"`python pretrained/molecules/distill.py --steps {about['steps']}`: `sculpt.distill`, {BATCH} trajectories a step",
            "cost": f"{about['seconds'] / 60:.0f} minutes of {'one CPU thread' if device == 'cpu' else device}",
        },
        title=f"{NAME}: a composition as a policy",
        measured=table(("fresh draws", ""), rows),
        after="Effective share, log Z and total variation by exact weights: a molecule has one path, so both densities are known.",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--state", type=Path, default=Path("train_state/molecules") / NAME)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    distill(options.steps, options.state, options.device)
