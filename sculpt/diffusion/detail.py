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
from sculpt.diffusion.referee import MOST, Referee
from sculpt.diffusion.together import at_once, denoise_all
from sculpt.diffusion.tracked import FEW_DIMENSIONS, Tracked, TrackedChain
from sculpt.formula import Formula, Mixture, Nested, Posterior, PowerMean
from sculpt.model import randn
from sculpt.state import State, in_parts

if TYPE_CHECKING:
    from sculpt.diffusion.correctors import Corrector
    from sculpt.diffusion.denoiser import Denoiser

__all__ = ["DetailedChain", "detail_level", "painters"]

RATE = 3.0
"""Nats in an e-fold of noise by which the models' ratio may spread at the detail level: what some hundred particles can follow."""
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
    ):
        self.detail = detail
        super().__init__(formula, models, settings, corrector, alone)
        self.formula, self.referee = formula, Referee(models, detail, self.batch_size)
        if not alone:
            b = painters(formula, torch.zeros(1, len(models), dtype=torch.float64, device=self.device))[0]
            self.targets = [Believed(target, b / b.sum(), BELIEVED) for target in self.targets]

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
        return isinstance(state, Tracked) and int(state.k[0]) == self.last

    def step(self, state, log_w, generator):
        if isinstance(state, Painted):
            return self._painted(state, generator), None
        if self.settled(state):
            return self._painted(self._begun(state, generator), generator), None
        new, increment = super().step(state, log_w, generator)
        if self.settled(new):
            increment = increment + self._rule(new, log_w + increment, generator)
        return new, increment

    def end(self, state, log_w, generator):
        return (state if isinstance(state, Painted) else self._begun(state, generator)).D.float(), None

    def slip(self, state, population):
        # The referee and the anchor's own path know the target's weight: what the others' paths have added up is not in it.
        return super().slip(state, population) if is_heuristic(self.formula) else 0.0

    def notes(self, x, generator):
        a = painters(self.formula, torch.zeros(1, len(self.models)))[0]
        alone = f"{self.models[int(a.argmax())]} paints alone" if float(a.max()) == 1 else "a part of the mixture paints alone"
        whose = "weights of the models are those at s_d, a heuristic" if is_heuristic(self.formula) else alone
        calls = "" if not self.referee.calls else f"; the referee called each model {self.referee.calls:.0f} times a particle"
        return [
            *super().notes(x, generator),
            f"observers look through noise of s_d={self.detail:.3g}, below which {whose}{calls}",
        ]

    def _rule(self, state: Tracked, log_w: Tensor, generator: torch.Generator | None) -> Float[Tensor, "N"]:
        """The referee's log-ratios in the place of the path's, which prefer the model that made it."""
        if self.alone:
            return torch.zeros_like(log_w)

        followed = self.targets[self.last].value(state.ell)

        def refereed(ratios: Tensor) -> Tensor:
            b = painters(self.formula, ratios)
            b = b / b.sum(-1, keepdim=True)
            return ratios + ((state.ell - ratios) * b).sum(-1, keepdim=True)

        def doubt(ratios: Tensor) -> Tensor:
            ell = refereed(ratios)
            log_h = log_w + self.formula.value(ell) - followed
            slope = self.formula.gradient(ell) - painters(self.formula, ratios)
            return (log_h - log_h.max()).exp() * slope.norm(dim=-1)

        ell = refereed(self.referee(state.z, generator, doubt))
        state.ell = ell
        return self.formula.value(ell) - followed

    def _begun(self, state: Tracked, generator: torch.Generator | None) -> Painted:
        """At the detail level, where it is known already what the models make of z."""
        a = painters(self.formula, state.ell, generator)
        D = state.z + einsum(a, state.D - state.z[:, None], "N m, N m ... -> N ...")
        return Painted(state.k, state.z, a, D, D)

    def _painted(self, state: Painted, generator: torch.Generator | None) -> Painted:
        """One step of the second-order stochastic solver."""
        k, D = int(state.k[0]), state.D
        s, s_next = self.levels[k], self.levels[k + 1]
        D = extrapolated(D, state.before, self.levels, k) if k > self.last else D
        kappa = 1 - (s_next / s) ** 2
        z = state.z + kappa * (D - state.z) + s_next * kappa.sqrt() * randn(state.z.shape, generator, state.z)
        D = self._denoised(z, state.a, k + 1)
        check_finite(D, "the models below the detail level gave", k + 1, s_next)
        return Painted(state.k + 1, z, state.a, D, state.D)

    def _denoised(self, z: Tensor, a: Tensor, k: int) -> Float[Tensor, "N *x"]:
        """The denoised images of whoever paints: of each model only where it does."""
        D = z.clone()
        for i, model in enumerate(self.models):
            rows = a[:, i].nonzero()[:, 0]
            if len(rows):
                own = in_parts(lambda z, p=model: p.denoise(z, self.levels[k]), self.batch_size, z[rows])
                D[rows] += einsum(a[rows, i], own - z[rows], "N, N ... -> N ...")
        return D


