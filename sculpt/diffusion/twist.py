r"""Factors on the way: what they say of the denoised image steers and weighs, and what they say of the sample has the last word.

At noise :math:`v = s^2` the sample is :math:`\hat x` give or take the variance c that the denoised image leaves open, so that log f of
:math:`\hat x` says too much where f is sharper than that. Of a Gaussian f, whose log has the curvature :math:`\kappa`, exactly

.. math:: \log E f \approx \beta \log f(\hat x), \qquad \beta = 1 / (1 + \kappa c)

is left; of what is observed, all of that covariance counts. :math:`\kappa c` is read off second differences of log f at this noise: for a
quadratic form they have the mean :math:`-c \operatorname{tr} K` and the variance :math:`2 c^2 \operatorname{tr} K^2`. Whatever :math:`\beta` is, the weights are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from sculpt.chain import Settings
from sculpt.diffusion.chains import DenoisingChain
from sculpt.diffusion.clock import like
from sculpt.diffusion.kernels import analytic_variance, check_finite, extrapolated, inner
from sculpt.factor import Factor, Observed
from sculpt.formula import Formula, Mixture, Nested, Tilted
from sculpt.model import randn
from sculpt.particles import systematic
from sculpt.state import State, in_parts

if TYPE_CHECKING:
    from sculpt.diffusion.denoiser import Denoiser

__all__ = ["Twist", "TwistedChain", "blind", "final", "room"]

LOOKED_AT = 32
"""Particles that tell how sharp a factor is."""
PUSH = 1.0
"""Standard deviations of a step's noise in two dimensions that a factor moves a particle by at most: it may be wrong yet."""
SOLVES, CLOSE = 20, 0.01
"""Steps of conjugate gradients at most, and the share of the miss that may be left."""
SMALL = 0.002
"""of the derivative of a denoised image, below which its error counts for more"""
FORBIDDEN = 2.0
"""Nats under the best particle that a forbidden denoised image counts on the way: it may yet turn out well."""


