"""The paper's base policies on the 32×32 grid and two classifiers of them: ``python pretrained/grid/recipe.py [name ...]``.

Trajectory balance with the uniform backward policy, on trajectories drawn backwards from terminal states (half uniform,
half by reward). The grid has 1,024 states, so the network is evaluated once per step on all of them and a batch of
thousands of trajectories costs no more than its table look-ups. A killed run goes on where it stopped.
"""

import json
import math
import re
import shutil
import sys
import time
from pathlib import Path

import torch
from gfn.gym import HyperGrid
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))

import recipes
from recipes import table

import sculpt
from sculpt.actions.networks import GridNetwork
from sculpt.actions.paths import path_ratios
from sculpt.files import replacing
from sculpt.formula import label_sets
from sculpt.gflownet import exact
from sculpt.gflownet.estimators import NetworkPolicy
from sculpt.gflownet.model import GFlowNet
from sculpt.training import Row, Training, cosine, read_state

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


class Recipe:
    """How a policy is trained."""

    def __init__(self, name: str, steps: int = STEPS, folder: Path | None = None):
        torch.manual_seed(0)
        self.name, self.steps, self.env = name, steps, HyperGrid(ndim=2, height=HEIGHT, validate_modes=False)
        self.graph = exact.dag(self.env)
        self.log_R = log_reward(name, self.graph.states)
        network, self.log_Z = GridNetwork(2, HEIGHT, 3, encoding="one-hot"), nn.ParameterList([torch.zeros(())])
        groups = [{"params": network.parameters()}, {"params": self.log_Z.parameters(), "lr": 0.1}]
        rate, identity = cosine(steps, least=0.001), {"name": name, "steps": steps, "batch": BATCH}
        self.training = Training(network, torch.optim.Adam(groups, lr=RATE), folder, identity=identity, rate=rate)
        self.training.resume(log_Z=self.log_Z)

    def loss(self, seed: int) -> tuple[Tensor, Row]:
        r"""Trajectory balance: :math:`\log Z + \log P_F(\tau) = \log R(x) + \log P_B(\tau | x)`"""
        graph, generator = self.graph, torch.Generator().manual_seed(seed)
        uniform = torch.randint(0, len(self.log_R), (BATCH // 2,), generator=generator)
        x = torch.cat([uniform, torch.multinomial(self.log_R.softmax(0), BATCH // 2, True, generator=generator)])
        edges, log_pb = backward_paths(graph.states[x], generator)
        log_P = torch.log_softmax(self.training.network(graph.states).masked_fill(~graph.allowed, -1e9), dim=-1)
        flat = torch.cat([log_P.reshape(-1), torch.zeros(1)])
        residual = self.log_Z[0] + flat[edges].sum(-1) + log_P[x, -1] - self.log_R[x].float() - log_pb
        return residual.square().mean(), {}

    def model(self) -> GFlowNet:
        """The policy as it is: with this schedule the last weights need no averaging."""
        return GFlowNet(self.env, NetworkPolicy(self.training.network, 3), name=self.name)

    @torch.no_grad()
    def evaluate(self) -> Row:
        return {"l1_to_reward": exact.l1(exact.terminal_distribution(self.model()), self.log_R.softmax(0))}


def train(name: str, steps: int = STEPS, folder: Path = HERE) -> GFlowNet:
    state = folder / f".{name}"
    recipe = Recipe(name, steps, state)
    recipes.train(recipe, report=500, keep=10.0)
    recipe.training.network.eval().requires_grad_(False)
    model = recipe.model()
    with replacing(folder / name) as new:
        model.save_pretrained(new)
        (new / "README.md").write_text(card(model, new, recipe))
    shutil.rmtree(state)
    return model


def card(model: GFlowNet, folder: Path, recipe: Recipe) -> str:
    generator = torch.Generator().manual_seed(0)
    x = recipe.graph.states[torch.multinomial(recipe.log_R.softmax(0), 1000, True, generator=generator)]
    spread = torch.stack([path_ratios([model], x, generator) for _ in range(8)]).std(0).mean()
    size, l1 = sum(p.numel() for p in model.policy.parameters()), recipe.evaluate()["l1_to_reward"]
    how = f"trajectory balance, {recipe.steps:,} steps of {BATCH:,} trajectories, Adam {RATE:g} with cosine decay"
    return recipes.card(
        folder,
        "A GFlowNet policy on the 32×32 grid (`HyperGrid(ndim=2, height=32)` of torchgfn), one of the five base models of\n"
        f"*Compositional Sculpting of Iterative Generative Processes*. It samples cells in proportion to the paper's `{model.name}` reward.",
        f'model = sculpt.load("pretrained/grid/{model.name}")',
        {
            "data": f'none: the reward is a formula, `REWARDS["{model.name}"]` in `../recipe.py`',
            "network": f"one-hot (64) → 256 → 256 → 3 actions, {size:,} parameters; uniform backward policy",
            "recipe": f"`python pretrained/grid/recipe.py {model.name}`: {how}",
            "cost": f"{recipe.training.seconds:.0f} CPU seconds on one thread",
            "L1 to the reward's distribution": f"{l1:.4f} (between 0 and 2; exact, by pushing mass)",
            "path-ratio spread": f"{spread:.4f} nats: standard deviation of log P_F − log P_B over backward paths to one state",
        },
        licence="the project's; trained from a formula, no third-party data",
    )


# Classifiers

SETS = {
    "pair": {"models": ["symmetric_shubert", "diag_sigmoid"], "observations": 2, "odds": True},
    "circles": {"models": ["circle1", "circle2", "circle3"], "observations": 3, "odds": False},
}


def fit_classifier(name: str, folder: Path | None = HERE, **options) -> tuple[sculpt.Classifier, float]:
    """One of the two classifiers, and the CPU seconds of its steps; with a folder it is saved there and a killed run goes on."""
    settings = SETS[name]
    models = [sculpt.load(HERE / model) for model in settings["models"]]
    work = None if folder is None else folder / f".{name}"
    started = time.process_time()
    classifier = sculpt.fit(models, settings["observations"], settings["odds"], checkpoint=work, progress=False, **options)
    if work is None:
        return classifier, time.process_time() - started
    seconds = read_state(work / "training")[0]["seconds"]  # of all processes, if some were killed
    with replacing(folder / name) as new:
        classifier.save_pretrained(new)
        (new / "README.md").write_text(classifier_card(classifier, models, new, seconds))
    shutil.rmtree(work)
    return classifier, seconds


def load_classifier(name: str) -> tuple[sculpt.Classifier, float]:
    """The saved classifier and the CPU seconds that its card tells."""
    card = (HERE / name / "README.md").read_text()
    return sculpt.load(HERE / name), float(re.search(r"\| cost \| (\d+) CPU", card).group(1))


def classifier_card(classifier: sculpt.Classifier, models: list, folder: Path, seconds: float) -> str:
    p = [exact.terminal_distribution(model) for model in models]
    errors = []
    for labels in label_sets(classifier.m, classifier.observations):
        for alpha in (0.05, 0.5, 0.95) if classifier.odds else (None,):
            composition = sculpt.posterior(models, labels, alpha)
            q = exact.terminal_distribution(composition.guided(classifier))
            odds = "" if alpha is None else f", odds {alpha:g} : {1 - alpha:g}"
            errors.append((f"{labels}{odds}", f"{exact.l1(q, exact.target(composition.formula, p)):.4f}"))
    names, size = [str(model) for model in models], sum(w.numel() for w in classifier.parameters())
    steps, odds = classifier.history[-1]["step"], " at any odds" * classifier.odds
    return recipes.card(
        folder,
        f"It steers compositions of {', '.join(names)} with up to {classifier.observations} observations{odds}.",
        f"""
models = [sculpt.load(f"pretrained/grid/{{name}}") for name in {json.dumps(names)}]
classifier = sculpt.load("pretrained/grid/{folder.name}")
samples = sculpt.posterior(models, {tuple(range(len(models)))}).sample(1000, classifier)
""",
        {
            "data": "trajectories of the base models, drawn while training",
            "network": f"coordinates one-hot, two layers of 256, heads; {size:,} parameters",
            "recipe": f"`python pretrained/grid/recipe.py {folder.name}`: `sculpt.fit` as it is, {steps:,} steps",
            "cost": f"{seconds:.0f} CPU seconds on one thread",
        },
        title=f"{folder.name}: a classifier of {len(models)} grid policies",
        after=f"""L1 to the exact composition of the same base models, between 0 and 2, by pushing mass through the guided policy:

{table(("labels", "L1"), errors)}""",
        licence="the project's; no third-party data",
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or [*REWARDS, *SETS]:
        fit_classifier(name) if name in SETS else train(name)
