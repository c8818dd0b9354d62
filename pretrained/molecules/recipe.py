r"""The molecule policies, trained here: ``python pretrained/molecules/recipe.py {seh,sa,qed} [--steps n] [--state folder]``.

Trajectory balance for all exponents at once: :math:`\beta \sim U[0, 96]` per tree,

.. math:: \bigl(\log Z(\beta) + \log p(x; \beta) - \beta \log R(x) + \log w(x)\bigr)^2

with p the probability that the policy writes the tree x and w the number of its writings (``sculpt.molecules.trees``). A quarter of each
batch comes from the policy with some random choices, the rest from a replay buffer: rewards cost more than gradients, and a tree
in the buffer is worth learning from under any exponent, the better ones more so the larger it is. A killed run goes on where it stopped, bit for bit.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[1]))

import recipes
from recipes import table

from sculpt.files import replacing
from sculpt.gflownet.estimators import NetworkPolicy
from sculpt.gflownet.model import GFlowNet
from sculpt.molecules import QED, SA, SEH, FragmentNetwork, FragmentTrees
from sculpt.molecules.network import BETA_MAX
from sculpt.training import Row, Training, cosine

HERE = Path(__file__).parent
REWARDS = {"seh": SEH, "sa": SA, "qed": QED}
THRESHOLD = {"seh": 0.5, "sa": 0.6, "qed": 0.25}  # the paper's "high"
BATCH, REPLAY, FIRST = 32, 96, 2048  # trees a step, and before the first step
RATE, EXPLORE, KNOTS = 1e-3, 0.05, 33


class LogZ(nn.Module):
    """log Z(β), linear between knots."""

    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(KNOTS))

    def forward(self, beta: Tensor) -> Tensor:
        x = beta / BETA_MAX * (KNOTS - 1)
        left = x.long().clamp(max=KNOTS - 2)
        return torch.lerp(self.values[left], self.values[left + 1], x - left)


class Buffer(nn.Module):
    """The last trees with their rewards."""

    def __init__(self, size: int = 2**16):
        super().__init__()
        self.register_buffer("x", torch.zeros(size, 18, dtype=torch.int16))
        self.register_buffer("log_R", torch.zeros(size))
        self.register_buffer("log_w", torch.zeros(size))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def __len__(self) -> int:
        return min(int(self.count), len(self.x))

    def add(self, x: Tensor, log_R: Tensor, log_w: Tensor) -> None:
        at = (int(self.count) + torch.arange(len(x))) % len(self.x)
        self.x[at], self.log_R[at], self.log_w[at] = x.short(), log_R, log_w
        self.count += len(x)

    def draw(self, beta: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """One tree for each exponent: the best of 1 (β = 0) to 8 (β = 96)."""
        candidates = torch.randint(len(self), (len(beta), 8), generator=generator)
        rounds = (1 + 7 * beta / BETA_MAX).round()
        score = self.log_R[candidates].masked_fill(torch.arange(8) >= rounds[:, None], -math.inf)
        at = candidates.gather(1, score.argmax(1, keepdim=True))[:, 0]
        return self.x[at].long(), self.log_R[at], self.log_w[at]


class Recipe:
    """How a policy is trained."""

    def __init__(self, name: str, steps: int, folder: Path):
        torch.manual_seed(0)
        self.name, self.steps, self.env, self.reward = name, steps, FragmentTrees(), REWARDS[name]()
        network, self.log_Z, self.buffer = FragmentNetwork(self.env.vocabulary), LogZ(), Buffer()
        groups = [{"params": network.parameters(), "lr": RATE}, {"params": self.log_Z.parameters(), "lr": 0.1}]
        # The rate cools down over the last 40 %, where trajectory balance settles.
        rate, identity = cosine(steps, 200, 0.01, hold=0.6), {"name": name, "steps": steps, "batch": [BATCH, REPLAY]}
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        self.training = Training(network, optimizer, folder, identity=identity, rate=rate, clip=20.0)
        if not self.training.resume(log_Z=self.log_Z, buffer=self.buffer):
            self.explore(network)

    def score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        R = self.reward(self.env.molecules(x)).nan_to_num(0.0)
        return R.clamp(min=1e-5).log(), self.env.writings(x).log().float()

    @torch.no_grad()
    def explore(self, network: FragmentNetwork) -> None:
        """Fill the buffer from the untrained policy, and start log Z where that policy would have it."""
        x = network.sample(torch.zeros(FIRST), torch.Generator().manual_seed(0))
        log_R, log_w = self.score(x)
        self.buffer.add(x, log_R, log_w)
        log_p = network.log_p(x, torch.zeros(FIRST))
        for i in range(KNOTS):
            self.log_Z.values[i] = (BETA_MAX * i / (KNOTS - 1) * log_R - log_w - log_p).median()

    def loss(self, seed: int) -> tuple[Tensor, Row]:
        generator, network = torch.Generator().manual_seed(seed), self.training.network
        # A little beyond both ends, so that the ends, which are asked for most, are not the least trained.
        beta = (BETA_MAX * (1.1 * torch.rand(BATCH + REPLAY, generator=generator) - 0.05)).clamp(0, BETA_MAX)
        x = network.sample(beta[:BATCH], generator, EXPLORE)
        log_R, log_w = self.score(x)
        old = self.buffer.draw(beta[BATCH:], generator)
        self.buffer.add(x, log_R, log_w)
        reward = log_R.exp().mean()
        x, log_R, log_w = (torch.cat(pair) for pair in zip((x, log_R, log_w), old, strict=True))
        residual = self.log_Z(beta) + network.log_p(x, beta) - beta * log_R + log_w
        far = residual.detach().abs()
        row = {"residual": far[:BATCH].median(), "replayed": far[BATCH:].median(), "reward": reward}
        # A square near zero; linear far out, where one bad molecule at a large exponent is a thousand nats away.
        return F.huber_loss(residual, torch.zeros_like(residual), delta=10.0), row

    @torch.no_grad()
    def evaluate(self, n: int = 512) -> Row:
        """Of the averaged policy: rewards, sizes, and how far trajectory balance is off."""
        out, average = {}, self.training.average
        for value in (0.0, 32.0, 96.0):
            beta = torch.full((n,), value)
            x = average.sample(beta, torch.Generator().manual_seed(1))
            log_R, log_w = self.score(x)
            residual = average.log_p(x, beta) - beta * log_R + log_w
            R = log_R.exp()
            out[f"{value:g}"] = {
                "reward": R.mean(),
                "high": R.ge(THRESHOLD[self.name]).float().mean(),
                "fragments": (x[:, ::2] > 0).sum(-1).float().mean(),
                "residual": residual.std(),
                "log_Z_error": residual.mean() + self.log_Z(beta)[0],
                "distinct": len(self.env.trees(x).unique()) / n,
            }
        return {key: {name: float(value) for name, value in row.items()} for key, row in out.items()}

    def finish(self, folder: Path, n: int = 5000) -> None:
        """The averaged policy as a checkpoint, and its card."""
        policy = NetworkPolicy(self.training.average, self.env.n_actions)
        with replacing(folder) as new:
            GFlowNet(self.env, policy, condition={"beta": 32.0}, name=self.name).save_pretrained(new)
            (new / "README.md").write_text(card(self, new, n))


@torch.no_grad()
def card(recipe: Recipe, folder: Path, n: int) -> str:
    name, edges, average = recipe.name, torch.linspace(0, 1.2, 13), recipe.training.average
    rows, shares = [], []
    for value in (32.0, 96.0):
        beta = torch.full((n,), value)
        x = average.sample(beta, torch.Generator().manual_seed(2))
        log_R, log_w = recipe.score(x)
        balance = average.log_p(x, beta) - beta * log_R + log_w
        log_Z, R = float(recipe.log_Z(beta)[0]), log_R.exp()
        # Importance weights of the samples: an estimate of log Z that the policy's own mistakes do not bias.
        estimate = float(torch.logsumexp(-balance, 0)) - math.log(n)
        high, size = 100 * R.ge(THRESHOLD[name]).float().mean(), (x[:, ::2] > 0).sum() / n
        distinct = len(set(recipe.env.decode(x))) / n
        told = (f"{R.mean():.3f}", f"{high:.1f} %", f"{size:.1f}", f"{distinct:.3f}", f"{balance.std():.2f}")
        rows.append((f"β = {value:g}", *told, f"{log_Z - estimate:+.2f}"))
        shares.append(torch.histogram(R.clamp(max=1.19), edges).hist / n)
    histogram = [
        (f"{low:.1f} to {high:.1f}", f"{100 * a:.1f} %", f"{100 * b:.1f} %")
        for low, high, a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), *[s.tolist() for s in shares], strict=True)
    ]
    head = (f"{n:,} samples", "mean reward", f"at least {THRESHOLD[name]}", "fragments", "distinct SMILES", "balance spread")
    by = "by the published proxy" if name == "seh" else "by RDKit"
    size, steps = sum(p.numel() for p in average.parameters()), recipe.steps
    return recipes.card(
        folder,
        f"A GFlowNet policy that writes molecules, trees of at most 9 fragments out of {len(recipe.env.vocabulary)} "
        "(`sculpt.molecules.FragmentTrees`), in\n"
        f"proportion to reward^β for any β from 0 to 96, where the reward is `sculpt.molecules.{REWARDS[name].__name__}`.",
        f"""
model = sculpt.load("pretrained/molecules/{name}", beta=32)
smiles = model.sample(1000).decode()
""",
        {
            "data": f"none of ours: the reward is computed {by}; the vocabulary is the project's own",
            "network": f"causal transformer over fragments, {size:,} parameters; one state has one parent, so there is no backward policy",
            "recipe": f"`python pretrained/molecules/recipe.py {name} --steps {steps}`: trajectory balance, {BATCH} new and {REPLAY} replayed trees a step",
            "cost": f"{recipe.training.seconds / 60:.0f} CPU minutes on one thread",
        },
        title=name,
        measured=f"""{table((*head, "log Z error"), rows)}

Balance spread: standard deviation over samples of log p(x) − β log R(x) + log w(x), in nats; zero where the policy draws exactly in proportion.
A state has one path, so path ratios to one state do not differ. log Z error: the learned log Z(β) minus an importance-weighted estimate.

{table(("reward", "β = 32", "β = 96"), histogram)}""",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=REWARDS)
    parser.add_argument("--steps", type=int, default=15_000)
    parser.add_argument("--state", type=Path, default=Path("train_state/molecules"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = Recipe(options.name, options.steps, options.state / options.name)
    recipes.train(recipe)
    recipe.finish(HERE / options.name)
