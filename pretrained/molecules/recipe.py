r"""The molecule policies, trained here: ``python pretrained/molecules/recipe.py {seh,sa,qed} [--steps n] [--state folder]``.

Trajectory balance for all exponents at once: :math:`\beta \sim U[0, 96]` per tree,

.. math:: \bigl(\log Z(\beta) + \log p(x; \beta) - \beta \log R(x) + \log w(x)\bigr)^2

with p the probability that the policy writes the tree x and w the number of its writings (``sculpt.molecules.fragments``). A quarter of each
batch comes from the policy with some random choices, the rest from a replay buffer: rewards cost more than gradients, and a tree
in the buffer is worth learning from under any exponent, the better ones more so the larger it is. A killed run goes on where it stopped, bit for bit.
"""

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from sculpt.files import replace_file
from sculpt.gflownet.model import GFlowNet
from sculpt.gflownet.network import NetworkPolicy
from sculpt.molecules.fragments import FragmentTrees
from sculpt.molecules.network import BETA_MAX, FragmentNetwork
from sculpt.molecules.rewards import QED, SA, SEH

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


class Buffer:
    """The last trees with their rewards."""

    def __init__(self, size: int = 2**16):
        self.x = torch.zeros(size, 18, dtype=torch.int16)
        self.log_R, self.log_w, self.count = torch.zeros(size), torch.zeros(size), torch.zeros((), dtype=torch.long)

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


class Training:
    def __init__(self, name: str, steps: int, folder: Path, seed: int = 0):
        torch.manual_seed(seed)
        self.name, self.steps, self.folder, self.seed = name, steps, folder, seed
        self.env, self.reward = FragmentTrees(), REWARDS[name]()
        self.network, self.log_Z = FragmentNetwork(self.env.vocabulary), LogZ()
        self.average = FragmentNetwork(self.env.vocabulary).requires_grad_(False).eval()
        self.average.load_state_dict(self.network.state_dict())
        self.optimizer = torch.optim.Adam(
            [{"params": self.network.parameters(), "lr": RATE}, {"params": self.log_Z.parameters(), "lr": 0.1}],
            betas=(0.9, 0.99),
        )
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.buffer, self.step, self.seconds = Buffer(), 0, 0.0
        if (folder / "state.safetensors").exists():
            self.load()
        else:
            self.explore()

    def score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        R = self.reward(self.env.molecules(x)).nan_to_num(0.0)
        return R.clamp(min=1e-5).log(), self.env.writings(x).log().float()

    @torch.no_grad()
    def explore(self) -> None:
        """Fill the buffer from the untrained policy, and start log Z where that policy would have it."""
        x = self.network.sample(torch.zeros(FIRST), torch.Generator().manual_seed(self.seed))
        log_R, log_w = self.score(x)
        self.buffer.add(x, log_R, log_w)
        log_p = self.network.log_p(x, torch.zeros(FIRST))
        for i in range(KNOTS):
            self.log_Z.values[i] = (BETA_MAX * i / (KNOTS - 1) * log_R - log_w - log_p).median()

    def rate(self) -> float:
        """Warm up, stay, and cool down over the last 40 %, where trajectory balance settles."""
        t = self.step / self.steps
        return min(1.0, (self.step + 1) / 200) * (
            1.0 if t < 0.6 else 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (t - 0.6) / 0.4))
        )

    def train_step(self) -> dict[str, float]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * (self.step + 1))
        # A little beyond both ends, so that the ends, which are asked for most, are not the least trained.
        beta = (BETA_MAX * (1.1 * torch.rand(BATCH + REPLAY, generator=generator) - 0.05)).clamp(0, BETA_MAX)
        x = self.network.sample(beta[:BATCH], generator, EXPLORE)
        log_R, log_w = self.score(x)
        old = self.buffer.draw(beta[BATCH:], generator)
        self.buffer.add(x, log_R, log_w)
        mean_R = float(log_R.exp().mean())
        x, log_R, log_w = (torch.cat(pair) for pair in zip((x, log_R, log_w), old, strict=True))
        residual = self.log_Z(beta) + self.network.log_p(x, beta) - beta * log_R + log_w
        # A square near zero; linear far out, where one bad molecule at a large exponent is a thousand nats away.
        loss = F.huber_loss(residual, torch.zeros_like(residual), delta=10.0)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.rate()
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), 20.0)
        self.optimizer.step()
        decay = min(0.999, 1 - 1 / (self.step + 2))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)
        self.step += 1
        halves = residual.detach().abs()
        return {"loss": loss.item(), "residual": halves[:BATCH].median().item(), "replayed": halves[BATCH:].median().item()} | {
            "reward": mean_R,
            "norm": float(norm),
        }

    @torch.no_grad()
    def evaluate(self, n: int = 512) -> dict[str, dict[str, float]]:
        """Of the averaged policy: rewards, sizes, and how far trajectory balance is off."""
        out = {}
        for value in (0.0, 32.0, 96.0):
            beta = torch.full((n,), value)
            x = self.average.sample(beta, torch.Generator().manual_seed(1))
            log_R, log_w = self.score(x)
            residual = self.average.log_p(x, beta) - beta * log_R + log_w
            R = log_R.exp()
            out[f"{value:g}"] = {
                "reward": R.mean(),
                "high": R.ge(THRESHOLD[self.name]).float().mean(),
                "fragments": (x[:, ::2] > 0).sum(-1).float().mean(),
                "residual": residual.std(),
                "log_Z_error": residual.mean() + self.log_Z(beta)[0],
                "distinct": len(self.env.trees(x).unique()) / n,
            }
        return {key: {name: round(float(v), 3) for name, v in row.items()} for key, row in out.items()}

    # Files

    def tensors(self) -> dict[str, Tensor]:
        parts = {"network": self.network.state_dict(), "average": self.average.state_dict(), "log_Z": self.log_Z.state_dict()}
        parts["buffer"] = vars(self.buffer)
        for i, state in self.optimizer.state_dict()["state"].items():
            parts[f"optimizer.{i}"] = state
        return {f"{part}/{key}": value for part, values in parts.items() for key, value in values.items()}

    def save(self) -> None:
        """One file, replaced in one go: a kill leaves the old one or the new one."""
        note = json.dumps({"name": self.name, "step": self.step, "steps": self.steps, "seconds": self.seconds})
        replace_file(self.folder / "state.safetensors", save(self.tensors(), metadata={"training": note}))

    def load(self) -> None:
        parts: dict[str, dict[str, Tensor]] = {}
        with safe_open(self.folder / "state.safetensors", "pt") as file:
            note = json.loads(file.metadata()["training"])
            for key in file.keys():  # noqa: SIM118
                part, _, name = key.partition("/")
                parts.setdefault(part, {})[name] = file.get_tensor(key)
        self.step, self.seconds = note["step"], note["seconds"]
        self.network.load_state_dict(parts["network"])
        self.average.load_state_dict(parts["average"])
        self.log_Z.load_state_dict(parts["log_Z"])
        for name, value in parts["buffer"].items():
            setattr(self.buffer, name, value)
        state = {int(key.partition(".")[2]): value for key, value in parts.items() if key.startswith("optimizer.")}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})

    def log(self, **row) -> None:
        line = json.dumps({"step": self.step, "seconds": round(self.seconds), **row})
        print(self.name, line, flush=True)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    def run(self, report: int = 100, check: int = 1000) -> None:
        rows: list[dict[str, float]] = []
        while self.step < self.steps:
            started = time.process_time()
            rows.append(self.train_step())
            self.seconds += time.process_time() - started
            if self.step % report == 0:
                self.log(**{key: round(sum(row[key] for row in rows) / len(rows), 3) for key in rows[0]})
                rows = []
            if self.step % check == 0 or self.step == self.steps:
                self.save()
                self.log(evaluation=self.evaluate())

    def finish(self, folder: Path, n: int = 5000) -> None:
        """The averaged policy as a checkpoint, and its card."""
        policy = NetworkPolicy(self.average, self.env.n_actions)
        GFlowNet(self.env, policy, condition={"beta": 32.0}, name=self.name).save_pretrained(folder)
        (folder / "README.md").write_text(card(self, folder, n))


