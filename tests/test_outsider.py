"""A family from outside: an autoregressive chain over short words, written here and nowhere else, on every road against its exact answer."""

import functools
import itertools

import pytest
import torch
from torch import nn

import sculpt
from sculpt.apps.explorer.session import Session, Settings


class Words(sculpt.ActionModel):
    """Words of at most L letters from a table of probabilities given the last letter; the last action ends the word."""

    def __init__(self, name, seed, letters=3, L=3):
        self.name, self.key, self.device = name, f"words-{name}-{seed}", torch.device("cpu")
        self.shape, self.n_actions, self.L = (L,), letters + 1, L
        logits = torch.randn(letters + 1, letters + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.table = logits.log_softmax(-1)

    def start(self, n):
        return torch.zeros(n, self.L, dtype=torch.long)  # 0: nothing written yet

    def log_pf(self, states):
        length = (states > 0).sum(-1)
        last = states.gather(1, (length - 1).clamp(min=0)[:, None])[:, 0]
        log_p = self.table[last].clone()
        log_p[length == self.L, :-1] = -torch.inf
        return log_p.log_softmax(-1)

    def step(self, states, actions):
        length = (states > 0).sum(-1, keepdim=True)
        return states.scatter(1, length, actions[:, None] + 1)

    def backtrack(self, states, generator=None):
        at = (states > 0).sum(-1, keepdim=True) - 1
        return states.scatter(1, at, 0), states.gather(1, at)[:, 0] - 1

    def default_network(self):
        return OneHot(self.L, self.n_actions)


class OneHot(nn.Module):
    def __init__(self, L, letters, width=64):
        super().__init__()
        self.width, self.letters = width, letters
        self.layers = nn.Sequential(nn.Linear(L * letters, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, states):
        return self.layers(nn.functional.one_hot(states, self.letters).flatten(1).float())


P, Q = Words("p", 1), Words("q", 5)
WORDS = torch.tensor([w + (0,) * (3 - k) for k in range(4) for w in itertools.product((1, 2, 3), repeat=k)])
PLACE = {tuple(word): i for i, word in enumerate(WORDS.tolist())}
CLASSIFIER = functools.cache(lambda: sculpt.fit([P, Q], steps=600, samples=4000, progress=False))
COMPOSITIONS = {"harmonic mean": P & Q, "contrast": P - Q, "product": sculpt.product([P, Q], [1, 0.5])}
N = 20_000
ROADS = {
    "tracked": lambda: sculpt.Tracked(particles=N),
    "guided": CLASSIFIER,
    "corrected": lambda: sculpt.Guided(CLASSIFIER(), correct="densities", particles=N),
    "rejection": lambda: sculpt.Rejection(),
}


def over_floor(samples, composition):
    """Total variation from the enumerated target, over the mean one of as many exact draws."""
    ell = torch.stack([model.log_ratios([model], WORDS)[:, 0] for model in composition.models], -1)
    assert torch.allclose(ell.exp().sum(0), torch.ones(2, dtype=torch.float64))
    target, g = composition.formula.value(ell).softmax(0), torch.Generator().manual_seed(0)
    index = [torch.tensor([PLACE[tuple(x)] for x in samples.x.tolist()])]
    index += [torch.multinomial(target, len(samples), True, generator=g) for _ in range(20)]
    error, *floor = [float((torch.bincount(i, minlength=len(WORDS)) / len(i) - target).abs().sum()) for i in index]
    return error / (sum(floor) / len(floor))


@pytest.mark.parametrize(("name", "road"), [(c, r) for c in COMPOSITIONS for r in ROADS if c != "product" or r == "tracked"])
def test_every_road_samples_the_enumerated_target(name, road):
    target, road = COMPOSITIONS[name], ROADS[road]()
    runs = [target.sample(N, road, generator=torch.Generator().manual_seed(k), progress=False) for k in range(4)]
    assert sum(over_floor(run, target) for run in runs) / len(runs) < 1.3


def test_the_overlap_report_and_the_explorer_know_it_too():
    ell = torch.stack([model.log_ratios([model], WORDS)[:, 0] for model in (P, Q)], -1)
    report = sculpt.overlap([P, Q], n=4000, generator=torch.Generator().manual_seed(0))
    for composition in (P & Q, P - Q):
        z = float(composition.formula.value(ell).exp().sum())
        assert report.predict(composition).acceptance == pytest.approx(z, abs=0.03)
    run = Session([P, Q], CLASSIFIER()).start(Settings(labels=(0, 1), road="corrected", n=50))
    assert run.wait(60) and run.state == "done" and len(run.samples) == 50 and run.samples.diagnostics.formula == "p ⊗ q"