def painters(
    formula: Formula, ell: Float[Tensor, "N m"], generator: torch.Generator | None | bool = False
) -> Float[Tensor, "N m"]:
    """Who paints below the detail level: a posterior's first label; one part of a mixture, by its shares; of others all, as their gradient says.

    Args:
        formula: at its end, nothing faded.
        ell: the log-densities at the detail level.
        generator: draws the parts of mixtures. Without one there are shares in their place.
    """
    if (first := _first(formula)) is not None:
        return torch.eye(formula.m, dtype=ell.dtype, device=ell.device)[first].expand_as(ell)
    if isinstance(formula, Mixture):
        shares = formula.gradient(ell)
        if generator is False:
            return shares
        device = ell.device if generator is None else generator.device
        drawn = torch.multinomial(shares.to(device), 1, generator=generator)[:, 0].to(ell.device)
        return torch.eye(formula.m, dtype=ell.dtype, device=ell.device)[drawn]
    if not isinstance(formula, Nested):
        return formula.gradient(ell)
    values = [
        part.value(ell[:, list(index)]) - z
        for part, index, z in zip(formula.parts, formula.indices, formula.log_z, strict=True)
    ]
    outer, a = painters(formula.outer, torch.stack(values, dim=-1), generator), torch.zeros_like(ell)
    for k, (part, index) in enumerate(zip(formula.parts, formula.indices, strict=True)):
        a[:, list(index)] += outer[:, k, None] * painters(part, ell[:, list(index)], generator)
    return a


def is_heuristic(formula: Formula) -> bool:
    """Whether several models paint one sample together, which no target is behind."""
    if isinstance(formula, Nested):
        first = _first(formula.outer)
        return is_heuristic(formula.outer) or any(map(is_heuristic, formula.parts if first is None else [formula.parts[first]]))
    return not (isinstance(formula, Mixture) or _first(formula) is not None or formula.m == 1)


def _first(formula: Formula) -> int | None:
    """The operand that paints, where that is always the same one."""
    if isinstance(formula, Posterior):
        return formula.labels[0]
    # Of two models the power mean of -1 is their posterior.
    return 0 if isinstance(formula, PowerMean) and formula.exponent == -1 and formula.m == 2 else None


# ------------------------------------------------------------------------------------------------------------ which level

_KNOWN: OrderedDict[tuple[str, ...], float] = OrderedDict()


def detail_level(models: Sequence[Denoiser]) -> float:
    r"""The detail level of these models where nobody says: zero in few dimensions, where all of a density counts.

    In many it is zero as well where the models hardly differ, and otherwise where their log-ratio begins to spread faster than particles can
    follow, by :data:`RATE` nats in an e-fold of noise; the data's spread bounds it. It is found from a few samples of the models alone, whatever is composed of them.
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
    at = next((k for k, rate in enumerate(rates) if rate > RATE), None)
    if at is None:
        return 0.0
    s = min(_where(rates, levels, at), SPREADS * spread, float(levels[1]))
    return float(f"{s:.2g}") if s > 2 * levels[-1] else 0.0


def _where(rates: list[float], levels: Tensor, k: int) -> float:
    """Where the rate passes its bound, between two levels."""
    if k == 0:
        return float(levels[k])
    low, high = (math.log(max(rate, 1e-12)) for rate in rates[k - 1 : k + 1])
    t = (math.log(RATE) - low) / (high - low)
    return float(torch.lerp(levels[k - 1].log(), levels[k].log(), t).exp())