@torch.no_grad()
def card(training: Training, folder: Path, n: int) -> str:
    name, edges = training.name, torch.linspace(0, 1.2, 13)
    rows, shares = [], []
    for value in (32.0, 96.0):
        beta = torch.full((n,), value)
        x = training.average.sample(beta, torch.Generator().manual_seed(2))
        log_R, log_w = training.score(x)
        balance = training.average.log_p(x, beta) - beta * log_R + log_w
        log_Z, R = float(training.log_Z(beta)[0]), log_R.exp()
        # Importance weights of the samples: an estimate of log Z that the policy's own mistakes do not bias.
        estimate = float(torch.logsumexp(-balance, 0)) - math.log(n)
        smiles = training.env.decode(x)
        rows.append(
            f"| β = {value:g} | {R.mean():.3f} | {100 * R.ge(THRESHOLD[name]).float().mean():.1f} % | "
            f"{sum(s > 0 for s in x[:, ::2].flatten()) / n:.1f} | {len(set(smiles)) / n:.3f} | {balance.std():.2f} | {log_Z - estimate:+.2f} |"
        )
        shares.append(torch.histogram(R.clamp(max=1.19), edges).hist / n)
    histogram = "\n".join(
        f"| {low:.1f} to {high:.1f} | {100 * a:.1f} % | {100 * b:.1f} % |"
        for low, high, a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), *[s.tolist() for s in shares], strict=True)
    )
    sha = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    size = sum(p.numel() for p in training.average.parameters())
    return f"""# {name}

A GFlowNet policy that writes molecules, trees of at most 9 fragments out of {len(training.env.vocabulary)} (`sculpt.molecules.FragmentTrees`), in
proportion to reward^β for any β from 0 to 96, where the reward is `sculpt.molecules.{REWARDS[name].__name__}`.

```python
model = sculpt.load("pretrained/molecules/{name}", beta=32)
smiles = model.sample(1000).decode()
```

| {n:,} samples | mean reward | at least {THRESHOLD[name]} | fragments | distinct SMILES | balance spread | log Z error |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Balance spread: standard deviation over samples of log p(x) − β log R(x) + log w(x), in nats; zero where the policy draws exactly in proportion.
A state has one path, so path ratios to one state do not differ. log Z error: the learned log Z(β) minus an importance-weighted estimate.

| reward | β = 32 | β = 96 |
|---|---|---|
{histogram}

| | |
|---|---|
| data | none of ours: the reward is computed{" by the published proxy" if name == "seh" else " by RDKit"}; the vocabulary is the project's own |
| network | causal transformer over fragments, {size:,} parameters; one state has one parent, so there is no backward policy |
| recipe | `python pretrained/molecules/recipe.py {name} --steps {training.steps}`: trajectory balance, {BATCH} new and {REPLAY} replayed trees a step |
| cost | {training.seconds / 60:.0f} CPU minutes on one thread |
| `model.safetensors` | sha256 {sha} |
| licence | the project's |
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=REWARDS)
    parser.add_argument("--steps", type=int, default=15_000)
    parser.add_argument("--state", type=Path, default=Path("train_state/molecules"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.state / options.name
    folder.mkdir(parents=True, exist_ok=True)
    training = Training(options.name, options.steps, folder)
    training.run()
    training.finish(HERE / options.name)
