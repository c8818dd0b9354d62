"""Fields of many numbers whose densities are known."""

import torch

from sculpt.diffusion.denoiser import Denoiser


class Network:
    """What models share, and how often it was called."""

    calls = evaluations = 0


class Fields(Denoiser):
    """A mixture of white fields around a few patterns, in any number of dimensions: D and log-densities in closed form.

    Args:
        name: of the model.
        shares: of the four patterns.
        d: how many numbers.
        spread: of the white noise around a pattern.
        contrast: of the patterns.
        shape: of a sample.
        network: whose calls are counted; models of one network are called together.
    """

    together = None

    def __init__(self, name, shares, d=3072, spread=0.3, contrast=0.35, shape=None, network=None):
        self.name = self.key = name
        self.shape, self.s_min, self.s_max = shape or (3, d // 48, 16), 0.01, 80.0
        self.device, self.calls, self.together = torch.device("cpu"), 0, network
        patterns = torch.randn(4, d, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        self.means, self.c = contrast * patterns, spread**2
        self.log_shares = torch.tensor(shares, dtype=torch.float64).log()

    def log_parts(self, z, s):
        square = torch.cdist(z.double().flatten(1), self.means) ** 2
        return self.log_shares - square / (2 * (self.c + float(s) ** 2))

    def log_prob(self, z, s):
        """Up to a constant, which fields of one spread have in common."""
        return self.log_parts(z, s).logsumexp(1)

    def denoise(self, z, s):
        self.calls += len(z)
        p, v = torch.softmax(self.log_parts(z, s), dim=-1), float(s) ** 2
        mean = (p @ self.means).reshape(z.shape)
        return (mean + self.c / (self.c + v) * (z.double() - mean)).to(z.dtype)

    def denoise_together(self, models, z, s):
        if self.together is not None:
            self.together.calls += 1
            self.together.evaluations += len(models) * len(z)
        return super().denoise_together(models, z, s)

    def draw(self, n, generator):
        """Exact samples."""
        k = torch.multinomial(self.log_shares.exp(), n, True, generator=generator)
        x = self.means[k] + self.c**0.5 * torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return x.reshape(n, *self.shape)

    def which(self, x):
        """The pattern that a sample shows."""
        return torch.cdist(x.double().flatten(1), self.means).argmin(1)