class Twist:
    """The factors of one run, and how far each is believed at the level that comes.

    Args:
        factors: these.
        formula: of the models' log-densities and the factors' log-likelihoods; of a factor it says which operand it looks at.
        m: how many models there are.
    """

    def __init__(self, factors: Sequence[Factor], formula: Formula, m: int):
        self.factors, self.m = tuple(factors), m
        self.operands = [_operand(formula, m + j) for j in range(len(factors))]
        # At the top nothing is known of a sample, and the factors say nothing.
        self.beta = [0.0] * len(factors)
        self.solves = [False] * len(factors)

    def __len__(self) -> int:
        return len(self.factors)

    def denoised(self, j: int, z: Float[Tensor, "N *x"], D: Float[Tensor, "N m *x"], ell: Float[Tensor, "N c"]) -> Tensor:
        """What factor j looks at: the denoised image of its operand."""
        formula, columns = self.operands[j]
        models = [k for k, column in enumerate(columns) if column < self.m]
        b = formula.gradient(ell[:, columns])[:, models] / formula.degree
        return z + einsum(b.to(z), D[:, [columns[k] for k in models]] - z[:, None], "N m, N m ... -> N ...")

    def __call__(
        self, denoise: Callable[[Tensor], Tensor], z: Float[Tensor, "N *x"], ell: Float[Tensor, "N c"], v: float, room: float
    ) -> tuple[Float[Tensor, "N m *x"], Float[Tensor, "N f"], Float[Tensor, "N f *x"]]:
        """What the models make of particles, what the factors say of that, and how it rises with z.

        Args:
            denoise: from particles to what the models make of them.
            z: particles.
            ell: their log-densities, and as many entries again as there are factors.
            v: the noise.
            room: how steep a factor may be, its power included.
        """
        steers = room > 0 and any(beta and factor.gradient for beta, factor in zip(self.beta, self.factors, strict=True))
        with torch.set_grad_enabled(steers):
            z = z.detach().requires_grad_(steers)
            D, ell = denoise(z), ell.clone()
            said, pulls = torch.zeros(len(z), len(self), dtype=torch.float64, device=z.device), []
            for j, (factor, beta) in enumerate(zip(self.factors, self.beta, strict=True)):
                pull = torch.zeros_like(z)
                if beta:
                    x = self.denoised(j, z, D, ell)
                    if isinstance(factor, Observed) and self.solves[j] and steers:
                        log_f, rises = _observed(factor, z, x, v)
                    else:
                        log_f, rises = factor.pull(x.detach().float())
                    said[:, j] = beta * _bearable(log_f.to(said))
                    if rises is not None and steers:
                        (pull,) = torch.autograd.grad(x, z, beta * rises.to(x), retain_graph=True)
                        norm = abs(factor.power) * pull.flatten(1).norm(dim=1)
                        pull = like((room / norm.clamp(min=room)), z) * pull
                ell[:, self.m + j] = said[:, j]
                pulls.append(pull)
        return D.detach(), said, torch.stack(pulls, dim=1)

    @torch.no_grad()
    def look(
        self,
        z: Float[Tensor, "N *x"],
        D: Float[Tensor, "N m *x"],
        ell: Float[Tensor, "N c"],
        open_: Float[Tensor, "m"],
        v: tuple[Tensor, Tensor],
        w: Float[Tensor, "N"],
        generator: torch.Generator | None,
    ) -> None:
        """Find how far the factors are to be believed at the next level.

        Args:
            z: everyone, at this level.
            D: what the models make of them.
            ell: the log-densities and log-likelihoods.
            open_: the variance that each model's denoised image leaves open.
            v: the noise of this level and of the next.
            w: everyone's weights.
            generator: draws whom to look at, and how.
        """
        rows = systematic(w.log(), LOOKED_AT, generator)
        z, D, ell = z[rows], D[rows], ell[rows]
        for j, factor in enumerate(self.factors):
            formula, columns = self.operands[j]
            models = [k for k, column in enumerate(columns) if column < self.m]
            b = (formula.gradient(ell[:, columns])[:, models] / formula.degree).mean(0)
            share = float((b.to(open_) @ open_[[columns[k] for k in models]] / v[0]).clamp(1e-6, 1 - 1e-6))
            spread = float(v[0]) * share / (1 - share)  # of the Gaussian that leaves as much open
            ahead = 1 / (1 / float(v[1]) + 1 / spread)
            # A network's derivative is worth something where it is not small.
            if isinstance(factor, Observed):
                self.solves[j] = share > SMALL
                self.beta[j] = float(self.solves[j])
            else:
                self.beta[j] = _believed(factor, self.denoised(j, z, D, ell), ahead, spread, generator)

    def look_along(
        self,
        z: Float[Tensor, "N *x"],
        D: Float[Tensor, "N *x"],
        added: Float[Tensor, "N *x"],
        v: tuple[Tensor, Tensor],
        w: Float[Tensor, "N"],
        generator: torch.Generator | None,
    ) -> None:
        """The same for particles of one model, to whose denoised images D the factors have added something."""
        columns = torch.stack([D, z + added], dim=1)
        c, _ = analytic_variance(z, columns, torch.ones(len(z), 2, dtype=z.dtype, device=z.device), w, v[0])
        ell = torch.zeros(len(z), 1 + len(self), dtype=torch.float64, device=z.device)
        self.look(z, columns[:, :1], ell, c[:1], v, w, generator)


