r"""The chain of a formula of several models, whose densities every particle carries along.

Notation: noise levels :math:`s_0 > s_1 > \dots`, :math:`v = s^2`, a step goes from :math:`v` to :math:`v' = v - \delta`;
:math:`S_i = (D_i - z) / v` is the score of base model i, :math:`\xi` standard noise, :math:`\ell_i = \log u_i` the tracked
log-density. ``N`` particles, ``m`` base models, ``*x`` one sample. Weights, clock and tracked densities are float64.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import einsum, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sculpt.chain import Selection, Settings, run
from sculpt.diffusion.chains import NoisyChain
from sculpt.diffusion.clock import noise_levels
from sculpt.diffusion.control import Control
from sculpt.diffusion.fade import fade
from sculpt.diffusion.kernels import Walk, analytic_variance, check_finite, inner, kernel_variance, surprise
from sculpt.diffusion.together import denoise_all
from sculpt.diffusion.twist import Twist, blind, final, room
from sculpt.formula import Formula, Product, divides
from sculpt.model import randn
from sculpt.progress import watch
from sculpt.state import State, in_parts

if TYPE_CHECKING:
    from sculpt.diffusion.correctors import Corrector
    from sculpt.diffusion.denoiser import Denoiser
    from sculpt.factor import Factor
    from sculpt.samples import Samples

__all__ = ["Tracked", "TrackedChain"]

STEPS, FEWER, MORE = 128, 32, 50
"""By default: in few dimensions, in many, and for particles that go alone."""
FEW_DIMENSIONS = 64
LONG = 180.0
"""Seconds, from which on the cost of a run is said before it is paid."""


@dataclass
class Tracked(State):
    """Noisy samples, their log-density under each base model, and what each makes of them."""

    k: Int[Tensor, "N"]
    z: Float[Tensor, "N *x"]
    ell: Float[Tensor, "N m"]
    D: Float[Tensor, "N m *x"]
    slip: Float[Tensor, "N"]
    """what the finite number of steps has put into the log-weight so far, as far as one run can tell"""


class TrackedChain(NoisyChain):
    r"""A formula of the densities of several models, which every particle carries along:

    .. math::
        \ell_i' &= \ell_i + \log P_i(z' \mid z) - \log N(z; z', \delta) \\
        \log w' &= \log w + \Phi'(\ell') - \Phi(\ell) + \log P_B(z \mid z') - \log P(z' \mid z)

    Base model i steps with the mean :math:`z + \delta S_i` and the Analytic-DPM variance :math:`\tau_i`, see
    :func:`~sculpt.diffusion.kernels.analytic_variance`; P and P_B, with the score :math:`S = \sum_i a_i S_i, \; a = \partial \Phi(\ell)`, are
    those of :class:`~sculpt.diffusion.kernels.Walk`. Contrasts are faded in, :math:`\Phi'` is the formula at the next level: see
    :mod:`sculpt.diffusion.fade`.
    """

    road, threshold = "tracked densities", 0.9
    few, fewest = 10_000, 256

    def __init__(
        self,
        formula: Formula,
        models: Sequence[Denoiser],
        settings: Settings,
        corrector: Corrector | None = None,
        alone: bool = False,
        factors: Sequence[Factor] = (),
    ):
        d = math.prod(models[0].shape)
        default = STEPS if d <= FEW_DIMENSIONS else MORE if alone else FEWER
        super().__init__(models, settings, default if settings.steps is None else settings.steps)
        self.degree, self.d, self.corrector, self.alone, self.warned = formula.degree, d, corrector, alone, False
        self.generator, self.m = settings.generator, len(models)
        self.twist = Twist(factors, formula, self.m)
        if corrector is not None:
            corrector.reset()
        check_powers(self.degree, self.levels)
        self.last, self.halved = self.turn(), None
        biased = divides(formula) or self.degree != 1
        half = self.length // 2
        if d <= FEW_DIMENSIONS and biased and not alone and half >= 2 and followed(self.degree, noise_levels(models, half)):
            settings = dataclasses.replace(settings, steps=half)
            self.halved = functools.partial(type(self), formula, models, settings, copy.deepcopy(corrector), factors=factors)
        # In few dimensions a drift takes variance out of the weights.
        self.controls, self.control = d <= FEW_DIMENSIONS and not alone, None
        # The target of each level: what the formula pushes away from is faded in. Powers that are the same everywhere the control can follow.
        # Nor for particles that go alone: nobody selects among them, and they would fall behind.
        faded = not (alone or (self.controls and isinstance(formula, Product)))
        self.targets = [fade(formula, (k / self.last) ** 2) if faded else formula for k in range(self.last + 1)]

    def turn(self) -> int:
        """The last level at which densities are tracked."""
        return self.length - 1

    def start(self, n, generator):
        v0 = self.levels[0] ** 2
        # The base models start from N(0, v0), the product of densities of degree d from N(0, v0 / d).
        xi = self.first_noise(n, generator, self.levels)
        z = (v0 / self.degree).sqrt() * xi
        normal = 0.5 * self.d * torch.log(2 * math.pi * v0)
        ell = (-inner(z, z) / (2 * v0) - normal)[:, None].expand(n, self.m)
        ell = torch.cat([ell, ell.new_zeros(n, len(self.twist))], dim=1)  # factors say nothing yet
        log_w = self.targets[0].value(ell) + inner(xi, xi) / 2 + normal - 0.5 * self.d * math.log(self.degree)
        self.control = Control(ell.shape[1], n, z) if self.controls else None
        began = time.monotonic()
        state, bad = self._at(0, self.centre + z, ell, torch.zeros_like(log_w), log_w)
        self._tell_cost(n, time.monotonic() - began)
        return state, torch.where(bad, math.nan, log_w)

    def step(self, state, log_w, generator):
        k, z, ell, D = self._corrected(state, generator)
        v, v_next = self.levels[k] ** 2, self.levels[k + 1] ** 2
        delta, a = v - v_next, self.targets[k].gradient(ell)
        S = (D - z[:, None]) / v
        # Particles that go alone have weights, but not between each other.
        w = torch.softmax(torch.zeros_like(log_w) if self.alone else log_w, dim=0)
        c, c_composed = analytic_variance(z, D, a, w, v)
        walk, tau = Walk.of(self.degree, c_composed, v, v_next), kernel_variance(c[: self.m], v, delta)
        if len(self.twist):
            self.twist.look(z, D[:, : self.m], ell, c[: self.m], (v, v_next), w, generator)
        g, ahead = self._drift(a, S, delta)
        xi = randn(z.shape, generator, z)
        step = walk.ahead * einsum(a, S, "N m, N m ... -> N ...") + ahead + walk.tau.sqrt() * xi
        ratio = self._normal(step[:, None] - delta * S[:, : self.m], tau) - self._normal(step[:, None], delta)
        tracked = torch.cat([ell[:, : self.m] + ratio, ell[:, self.m :]], dim=1)
        new, bad = self._at(k + 1, z + step, tracked, state.slip, log_w)
        a_next = self.targets[k + 1].gradient(new.ell)
        S_next = (new.D - new.z[:, None]) / v_next
        pull = einsum(a_next, S_next, "N m, N m ... -> N ...")
        g_next, behind = self._drift(a_next, S_next, delta)
        return_ = step + walk.back * pull - behind
        kernels = self._normal(return_[:, None], walk.beta) - self._normal((walk.tau.sqrt() * xi)[:, None], walk.tau)
        increment = self.targets[k + 1].value(new.ell) - self.targets[k].value(ell) + kernels[:, 0]
        if self.control is not None:
            self.control.learn(increment, delta * g, delta * g_next, return_ / walk.beta, pull, w)
        if not self.alone:
            m = self.m
            r = surprise(ratio, z, step, S[:, :m], S_next[:, :m], (v, v_next), w)
            a, H = a_next[:, :m], self.targets[k + 1].hessian(new.ell)[:, :m, :m]
            surprised = einsum(a, r, "N m, N m -> N") ** 2 + _quadratic(H, r) - einsum(a, r**2, "N m, N m -> N")
            new.slip = state.slip + surprised / 2
        return new, torch.where(bad, math.nan, increment)

    def _drift(self, a: Float[Tensor, "N m"], S: Float[Tensor, "N m *x"], delta: Tensor) -> tuple[Any, Tensor]:
        """What the control's drift is made of, and how far it goes in this step."""
        if self.control is None:
            return None, torch.zeros((), dtype=S.dtype, device=S.device)
        g = self.control.features(a, S)
        return g, delta * self.control.drift(g)

    def end(self, state, log_w, generator):
        # One unweighted composed denoising: weights stop at the least noise level.
        k, z, ell, D = self._corrected(state, generator)
        x = (
            z + einsum(self.targets[k].gradient(ell)[:, : self.m], D[:, : self.m] - z[:, None], "N m, N m ... -> N ...")
        ).float()
        if not len(self.twist):
            return x, None
        known = torch.cat([ell[:, : self.m], final(self.twist, self.models[0], x)], dim=1)
        return x, self.targets[k].value(known) - self.targets[k].value(ell)

    def slip(self, state, population):
        if self.alone:
            return 0.0
        slip = abs(float(torch.softmax(population.log_w, 0) @ state.slip))
        if self.halved is None:
            return slip
        # Powers that do not sum to one are biased by a share of a step that particles do not see: half as many steps show it, as far as
        # they can tell. Negative ones fall slower, like the root of a step: their bias is twice the difference and more.
        half = self._with_half(population.n)
        change = (2 if divides(self.targets[-1]) else 1) * (population.log_z - half.log_z)
        return math.hypot(slip, change, half.diagnostics.log_z_error)

    def _with_half(self, n: int) -> Samples:
        """A run with half the particles and half the steps."""
        chain = self.halved()
        chain.halved = None
        settings = Settings(generator=self.generator)
        return watch(run(chain, 1, "", settings, selection=Selection(max(2, n // 2))), show=False)

    def notes(self, x, generator):
        said = [] if self.corrector is None else [self.corrector.note]
        return [*super().notes(x, generator), *said, *blind(self.twist.factors)]

    def _normal(self, miss: Float[Tensor, "N m *x"], variance: Tensor) -> Float[Tensor, "N m"]:
        """The log-density of Gaussians at this distance from their means."""
        return -reduce(miss**2, "N m ... -> N m", "sum") / (2 * variance) - 0.5 * self.d * torch.log(2 * math.pi * variance)

    def _tell_cost(self, n: int, seconds: float) -> None:
        """Say what a long run will cost, at the speed of its first step."""
        if (whole := seconds * self.evaluations / len(self.models)) > LONG:
            warnings.warn(
                f"{n} particles, {self.length} steps and {len(self.models)} models take {n * self.evaluations:,.0f} evaluations of networks"
                f"{self.besides}: about {whole / 60:.0f} minutes at the speed of the first step. Fewer particles cost less; particles=1 goes alone.",
                stacklevel=2,
            )

    @property
    def evaluations(self) -> float:
        """Of networks, for a particle."""
        return self.length * len(self.models)

    besides = ""

    def _at(self, k: int, z: Tensor, ell: Tensor, slip: Tensor, log_w: Tensor) -> tuple[Tracked, Bool[Tensor, "N"]]:
        """The state at a level, where the networks are called, and which particles are lost to numbers that are not finite."""
        D, ell = self._looked(k, z, ell)
        finite = reduce((D - z[:, None]).isfinite(), "N m ... -> N m", "all")
        bad = ~finite.all(1) | ell.isnan().any(1)
        if bad.any():
            if self.alone:
                check_finite(D, "a base model gave", k, self.levels[k])
            self._tell_lost(D, ~finite, log_w > -math.inf, k)
            # Nothing of them is left: zero times NaN would be NaN in the means over all particles.
            z, ell, D = (torch.where(bad.reshape(-1, *[1] * (part.ndim - 1)), 0.0, part) for part in (z, ell, D))
        return Tracked(torch.full((len(z),), k, device=z.device), z, ell, D, slip), bad

    def _looked(self, k: int, z: Tensor, ell: Tensor) -> tuple[Float[Tensor, "N m *x"], Float[Tensor, "N m"]]:
        """What all models make of particles, and what factors say of that: of these :math:`z + v \\nabla \\log f` is the denoised image."""
        s = self.levels[k]
        if not len(self.twist):
            return denoise_all(self.models, z, s, self.batch_size), ell
        push = room(self.levels, k, z)

        def parts(z: Tensor, ell: Tensor) -> tuple[Tensor, Tensor]:
            D, said, pulls = self.twist(lambda z: denoise_all(self.models, z, s, self.batch_size), z, ell, float(s**2), push)
            return torch.cat([D, z[:, None] + s**2 * pulls], dim=1), torch.cat([ell[:, : self.m], said], dim=1)

        return in_parts(parts, max(1, self.batch_size // self.m), z, ell)  # type: ignore[no-any-return]

    def _corrected(self, state: Tracked, generator: torch.Generator | None) -> tuple[int, Tensor, Tensor, Tensor]:
        """Where the particles go on from: moved within their level, where there is a corrector."""
        k, z, ell, D = int(state.k[0]), state.z, state.ell, state.D
        if self.corrector is not None:
            z, ell, D = self.corrector(z, ell, self.levels[k], self.targets[k], self.models, self.batch_size, generator, D)
        return k, z, ell, D

    def _tell_lost(self, D: Tensor, bad: Tensor, alive: Tensor, k: int) -> None:
        """Warn once, naming the models; a note of the result counts all that are lost. Raise where nobody is left."""
        s = self.levels[k]
        names = [*map(str, self.models), *map(str, self.twist.factors)]
        broken = [name for name, column in zip(names, bad.unbind(1), strict=True) if (column & alive).any()]
        if broken and not (alive & ~bad.any(1)).any():
            check_finite(D, f"{' and '.join(broken)} gave", k, s)
        if broken and not self.warned:
            self.warned = True
            warnings.warn(
                f"{' and '.join(broken)} gave numbers that are not finite for {int((bad.any(1) & alive).sum())} of {int(alive.sum())} "
                f"particles at step {k} (s={float(s):.3g}); these particles lose their weight.",
                stacklevel=2,
            )


def _quadratic(H: Float[Tensor, "N m m"], r: Float[Tensor, "N m"]) -> Float[Tensor, "N"]:
    return einsum(r, H, r, "N i, N i j, N j -> N")


def followed(degree: float, levels: Float[Tensor, "steps"]) -> bool:
    """Whether these steps can follow densities of this degree: their noise is not much wider than the target's own."""
    shares = 1 - (levels[1:] / levels[:-1]) ** 2
    return float((degree * shares - 1).clamp(min=1).log().sum()) <= math.log(1000)


def check_powers(degree: float, levels: Float[Tensor, "steps"]) -> None:
    """Raise where steps cannot follow the densities."""
    if not followed(degree, levels):
        shares = 1 - (levels[1:] / levels[:-1]) ** 2
        steps = 1 + math.ceil(len(shares) * math.log1p(-float(shares.max())) / math.log1p(-2 / degree))
        raise ValueError(
            f"Powers that sum to {degree:g} are too much for {len(levels)} steps: densities that sharp cannot be followed. Take "
            f"steps={steps} or more, or smaller powers."
        )
