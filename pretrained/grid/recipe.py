"""The paper's base policies on the 32×32 grid and two classifiers of them: ``python pretrained/grid/recipe.py [name ...]``.

Trajectory balance with the uniform backward policy, on trajectories drawn backwards from terminal states (half uniform,
half by reward). The grid has 1,024 states, so the network is evaluated once per step on all of them and a batch of
thousands of trajectories costs no more than its table look-ups. A killed run goes on where it stopped.
"""

import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from pathlib import Path

import torch
from gfn.gym import HyperGrid
from torch import Tensor

import sculpt
from sculpt.formula import label_sets
from sculpt.gflownet import exact
from sculpt.gflownet.model import GFlowNet
from sculpt.gflownet.network import GridNetwork, NetworkPolicy
from sculpt.gflownet.sampler import path_ratios

HERE = Path(__file__).parent
HEIGHT, STEPS, BATCH, RATE = 32, 4000, 1024, 5e-3

# Rewards of the paper: log R at x, y in [-1, 1]


def normal(x: Tensor, y: Tensor, centre: tuple[float, float], s: float) -> Tensor:
    return torch.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * s**2)) / (2 * math.pi * s**2)


def circle(centre, factor, offsets, s, floor):
    """Flat outside a disc of radius 0.6, a few bumps on a plateau inside."""

    def log_reward(x, y):
        bumps = [normal(x, y, (centre[0] + a, centre[1] + b), s) for a, b in offsets]
        inside = factor * torch.stack(bumps).mean(0) + floor
        disc = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= 0.6**2
        return (torch.where(disc, inside, 0.1) + 1e-8).log()

    return log_reward


def symmetric_shubert(x, y):
    def S(x):
        u = -9.45 + 2.3 * (x.abs() / 2 + 0.5)
        return sum(i * torch.cos((i + 1) * u + i) for i in range(1, 6))

    return ((S(x) * S(y) + 186.6158) / 396.8924 + 1e-3).log() / 0.5


def diag_sigmoid(x, y):
    return (torch.sigmoid(5 * (x + y)) + 1e-5).log()


REWARDS = {
    "symmetric_shubert": symmetric_shubert,
    "diag_sigmoid": diag_sigmoid,
    "circle1": circle((-0.3, 0.0), 2.5, [(0, 0)], 0.3, 6.5),
    "circle2": circle((0.15, 0.2598), 3.5, [(-0.2771, 0.16), (0.2771, -0.16)], 0.21, 10.5),
    "circle3": circle((0.15, -0.2598), 2.5, [(-0.32, 0), (0.16, 0.2771), (0.16, -0.2771)], 0.18, 5.5),
}


def log_reward(name: str, states: Tensor) -> Tensor:
    """log R of a named reward at grid states, ``(b, 2)`` coordinates from 0 to 31."""
    x, y = (states.double() / (HEIGHT - 1) * 2 - 1).unbind(-1)
    return REWARDS[name](x, y)


# Training


