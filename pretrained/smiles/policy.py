"""How a policy learns: the strings that it learns from, and trajectory balance."""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import pace
import scores
import torch
from moses import strings
from network import draw, likelihood, load, log_p, optimizer, sample, trimmed
from scores import Workers, log_mean_power, log_reward
from tokens import BEGIN, BETAS, LONGEST, PAD, decode, prompts
from torch import Tensor, nn
from torch.nn import functional as F

from sculpt.training import Row, Training, cosine


class Strings(nn.Module):
    """Strings and what is known of them."""

    def __init__(self, size: int, width: int = LONGEST):
        super().__init__()
        self.register_buffer("x", torch.zeros(size, width, dtype=torch.uint8))
        self.register_buffer("level", torch.zeros(size, dtype=torch.uint8))
        self.register_buffer("log_R", torch.zeros(size))
        self.register_buffer("log_prior", torch.zeros(size))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def __len__(self) -> int:
        return min(int(self.count), len(self.x))

    def add(self, x: Tensor, level: Tensor, log_R: Tensor, log_prior: Tensor) -> None:
        at = (int(self.count) + torch.arange(len(x), device=x.device)) % len(self.x)
        self.x[at], self.level[at], self.log_R[at], self.log_prior[at] = (
            x.to(torch.uint8),
            level.to(torch.uint8),
            log_R,
            log_prior,
        )
        self.count += len(x)

    def rows(self, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.x[at], self.log_R[at], self.log_prior[at]

    def best(self, level: Tensor, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """One for each exponent: the best of 1 (the smallest) to ``most`` (the largest)."""
        candidates = torch.randint(len(self), (len(level), most), generator=generator, device=level.device)
        rounds = most ** (level / (len(BETAS) - 1))
        score = self.log_R[candidates].masked_fill(torch.arange(most, device=level.device) >= rounds[:, None], -torch.inf)
        return self.rows(candidates.gather(1, score.argmax(1, keepdim=True))[:, 0])


class Policy:
    """How a policy is trained: in rounds of some steps, between which it draws new strings, whose rewards arrive a round later."""

    rate, warm_up, every = 1.5e-4, 50, 8
    delta, depth = 5.0, 10.0

    def __init__(self, name: str, options: argparse.Namespace, workers: Workers, past: Sequence[dict] = ()):
        self.pace = pace.Pace(options.minutes, options.steps)
        self.name, self.workers, self.device, self.batch = name, workers, torch.device(options.device), options.batch or 1024
        torch.set_float32_matmul_precision("high")  # bfloat16 would be too coarse for sums of log-probabilities
        self.new = self.batch // 2 * self.every
        self.prior = load(Path(__file__).parent / "prior", self.device).requires_grad_(False)
        self.prompts, self.betas = (torch.tensor(v, device=self.device) for v in (prompts(name), BETAS))
        self.begun = None
        data = self.molecules(options)
        net, values = self.saved(past[-1]) if past else self.beginning(data)
        net.requires_grad_(True)
        # Of the tokens only the prompts learn, and they learn fast: they are all alike at first.
        learns = torch.zeros_like(net.transformer.wte.weight[:, :1]).index_fill(0, self.prompts, 1.0)
        net.transformer.wte.weight.register_hook(lambda gradient: gradient * learns)
        self.log_Z = Levels(values).to(self.device)
        self.least = torch.tensor([log_mean_power(data.log_R, beta) for beta in BETAS], device=self.device) - self.depth
        self.data, self.own, self.fresh, self.pending = data, Strings(2**17), Strings(self.new), Strings(self.new)
        kept = {name: getattr(self, name).to(self.device) for name in ("own", "fresh", "pending", "log_Z")}
        fall = lambda step: cosine(self.pace.steps, self.warm_up, 0.02, hold=0.3)(step)  # noqa: E731
        identity = {"name": name, "batch": self.batch, "steps": options.steps, "molecules": len(data), "past": len(past)}
        self.training = Training(
            net,
            optimizer(net, self.rate, 0.0, 20 * self.rate, {"params": self.log_Z.parameters(), "lr": 0.02}),
            options.state / name,
            identity=identity,
            rate=fall,
            clip=5.0,
        )
        if self.training.resume(pace=self.pace, **kept) and len(self.pending):
            self.begun = self.workers.begin(self.pending.x)

    @torch.no_grad()
    def beginning(self, data: Strings) -> tuple[nn.Module, list[float]]:
        """The prior, which reads each exponent as its own beginning; and log Z(β) by what is known of MOSES."""
        net = copy.deepcopy(self.prior)
        net.transformer.wte.weight[self.prompts] = net.transformer.wte.weight[BEGIN].clone()
        return net, [log_mean_power(data.log_R, beta) for beta in BETAS]

    def saved(self, run: dict) -> tuple[nn.Module, list[float]]:
        """The policy as it is, and the log Z(β) that it has learned in its last training."""
        return load(Path(__file__).parent / self.name, self.device), [run["log_Z"][str(beta)] for beta in BETAS]

    @torch.no_grad()
    def molecules(self, options: argparse.Namespace) -> Strings:
        """Strings of MOSES with their rewards, as many as are computed; some are computed now if there are few."""
        x = strings("train")
        rows = scores.order(len(x))
        R = scores.known(self.name, options.state / "scores")[: options.rows]
        if len(R) < (least := min(options.rows, 8192)):
            R = Workers.end(self.workers.begin(x[rows[:least]]))
        x = x[rows[: len(R)]].to(self.device)
        data = Strings(len(x), x.shape[1]).to(self.device)
        data.add(x, torch.zeros(len(x), device=self.device), log_reward(R).to(self.device), self.log_prior(x))
        return data

    def log_prior(self, x: Tensor) -> Tensor:
        return likelihood(self.prior, BEGIN, x)

    def tilt(self, level: Tensor, log_R: Tensor) -> Tensor:
        """log R^β. It stays within 10 nats of its mean over MOSES: to be rarer than that no string has to unlearn more."""
        return torch.maximum(self.betas[level] * log_R, self.least[level])

    def draw(self, generator: torch.Generator) -> None:
        """Have new strings, and begin to compute their rewards."""
        level = torch.randint(len(BETAS), (self.new,), generator=generator, device=self.device)
        temperature = torch.ones(self.new, device=self.device)
        temperature[::8] = 1.2
        self.training.network.eval()
        x = sample(self.training.network, self.prompts[level], generator, temperature)
        self.training.network.train()
        unknown = torch.zeros(self.new, device=self.device)
        self.pending.add(x, level, unknown, unknown)
        self.begun = self.workers.begin(self.pending.x)

    def collect(self) -> None:
        """The strings of the last round and their rewards."""
        R = Workers.end(self.begun).to(self.device)
        found = self.pending.x, self.pending.level, log_reward(R), self.log_prior(self.pending.x)
        self.fresh.add(*found)
        self.own.add(*found)

    def loss(self, seed: int) -> tuple[Tensor, Row]:
        generator = torch.Generator(self.device).manual_seed(seed)
        turn = self.training.step % self.every
        if turn == 0:
            if self.begun is None:
                self.draw(generator)
            self.collect()
            self.draw(generator)
        own, quarter = slice(turn * self.batch // 2, (turn + 1) * self.batch // 2), self.batch // 4
        level = torch.randint(len(BETAS), (2 * quarter,), generator=generator, device=self.device)
        old = self.own.best(level[:quarter], 8, generator)
        real = self.data.best(level[quarter:], 64, generator)
        real = F.pad(real[0], (0, LONGEST - real[0].shape[1]), value=PAD), *real[1:]
        parts = zip(self.fresh.rows(torch.arange(len(self.fresh), device=self.device)[own]), old, real, strict=True)
        x, log_R, log_prior = (torch.cat(part) for part in parts)
        level = torch.cat([self.fresh.level[own].long(), level])
        log = log_p(self.training.network, self.prompts[level], trimmed(x))
        residual = self.log_Z(level) + log - log_prior - self.tilt(level, log_R)
        far = residual.detach().abs()
        row = {"residual": far[: self.batch // 2].median(), "replayed": far[self.batch // 2 :].median()}
        row |= {"reward": log_R[: self.batch // 2].exp().mean(), "top": log_R[: self.batch // 2].exp().max()}
        # A square near zero, linear far out.
        return F.huber_loss(residual, torch.zeros_like(residual), delta=self.delta), row

    @torch.no_grad()
    def evaluate(self) -> Row:
        """Of the averaged network: rewards by exponent, and how far the balance is off."""
        n = 500 if self.device.type == "cuda" else 100
        out, average, chosen = {}, self.training.average, [BETAS.index(beta) for beta in (0, 4, 16, 32, 64)]
        drawn = draw(average, [int(self.prompts[i]) for i in chosen], n, 1)
        R = Workers.end(self.workers.begin(torch.cat(drawn))).split(n)
        for i, x, r in zip(chosen, drawn, R, strict=True):
            x, level, valid = x.to(self.device), torch.full((n,), i, device=self.device), ~r.isnan()
            log = log_p(average, self.prompts[level], trimmed(x))
            residual = log - self.log_prior(x) - self.tilt(level, log_reward(r).to(self.device))
            told = {
                "reward": r[valid].sum() / valid.sum().clamp(min=1),
                "valid": valid.float().mean(),
                "spread": residual.std(),
            }
            told |= {"log_Z_error": residual.mean() + self.log_Z(level)[0], "distinct": len(set(decode(x))) / n}
            out |= {f"{name} {BETAS[i]}": float(value) for name, value in told.items()}
        return out


class Levels(nn.Module):
    """log Z(β); the prior's is 0."""

    def __init__(self, values: list[float]):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, level: Tensor) -> Tensor:
        return self.values[level] * (level > 0)