def _believed(factor: Factor, x: Tensor, c: float, spread: float, generator: torch.Generator | None) -> float:
    r""":math:`\beta` of a factor, where the denoised images x leave the variance c open, and samples have this spread."""
    middle = factor(x.float(), len(x))
    differences = []
    for _ in range(2):
        xi = c**0.5 * randn(x.shape, generator, x)
        differences.append(factor((x + xi).float(), len(x)) + factor((x - xi).float(), len(x)) - 2 * middle)
    known = torch.stack(differences).isfinite().all(0)
    if not known.any():  # where nearly everything is forbidden there is no curvature; what is decided already counts
        return max(0.0, 1 - c / spread)
    first, second = (factor.power * difference[known] for difference in differences)
    bent, variance = float((first + second).mean()) / 2, float((first - second).square().mean()) / 2
    # Bent up it says no more than it seems to. Bent here and there, which averages out, it is as sharp as in one direction alone.
    one = (variance / 2) ** 0.5
    return 1.0 if bent >= 0.7 * one else 1 / (1 + variance / (2 * max(-bent, one)))


def _observed(
    factor: Observed, z: Float[Tensor, "N *x"], x: Float[Tensor, "N *x"], v: float
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N *x"]]:
    r"""What an observation says of denoised images x, whose errors have the covariance :math:`C = v \, \partial x / \partial z`, and how it rises with x:

    .. math:: \gamma \log f \approx -\tfrac12 r^\top u, \qquad (\tfrac{\sigma^2}{\gamma} + m C m) \, u = r = m (y - x)

    Exact for Gaussians. By conjugate gradients, each a way back through the network.
    """
    r, m, floor = factor.miss(x.detach()), factor.mask.to(x), factor.noise**2 / factor.power

    def covariance(u: Tensor) -> Tensor:
        (back,) = torch.autograd.grad(x, z, u, retain_graph=True)
        return floor * u + v * m * back

    u, rest, tiny = torch.zeros_like(r), r, torch.finfo(r.dtype).tiny
    way, size = rest, inner(rest, rest)
    goes = torch.ones_like(size, dtype=torch.bool)
    enough = CLOSE**2 * size
    for _ in range(SOLVES):
        along = covariance(way)
        bent = inner(way, along)
        # A learned derivative is no covariance everywhere. What has been solved so far stands.
        goes = goes & (size > enough) & (bent > floor / 2 * inner(way, way))
        if not goes.any():
            break
        step = like(torch.where(goes, size / bent, 0.0), u)
        u, rest = u + step * way, rest - step * along
        size, before = inner(rest, rest), size
        way = rest + like(size / before.clamp(min=tiny), u) * way
    return -inner(r, u) / (2 * factor.power), u / factor.power


def _bearable(log_f: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """log f with what is forbidden made improbable."""
    finite = log_f[log_f.isfinite()]
    worst = min(float(finite.max()) - FORBIDDEN, float(finite.min())) if len(finite) else 0.0
    return torch.where(log_f.isfinite(), log_f, worst)


def _operand(formula: Formula, column: int) -> tuple[Formula, list[int]]:
    """What the factor of this column multiplies: a formula, and the columns that it takes."""
    if isinstance(formula, Tilted):
        return Mixture([1.0]), [0]
    assert isinstance(formula, Nested)
    if isinstance(formula.outer, Tilted) and column in [index[0] for index in formula.indices[1:]]:
        return formula.parts[0], list(formula.indices[0])
    part, index = next(
        (part, index) for part, index in zip(formula.parts, formula.indices, strict=True) if column in index and part.m > 1
    )
    operand, columns = _operand(part, index.index(column))
    return operand, [index[k] for k in columns]


def blind(factors: Sequence[Factor]) -> list[str]:
    """What the diagnostics say of factors that do not steer."""
    names = [str(factor) for factor in factors if not factor.gradient]
    return [f"{', '.join(names)} selected and did not steer, for want of a gradient"] if names else []


# ------------------------------------------------------------------------------------------------------- one model, and factors


@dataclass
class Twisted(State):
    """Noisy samples, what the model makes of them here and one level before, what the factors add, and log f of it."""

    k: Tensor
    z: Float[Tensor, "N *x"]
    D: Float[Tensor, "N *x"]
    before: Float[Tensor, "N *x"] | None
    added: Float[Tensor, "N *x"]
    log_f: Float[Tensor, "N"]


class TwistedChain(DenoisingChain):
    r"""The chain of one model, steered and weighed by factors:

    .. math:: \log w \mathrel{+}= \lambda(z') - \lambda(z) + \log P(z' \mid z) - \log P_f(z' \mid z), \qquad \lambda = \sum_j \gamma_j \beta_j \log f_j(D(z))

    The last step is the model's own denoising, where :math:`\beta_j = 1`: exact for the chain as it is stepped.
    """

    threshold = 0.9
    few, fewest = 10_000, 256

    def __init__(
        self, model: Denoiser, factors: Sequence[Factor], powers: Sequence[float], settings: Settings, alone: bool = False
    ):
        super().__init__(model, settings)
        self.twist, self.alone = Twist(factors, Tilted(powers), 1), alone
        self.powers = torch.tensor(powers, dtype=torch.float64, device=self.device)
        self.road = f"{model.road}, weighed by {', '.join(map(str, factors))}"

    def start(self, n, generator):
        state, _ = super().start(n, generator)
        return state, state.log_f

    def step(self, state, log_w, generator):
        k = int(state.k[0])
        s, s_next = self.levels[k], self.levels[k + 1]
        w = torch.full_like(log_w, 1 / len(log_w)) if self.alone else torch.softmax(log_w, dim=0)
        self.twist.look_along(state.z.double(), state.D.double(), state.added.double(), (s**2, s_next**2), w, generator)
        kappa = 1 - (s_next / s) ** 2
        scale, xi = s_next * kappa.sqrt(), randn(state.z.shape, generator, state.z)
        # log P(z'|z) - log P_f(z'|z) of two Gaussians whose means are e standard deviations apart
        e = (kappa / scale).float() * state.added
        D = extrapolated(state.D, state.before, self.levels, k)
        new = self._at(state.z + kappa.float() * (D - state.z) + scale.float() * (xi + e), k + 1, state.D)
        e = e.double()
        return new, new.log_f - state.log_f - inner(e, e) / 2 - inner(e, xi.double())

    def end(self, state, log_w, generator):
        return state.D, final(self.twist, self.model, state.D) @ self.powers - state.log_f

    def notes(self, x, generator):
        return [*super().notes(x, generator), *blind(self.twist.factors)]

    def _at(self, z: Tensor, k: int, before: Tensor | None) -> Twisted:
        s, push = self.levels[k], room(self.levels, k, z)

        def parts(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            ell = torch.zeros(len(z), 1 + len(self.twist), dtype=torch.float64, device=z.device)
            D, said, pulls = self.twist(lambda z: self.model.denoise(z, s)[:, None], z, ell, float(s**2), push)
            return D[:, 0], like(s**2, z) * einsum(self.powers.to(z), pulls, "f, N f ... -> N ..."), said @ self.powers

        D, added, log_f = in_parts(parts, self.batch_size, z)
        check_finite(D, f"{self.model} gave", k, s)
        return Twisted(torch.full((len(z),), k, device=z.device), z, D, before, added, log_f)


def final(twist: Twist, model: Denoiser, x: Float[Tensor, "N *x"]) -> Float[Tensor, "N f"]:
    """What the factors say of finished samples of a model."""
    return torch.stack([factor(model.told(x), len(x)).to(x.device) for factor in twist.factors], dim=1)


def room(levels: Float[Tensor, "steps"], k: int, z: Float[Tensor, "N *x"]) -> float:
    """How steep a factor may be at this level, for a step that it moves by :data:`PUSH`; not at all after the last one."""
    if k + 1 == len(levels):
        return 0.0
    v, v_next = float(levels[k]) ** 2, float(levels[k + 1]) ** 2
    return PUSH * max(1.0, z[0].numel() / 2) ** 0.5 * (v_next / ((1 - v_next / v) * v**2)) ** 0.5