def backward_paths(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Edges ``3 (32 i + j) + a`` of one uniform backward path from each x, padded with the last number + 1, and log P_B."""
    states, log_pb = x.clone(), torch.zeros(len(x))
    edges = torch.full((len(x), 2 * (HEIGHT - 1)), 3 * HEIGHT**2)
    rows = torch.arange(len(x))
    for t in range(2 * (HEIGHT - 1)):
        choices = (states > 0).sum(-1)
        coin = (torch.rand(len(x), generator=generator) < 0.5).long()
        action = torch.where(choices == 2, coin, (states[:, 1] > 0).long())
        going = choices > 0
        states[rows[going], action[going]] -= 1
        edges[going, t] = (3 * (HEIGHT * states[:, 0] + states[:, 1]) + action)[going]
        log_pb -= math.log(2) * (choices == 2)
    return edges, log_pb


def train(name: str, steps: int = STEPS, folder: Path = HERE) -> GFlowNet:
    env = HyperGrid(ndim=2, height=HEIGHT, validate_modes=False)
    graph = exact.dag(env)
    log_R = log_reward(name, graph.states)
    torch.manual_seed(0)
    network, log_Z = GridNetwork(2, HEIGHT, 3, encoding="one-hot"), torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.Adam([{"params": network.parameters()}, {"params": [log_Z], "lr": 0.1}], lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.001 + 0.5 * (1 + math.cos(math.pi * k / steps)))
    resume, first, seconds = folder / f".{name}.pt", 0, 0.0
    if resume.exists():
        state = torch.load(resume, weights_only=True)
        network.load_state_dict(state["network"])
        log_Z.data = state["log_Z"]
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first, seconds = state["step"], state["seconds"]
    started = time.process_time() - seconds
    for k in range(first, steps):
        generator = torch.Generator().manual_seed(k)
        uniform = torch.randint(0, len(log_R), (BATCH // 2,), generator=generator)
        x = torch.cat([uniform, torch.multinomial(log_R.softmax(0), BATCH // 2, True, generator=generator)])
        edges, log_pb = backward_paths(graph.states[x], generator)
        log_P = torch.log_softmax(network(graph.states).masked_fill(~graph.allowed, -1e9), dim=-1)
        flat = torch.cat([log_P.reshape(-1), torch.zeros(1)])
        # Trajectory balance: log Z + log P_F(τ) = log R(x) + log P_B(τ | x)
        loss = (log_Z + flat[edges].sum(-1) + log_P[x, -1] - log_R[x].float() - log_pb).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if k % 500 == 499:
            print(f"{name} {k + 1}/{steps} loss {loss.item():.2e} {time.process_time() - started:.0f} s", flush=True)
            state = {"network": network.state_dict(), "log_Z": log_Z.data, "optimizer": optimizer.state_dict()}
            state |= {"schedule": schedule.state_dict(), "step": k + 1, "seconds": time.process_time() - started}
            torch.save(state, resume.with_suffix(".tmp"))
            os.replace(resume.with_suffix(".tmp"), resume)
    model = GFlowNet(env, NetworkPolicy(network.eval().requires_grad_(False), 3), name=name)
    model.save_pretrained(folder / name)
    write_card(model, folder / name, log_R, steps, time.process_time() - started)
    resume.unlink(missing_ok=True)
    return model


def write_card(model: GFlowNet, folder: Path, log_R: Tensor, steps: int, seconds: float) -> None:
    graph = exact.dag(model)
    p = exact.terminal_distribution(model)
    q = log_R.softmax(0)
    generator = torch.Generator().manual_seed(0)
    x = graph.states[torch.multinomial(q, 1000, True, generator=generator)]
    spread = torch.stack([path_ratios([model], x, generator) for _ in range(8)]).std(0).mean()
    measured = {"l1_to_reward": exact.l1(p, q), "js_to_reward": exact.js(p, q), "path_ratio_spread": float(spread)}
    sha = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    size = sum(p.numel() for p in model.policy.parameters())
    (folder / "README.md").write_text(
        f"""# {model.name}

A GFlowNet policy on the 32×32 grid (`HyperGrid(ndim=2, height=32)` of torchgfn), one of the five base models of
*Compositional Sculpting of Iterative Generative Processes*. It samples cells in proportion to the paper's `{model.name}` reward.

```python
model = sculpt.load("pretrained/grid/{model.name}")
```

| | |
|---|---|
| data | none: the reward is a formula, `REWARDS["{model.name}"]` in `../recipe.py` |
| network | one-hot (64) → 256 → 256 → 3 actions, {size:,} parameters; uniform backward policy |
| recipe | `python pretrained/grid/recipe.py {model.name}`: trajectory balance, {steps:,} steps of {BATCH:,} trajectories, Adam {RATE:g} with cosine decay |
| cost | {seconds:.0f} CPU seconds on one thread |
| L1 to the reward's distribution | {measured["l1_to_reward"]:.4f} (between 0 and 2; exact, by pushing mass) |
| path-ratio spread | {measured["path_ratio_spread"]:.4f} nats: standard deviation of log P_F − log P_B over backward paths to one state |
| `model.safetensors` | sha256 {sha} |
| licence | the project's; trained from a formula, no third-party data |
"""
    )
    print(model.name, json.dumps(measured), flush=True)


# Classifiers

SETS = {
    "pair": {"models": ["symmetric_shubert", "diag_sigmoid"], "observations": 2, "odds": True},
    "circles": {"models": ["circle1", "circle2", "circle3"], "observations": 3, "odds": False},
}


def fit_classifier(name: str, folder: Path | None = HERE, **options) -> tuple[sculpt.Classifier, float]:
    """One of the two classifiers, and the CPU seconds it took; with a folder it is saved there and a killed run goes on."""
    settings = SETS[name]
    models = [sculpt.load(HERE / model) for model in settings["models"]]
    work = None if folder is None else folder / f".{name}"
    started = time.process_time()
    classifier = sculpt.fit(models, settings["observations"], settings["odds"], checkpoint=work, progress=False, **options)
    seconds = time.process_time() - started
    if folder is not None:
        classifier.save_pretrained(folder / name)
        write_classifier_card(classifier, models, folder / name, seconds)
        shutil.rmtree(work)
    return classifier, seconds


def load_classifier(name: str) -> tuple[sculpt.Classifier, float]:
    """The saved classifier and the CPU seconds that its card tells."""
    card = (HERE / name / "README.md").read_text()
    return sculpt.load(HERE / name), float(re.search(r"\| cost \| (\d+) CPU", card).group(1))


def write_classifier_card(classifier: sculpt.Classifier, models: list, folder: Path, seconds: float) -> None:
    p = [exact.terminal_distribution(model) for model in models]
    errors = []
    for labels in label_sets(classifier.m, classifier.observations):
        for alpha in (0.05, 0.5, 0.95) if classifier.odds else (None,):
            composition = sculpt.posterior(models, labels, alpha)
            q = exact.terminal_distribution(composition.guided(classifier))
            odds = "" if alpha is None else f", odds {alpha:g} : {1 - alpha:g}"
            errors.append(f"| {labels}{odds} | {exact.l1(q, exact.target(composition.formula, p)):.4f} |")
    sha = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    names = [str(model) for model in models]
    (folder / "README.md").write_text(
        f"""# {folder.name}: a classifier of {len(models)} grid policies

It steers compositions of {", ".join(names)} with up to {classifier.observations} observations{" at any odds" * classifier.odds}.

```python
models = [sculpt.load(f"pretrained/grid/{{name}}") for name in {json.dumps(names)}]
classifier = sculpt.load("pretrained/grid/{folder.name}")
samples = sculpt.posterior(models, {tuple(range(len(models)))}).sample(1000, classifier)
```

| | |
|---|---|
| data | trajectories of the base models, drawn while training |
| network | coordinates one-hot, two layers of 256, heads; {sum(w.numel() for w in classifier.parameters()):,} parameters |
| recipe | `python pretrained/grid/recipe.py {folder.name}`: `sculpt.fit` as it is, {classifier.history[-1]["step"]:,} steps |
| cost | {seconds:.0f} CPU seconds on one thread |
| `model.safetensors` | sha256 {sha} |
| licence | the project's; no third-party data |

L1 to the exact composition of the same base models, between 0 and 2, by pushing mass through the guided policy:

| labels | L1 |
|---|---|
{chr(10).join(errors)}
"""
    )
    print(folder.name, *errors, sep="\n", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or [*REWARDS, *SETS]:
        fit_classifier(name) if name in SETS else train(name)
