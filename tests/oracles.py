"""Exact answers: Gaussian mixtures in closed form at every noise level, their compositions on a grid, and distances."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from sculpt.classifier.guide import Guide
from sculpt.formula import Formula, Posterior


class GaussianMixture(nn.Module):
    r""":math:`p(x) = \sum_k w_k \mathcal N(x; \mu_k, \Sigma_k)`; noised to variance v it is the mixture with :math:`\Sigma_k + v I`.

    Everything in float64 inside. The covariances are kept as eigenvectors U and eigenvalues, so a noise level costs nothing.
    """

    def __init__(self, means, covariances, weights=None):
        super().__init__()
        means = torch.as_tensor(means, dtype=torch.float64)
        K, d = means.shape
        covariances = torch.as_tensor(covariances, dtype=torch.float64)
        if covariances.ndim == 0:
            covariances = covariances * torch.eye(d, dtype=torch.float64)
        covariances = covariances.expand(K, d, d)
        weights = torch.ones(K) if weights is None else torch.as_tensor(weights)
        eigenvalues, U = torch.linalg.eigh(covariances)
        for name, value in (
            ("means", means),
            ("U", U),
            ("eigenvalues", eigenvalues),
            ("weights", weights.double() / weights.sum()),
        ):
            self.register_buffer(name, value)
        self.d = d

    def components(self, z: Tensor, v) -> tuple[Tensor, Tensor, Tensor]:
        """Per component: log w N(z), the coordinates U'(z - mu), and the variances."""
        # All components in one matrix product: many times faster than one by one.
        y = (z.double() @ self.U.transpose(0, 1).flatten(1)).unflatten(1, self.means.shape)
        y = y - torch.einsum("kij,ki->kj", self.U, self.means)
        v = torch.as_tensor(v, dtype=torch.float64)
        variance = self.eigenvalues + (v[:, None, None] if v.ndim else v)
        log_n = -0.5 * (y**2 / variance + variance.log() + math.log(2 * math.pi)).sum(-1)
        return self.weights.log() + log_n, y, variance

    def log_prob(self, z: Tensor, v=0.0) -> Tensor:
        return self.components(z, v)[0].logsumexp(-1)

    def score(self, z: Tensor, v=0.0) -> Tensor:
        log_n, y, variance = self.components(z, v)
        pull = log_n.softmax(-1)[..., None] * (-y / variance)
        return pull.flatten(1) @ self.U.transpose(0, 1).flatten(1).T

    def denoise(self, z: Tensor, s) -> Tensor:
        v = torch.as_tensor(s, dtype=torch.float64) ** 2
        return (z + (v[:, None] if v.ndim else v) * self.score(z, v)).to(z.dtype)

    def draw(self, n: int, generator=None, v=0.0) -> Tensor:
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        xi = torch.randn(n, self.d, dtype=torch.float64, generator=generator)
        x = torch.empty_like(xi)
        for i, U in enumerate(self.U):
            x[k == i] = self.means[i] + ((self.eigenvalues[i] + v).sqrt() * xi[k == i]) @ U.T
        return x


def ring(n, radius, variance, centre=(0.0, 0.0), phase=0.0, weights=None) -> GaussianMixture:
    angles = torch.arange(n, dtype=torch.float64) * 2 * math.pi / n + phase
    means = torch.stack([angles.cos(), angles.sin()], -1) * radius + torch.tensor(centre, dtype=torch.float64)
    return GaussianMixture(means, torch.tensor(variance), weights)


class ExactGuide(Guide):
    r"""The classifier that training would end in, for Gaussian mixtures of one or two dimensions.

    .. math:: h(z, s) = \int p_v(y_2, \dots, y_n \mid x) \, q_i(x \mid z) \, dx, \qquad q_i(x \mid z) \propto p_i(x) \, N(z; x, s^2)

    The trapezoid rule, exact to a few digits less than float64 where the noise is wider than its spacing; below that Gauss and
    Hermite's nodes around z. Differentiable in z. The noise factorises over the axes, so the cost is that of a matrix product.
    """

    def __init__(self, mixtures, keys=None, observations: int = 16, fine: float = 0.05):
        self.mixtures, self.keys, self.m, self.observations = list(mixtures), keys, len(mixtures), observations
        self.d, self.fine = self.mixtures[0].d, fine
        half_width = max(float(p.means.abs().max() + 6 * p.eigenvalues.max().sqrt()) for p in self.mixtures)
        self.axis = torch.linspace(-half_width, half_width, int(2 * half_width / fine * 1.25) + 1, dtype=torch.float64)
        nodes, weights = (torch.as_tensor(a) for a in np.polynomial.hermite_e.hermegauss(5))
        self.nodes = torch.cartesian_prod(*[nodes] * self.d).reshape(-1, self.d)
        self.weights = torch.cartesian_prod(*[weights.log()] * self.d).reshape(-1, self.d).sum(-1)
        self._tables = {}

    def _ell(self, x: Tensor, v=0.0) -> Tensor:
        return torch.stack([p.log_prob(x, v) for p in self.mixtures], -1)

    def marginal(self, z, s):
        return self._by_level(lambda z, s: torch.log_softmax(self._ell(z, s**2), -1), z, s)

    def terminal(self, x):
        return torch.log_softmax(self._ell(x), -1)

    def log_h(self, z, s, *, labels, odds=None):
        function = self._on_axes if float(s.min()) >= self.fine else self._around
        return self._by_level(lambda z, s: function(z.double(), s, tuple(labels), odds), z, s)

    def _on_axes(self, z, s, labels, odds):
        if (labels, odds) not in self._tables:
            x = torch.cartesian_prod(*[self.axis] * self.d).reshape(-1, self.d)
            log_p = self.mixtures[labels[0]].log_prob(x)
            both = torch.stack([log_p + self.log_h_terminal(x, labels=labels, odds=odds), log_p])
            # The same constant off both: they are compared.
            self._tables[labels, odds] = (both - log_p.max()).exp().reshape(2, *[len(self.axis)] * self.d)
        exponents = -((z[:, :, None] - self.axis) ** 2) / (2 * s**2)
        kernel = (exponents - exponents.detach().amax(-1, keepdim=True)).exp()
        total = torch.einsum("bi,ti...->bt...", kernel[:, 0], self._tables[labels, odds])
        for k in range(1, self.d):
            total = torch.einsum("bi,bti...->bt...", kernel[:, k], total)
        return total[:, 0].log() - total[:, 1].log()

    def _around(self, z, s, labels, odds):
        x = (z[:, None] + s * self.nodes).reshape(-1, self.d)
        log_p = self.mixtures[labels[0]].log_prob(x)
        log_f = self.log_h_terminal(x, labels=labels, odds=odds)
        both = torch.stack([log_p + log_f, log_p]).reshape(2, len(z), -1) + self.weights
        return both[0].logsumexp(-1) - both[1].logsumexp(-1)

    @staticmethod
    def _by_level(function, z, s):
        s = s.double().expand(len(z))
        if bool((s == s[0]).all()):
            return function(z, s[0])
        parts = {float(level): (s == level).nonzero()[:, 0] for level in s.unique()}
        values = torch.cat([function(z[rows], s[rows[0]]) for rows in parts.values()])
        return values[torch.cat(list(parts.values())).argsort()]


