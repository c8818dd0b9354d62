r"""Compositions seen through noise: densities are tracked down to the detail level, and below it the anchor paints on its own.

The observers look at :math:`z = x + s_d \varepsilon`, labels are :math:`y_k \sim p(y \mid z)`:

.. math:: p(x, z \mid y) \propto p_{i_1}(x) \, N(z; x, s_d^2) \, \prod_{k \ge 2} p_v(y_k \mid z)

At :math:`s_d` the referee selects, and given z the rest is the anchor's own chain, unweighted. Products and other power means have no
anchor: they go on with the weights a that they have at :math:`s_d`, a heuristic.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from sculpt.chain import Settings
from sculpt.diffusion.clock import common_start, noise_levels, spread
from sculpt.diffusion.fade import Believed
from sculpt.diffusion.kernels import check_finite, extrapolated, inner
from sculpt.diffusion.painters import is_heuristic, painters
from sculpt.diffusion.referee import MOST, Referee
from sculpt.diffusion.together import at_once, denoise_all
from sculpt.diffusion.tracked import FEW_DIMENSIONS, Tracked, TrackedChain
from sculpt.diffusion.twist import Twist, final, room
from sculpt.formula import Formula, Tilted
from sculpt.model import randn
from sculpt.state import State, in_parts

if TYPE_CHECKING:
    from sculpt.diffusion.correctors import Corrector
    from sculpt.diffusion.denoiser import Denoiser
    from sculpt.factor import Factor

__all__ = ["DetailedChain", "detail_level"]

RATE = 3.0
"""Nats in an e-fold of noise by which the ratio of models that were trained apart may spread at the detail level: what some hundred particles can follow."""
LITTLE = 0.3
"""The same where the models agree on what is left: nothing is decided below."""
SPREADS = 4.0
"""The detail level at most, in standard deviations of the data: beyond it the observers see nothing."""
BELIEVED = 0.3
"""Of the log-ratios that paths tell on the way, this share steers: they are noisy in many dimensions, and the referee has the last word."""
SHARE = 2 / 3
"""of the steps above the detail level"""
PILOT, STEPS = 8, 32
"""Samples of each model, and their steps, that tell how fast the ratio spreads."""


@dataclass
class Painted(State):
    """Noisy samples below the detail level, who paints them, and what is made of them here and was one level before."""

    k: Int[Tensor, "N"]
    z: Float[Tensor, "N *x"]
    a: Float[Tensor, "N m"]
    D: Float[Tensor, "N *x"]
    before: Float[Tensor, "N *x"]
    added: Float[Tensor, "N *x"] | None = None
    """by factors"""
    log_f: Float[Tensor, "N"] | None = None
    """what they say of the denoised image"""


class DetailedChain(TrackedChain):
    """Tracked densities above the detail level, a selection there, and below it the chain of whoever paints."""

    threshold = 0.5

    def __init__(
        self,
        formula: Formula,
        models: Sequence[Denoiser],
        settings: Settings,
        corrector: Corrector | None,
        detail: float,
        alone: bool = False,
        factors: Sequence[Factor] = (),
    ):
        self.detail = detail
        super().__init__(formula, models, settings, corrector, alone, factors)
        self.formula, self.referee = formula, Referee(models, detail, self.batch_size)
        self.painted = Twist(factors, Tilted([1.0] * len(factors)), 1)  # below the detail level
        if not alone:
            b = self._painters(torch.zeros(1, formula.m, dtype=torch.float64, device=self.device))[0]
            self.targets = [Believed(target, b, BELIEVED) for target in self.targets]

    def turn(self):
        """Two thirds of the steps go down to the detail level, densest where the models begin to differ most, just above it."""
        k, ends = max(1, min(self.length - 2, round(SHARE * self.length))), (float(self.levels[0]), float(self.levels[-1]))
        if not ends[1] < self.detail < ends[0]:
            raise ValueError(
                f"detail={self.detail:g} is a noise level that all models cover, between {ends[1]:.3g} and {ends[0]:.3g}."
            )
        share = [torch.linspace(0, 1, n, dtype=torch.float64, device=self.device) for n in (k + 1, self.length - k)]
        above, below = spread(share[0], self.detail, ends[0], 2 * self.detail), spread(share[1], ends[1], self.detail)
        self.levels = torch.cat([above, below[1:]])
        return k

    @property
    def evaluations(self):
        return self.last * len(self.models) + (0 if self.alone else MOST * len(self.models))

    @property
    def besides(self):
        return "" if self.alone else f", up to {MOST} of each for a particle by the referee among them"

    def settled(self, state):
        return self._seen(state) and not len(self.twist)

    def _seen(self, state: State) -> bool:
        """Whether the observers have seen all that they are to see."""
        return isinstance(state, Tracked) and int(state.k[0]) == self.last

    def step(self, state, log_w, generator):
        if isinstance(state, Painted):
            return self._painted(state, log_w, generator)
        if self._seen(state):
            return self._painted(self._begun(state, generator), log_w, generator)
        new, increment = super().step(state, log_w, generator)
        if self._seen(new):
            increment = increment + self._rule(new, log_w + increment, generator)
        return new, increment

    def end(self, state, log_w, generator):
        state = state if isinstance(state, Painted) else self._begun(state, generator)
        x = state.D.float()
        if state.log_f is None:
            return x, None
        return x, (final(self.twist, self.models[0], x) * state.a[:, self.m :]).sum(1) - state.log_f

    def slip(self, state, population):
        # The referee and the anchor's own path know the target's weight: what the others' paths have added up is not in it.
        return super().slip(state, population) if is_heuristic(self.formula) else 0.0

    def notes(self, x, generator):
        a = self._painters(torch.zeros(1, self.formula.m))[0, : self.m]
        alone = f"{self.models[int(a.argmax())]} paints alone" if float(a.max()) == 1 else "a part of the mixture paints alone"
        whose = "weights of the models are those at s_d, a heuristic" if is_heuristic(self.formula) else alone
        calls = "" if not self.referee.calls else f"; the referee called each model {self.referee.calls:.0f} times a particle"
        return [
            *super().notes(x, generator),
            f"observers look through noise of s_d={self.detail:.3g}, below which {whose}{calls}",
        ]

    def _painters(self, ell: Float[Tensor, "N m"]) -> Float[Tensor, "N m"]:
        """The shares of the models in what is painted, and nothing of factors."""
        b = painters(self.formula, ell).clone()
        b[:, self.m :] = 0
        return b / b.sum(-1, keepdim=True)

    def _rule(self, state: Tracked, log_w: Tensor, generator: torch.Generator | None) -> Float[Tensor, "N"]:
        """The referee's log-ratios in the place of the path's, which prefer the model that made it."""
        if self.alone:
            return torch.zeros_like(log_w)

        followed = self.targets[self.last].value(state.ell)

        def refereed(ratios: Tensor) -> Tensor:
            ell = torch.cat([ratios, state.ell[:, self.m :]], dim=1)
            ell[:, : self.m] += ((state.ell - ell) * self._painters(ell)).sum(-1, keepdim=True)
            return ell

        def doubt(ratios: Tensor) -> Tensor:
            ell = refereed(ratios)
            log_h = log_w + self.formula.value(ell) - followed
            slope = (self.formula.gradient(ell) - painters(self.formula, ell))[:, : self.m]
            return (log_h - log_h.max()).exp() * slope.norm(dim=-1)

        ell = refereed(self.referee(state.z, generator, doubt))
        state.ell = ell
        return self.formula.value(ell) - followed

    def _begun(self, state: Tracked, generator: torch.Generator | None) -> Painted:
        """At the detail level, where it is known already what the models make of z."""
        m, z = self.m, state.z
        a = painters(self.formula, state.ell, generator)
        parts = a.reshape(*a.shape, *[1] * (z.ndim - 1)) * (state.D - z[:, None])
        D = z + parts[:, :m].sum(1)
        if not len(self.twist):
            return Painted(state.k, z, a, D, D)
        self.painted.beta = self.twist.beta
        return Painted(state.k, z, a, D, D, parts[:, m:].sum(1), (a * state.ell)[:, m:].sum(1))

    def _painted(self, state: Painted, log_w: Tensor, generator: torch.Generator | None) -> tuple[Painted, Tensor | None]:
        """One step of the second-order stochastic solver, and the weights where factors have a say."""
        k, D = int(state.k[0]), state.D
        s, s_next = self.levels[k], self.levels[k + 1]
        D = extrapolated(D, state.before, self.levels, k) if k > self.last else D
        kappa = 1 - (s_next / s) ** 2
        scale, xi = s_next * kappa.sqrt(), randn(state.z.shape, generator, state.z)
        if state.added is None:
            new = self._repainted(state, state.z + kappa * (D - state.z) + scale * xi, k + 1)
            return new, None
        w = torch.full_like(log_w, 1 / len(log_w)) if self.alone else torch.softmax(log_w, dim=0)
        self.painted.look_along(state.z, state.D, state.added, (s**2, s_next**2), w, generator)
        e = kappa / scale * state.added
        new = self._repainted(state, state.z + kappa * (D - state.z) + scale * (xi + e), k + 1)
        return new, new.log_f - state.log_f - inner(e, e) / 2 - inner(e, xi)

    def _repainted(self, state: Painted, z: Tensor, k: int) -> Painted:
        """The state at a level: this is where the networks are called."""
        if state.added is None:
            D, added, log_f = self._denoised(z, state.a, k), None, None
        else:
            ell, push, powers = torch.zeros(len(z), 1 + len(self.twist)).to(z), room(self.levels, k, z), state.a[:, self.m :]
            own, said, pulls = self.painted(
                lambda z: self._denoised(z, state.a, k)[:, None], z, ell, float(self.levels[k] ** 2), push
            )
            D, log_f = own[:, 0], (powers * said).sum(1)
            added = self.levels[k] ** 2 * einsum(powers, pulls, "N f, N f ... -> N ...")
        check_finite(D, "the models below the detail level gave", k, self.levels[k])
        return Painted(torch.full_like(state.k, k), z, state.a, D, state.D, added, log_f)

    def _denoised(self, z: Tensor, a: Tensor, k: int) -> Float[Tensor, "N *x"]:
        """The denoised images of whoever paints: of each model only where it does."""
        D = z.clone()
        for i, model in enumerate(self.models):
            rows = a[:, i].nonzero()[:, 0]
            if len(rows):
                own = in_parts(lambda z, p=model: p.denoise(z, self.levels[k]), self.batch_size, z[rows])
                D = D.index_add(0, rows, einsum(a[rows, i], own - z[rows], "N, N ... -> N ...").to(D))
        return D


# ------------------------------------------------------------------------------------------------------------ which level

_KNOWN: OrderedDict[tuple[str, ...], float] = OrderedDict()


def detail_level(models: Sequence[Denoiser]) -> float:
    r"""The detail level of these models where nobody says: zero in few dimensions, where all of a density counts.

    In many it is zero as well where the models hardly differ, and otherwise at the end of the noise levels where they do. Prompts of one
    network agree again when it is decided what is to be seen, and below there nothing is left to observe. Networks that were trained apart
    differ more and more, by details: their level is where the log-ratio begins to spread faster than particles can follow, by :data:`RATE`
    nats in an e-fold of noise; the data's spread bounds it. It is found from a few samples of the models alone, whatever is composed of them.
    """
    if math.prod(models[0].shape) <= FEW_DIMENSIONS or len(models) < 2:
        return 0.0
    keys = tuple(sorted(model.key for model in models))
    if keys not in _KNOWN:
        _KNOWN[keys] = _found(sorted(models, key=lambda model: model.key))
        while len(_KNOWN) > 64:
            _KNOWN.popitem(last=False)
    return _KNOWN[keys]


@torch.no_grad()
def _found(models: Sequence[Denoiser]) -> float:
    """By the chains of all models from the top, each with a few samples; what they differ by is seen at every level."""
    device, generator = models[0].device, torch.Generator().manual_seed(0)
    levels = noise_levels(models, STEPS, device)
    own = torch.arange(len(models), device=device).repeat_interleave(PILOT)
    start = common_start(models)
    z = levels[0] * randn((len(own), *models[0].shape), generator, levels)
    z = z if start is None else start.to(device) + z
    batch, rows = at_once(models[0].shape), torch.arange(len(own), device=device)
    rates: list[float] = []
    before = None
    for k, s in enumerate(levels):
        D = denoise_all(models, z, s, batch)
        check_finite(D, "the models gave", k, s)
        pairs = [inner(D[:, i] - D[:, j], D[:, i] - D[:, j]) / s**2 for i, j in itertools.combinations(range(len(models)), 2)]
        rates.append(float(torch.stack(pairs).mean(1).max()))
        mine = D[rows, own]
        if k + 1 < len(levels):
            step = extrapolated(mine, before, levels, k)
            kappa = 1 - (levels[k + 1] / s) ** 2
            z = z + kappa * (step - z) + levels[k + 1] * kappa.sqrt() * randn(z.shape, generator, z)
            before = mine
    spread = float((mine - mine.mean(0)).square().mean().sqrt())
    begin = next((k for k, rate in enumerate(rates) if rate > RATE), None)
    if begin is None:
        return 0.0
    end = next((k for k in range(begin, len(rates)) if rates[k] < LITTLE), None)
    s = _where(rates, levels, begin, RATE) if end is None else _where(rates, levels, end, LITTLE)
    s = min(s, SPREADS * spread, float(levels[1]))
    return float(f"{s:.2g}") if s > 2 * levels[-1] else 0.0


def _where(rates: list[float], levels: Tensor, k: int, bound: float) -> float:
    """Where the rate passes a bound, between two levels."""
    if k == 0:
        return float(levels[k])
    before, here = (math.log(max(rate, 1e-12)) for rate in rates[k - 1 : k + 1])
    t = (math.log(bound) - before) / (here - before)
    return float(torch.lerp(levels[k - 1].log(), levels[k].log(), t).exp())