class Grid:
    """A square cut into n × n cells; masses by the midpoint rule with ``refine``² points a cell."""

    def __init__(self, half_width: float, n: int = 28, refine: int = 16):
        self.half_width, self.n, self.refine = half_width, n, refine
        fine = n * refine
        axis = (torch.arange(fine, dtype=torch.float64) + 0.5) / fine * 2 * half_width - half_width
        self.points = torch.cartesian_prod(axis, axis)
        self.area = (2 * half_width / fine) ** 2

    def log_densities(self, models) -> Tensor:
        return torch.stack([model.log_prob(self.points) for model in models], -1)

    def exact(self, formula: Formula, models) -> tuple[Tensor, float]:
        """Cell masses of the normalised target, and its log Z."""
        log_p = formula.value(self.log_densities(models)) + math.log(self.area)
        log_z = float(log_p.logsumexp(0))
        n, r = self.n, self.refine
        return (log_p - log_z).exp().view(n, r, n, r).sum((1, 3)).flatten(), log_z

    def histogram(self, x: Tensor) -> Tensor:
        """Cell shares, with what falls outside as the last entry."""
        cells = ((x.double() + self.half_width) / (2 * self.half_width) * self.n).floor().long()
        inside = ((cells >= 0) & (cells < self.n)).all(-1)
        index = torch.where(inside, cells[:, 0] * self.n + cells[:, 1], self.n**2)
        return torch.bincount(index, minlength=self.n**2 + 1).double() / len(x)

    def total_variation(self, x: Tensor, masses: Tensor) -> float:
        return 0.5 * float((self.histogram(x) - torch.cat([masses, masses.new_zeros(1)])).abs().sum())

    def floor(self, masses: Tensor, n: int, repeats: int = 20, seed: int = 0) -> float:
        """The mean total variation of n draws from an exact sampler."""
        generator = torch.Generator().manual_seed(seed)
        draws = torch.multinomial(masses.expand(repeats, -1), n, replacement=True, generator=generator)
        shares = torch.stack([torch.bincount(row, minlength=self.n**2) for row in draws]).double() / n
        return 0.5 * float((shares - masses).abs().sum(-1).mean())


def mean_distance(x: Tensor, y: Tensor) -> float:
    x, y = x.double(), y.double()
    return sum(float(torch.cdist(part, y).sum()) for part in x.split(1000)) / (len(x) * len(y))


def energy_distance(x: Tensor, y: Tensor, within_y: float | None = None) -> float:
    """2 E|X−Y| − E|X−X'| − E|Y−Y'| between the two empirical distributions; never negative. The last term may be known."""
    within_y = mean_distance(y, y) if within_y is None else within_y
    return 2 * mean_distance(x, y) - mean_distance(x, x) - within_y


def sliced_wasserstein(x: Tensor, y: Tensor, directions: int = 200, seed: int = 0) -> float:
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(x.shape[1], directions, dtype=torch.float64, generator=generator)
    u = u / u.norm(dim=0)
    return float(((x.double() @ u).sort(0).values - (y.double() @ u).sort(0).values).abs().mean())


def draw_posterior(formula: Posterior, models, n: int, generator=None) -> Tensor:
    """Exact draws by rejection from the model of the first label, with exact densities."""
    kept, count = [], 0
    while count < n:
        x = models[formula.labels[0]].draw(4 * n, generator)
        ell = torch.stack([model.log_prob(x) for model in models], -1)
        accept = formula.value(ell) - ell[:, formula.labels[0]]
        x = x[torch.rand(len(x), generator=generator, dtype=torch.float64).log() < accept]
        kept.append(x)
        count += len(x)
    return torch.cat(kept)[:n]
