r"""Schedules: where the path of a training scheduler meets canonical coordinates.

Notation: a Gaussian path :math:`x_t = \alpha_t x_0 + \sigma_t \varepsilon` is, in :math:`z = x_t / \alpha_t` and
:math:`s = \sigma_t / \alpha_t`, the same process for every model. The network sees ``scale(s) * z`` at ``time(s)`` and answers
with F; whatever it was trained to predict, the denoised sample is affine in it, :math:`D = a(s)\, z + b(s)\, F`.

A noise level is a float, a 0-dim tensor or one entry per sample; the clock is float64.
"""

import abc
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sculpt.diffusion.clock import Level, level, like

__all__ = ["Schedule", "schedule_of"]


class Schedule(abc.ABC):
    """The path and the prediction type of one training scheduler."""

    s_min: float
    s_max: float
    """The range of noise levels that training covered; infinite where the path ends in pure noise."""

    prediction_type: str

    integer_times: bool = False
    """Whether the times of training are integers, so that rounding one is an approximation and not nonsense."""

    identity: tuple
    """What the path depends on. Schedulers that differ in nothing else but how they sample have the same."""

    @abc.abstractmethod
    def scale(self, s: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """The factor from z to the network's input."""

    @abc.abstractmethod
    def time(self, s: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """The network's time argument, fractional and float32; beyond the trained range the nearest trained time."""

    @abc.abstractmethod
    def sigma(self, t: Tensor) -> Float[Tensor, "*b"]:
        """The noise level of a time argument, the inverse of :meth:`time`."""

    @abc.abstractmethod
    def coefficients(self, s: Float[Tensor, "*b"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
        """The a and b of D = a z + b F."""

    def at_share(self, share: float) -> float:
        """The noise level where this share of the times of training is left."""
        T = getattr(self, "T", None)
        if T is None:  # noise levels are all that there is
            return self.s_max**share * self.s_min ** (1 - share)
        t = torch.tensor(share * T)
        return float(self.sigma(T - t if getattr(self, "inverted", False) else t))

    def denoised(self, z: Float[Tensor, "b *x"], s: Level, output: Float[Tensor, "b *x"]) -> Float[Tensor, "b *x"]:
        """D from the network's output F."""
        a, b = self.coefficients(level(s, z.device))
        return like(a, z) * z + like(b, z) * output

    def output(self, z: Float[Tensor, "b *x"], s: Level, denoised: Float[Tensor, "b *x"]) -> Float[Tensor, "b *x"]:
        """The F that says D."""
        a, b = self.coefficients(level(s, z.device))
        return (denoised - like(a, z) * z) / like(b, z)


PREDICTIONS = {
    "epsilon": lambda s: (torch.ones_like(s), -s),
    "sample": lambda s: (torch.zeros_like(s), torch.ones_like(s)),
    "v_prediction": lambda s: (1 / (1 + s**2), -s / (1 + s**2).sqrt()),  # v = alpha eps - sigma x0 on alpha^2 + sigma^2 = 1
    "flow_prediction": lambda s: (1 / (1 + s), -s / (1 + s)),  # v = eps - x0 on alpha + sigma = 1
    "score": lambda s: (torch.ones_like(s), s**2),
}


class VariancePreserving(Schedule):
    r""".. math:: \alpha^2 + \sigma^2 = 1, \qquad \alpha_t^2 = \bar\alpha_t, \quad t = 0, 1, \dots, T - 1

    Between the T training times log s is linear in t. With zero terminal SNR s is infinite at T-1, and it is 1/s that
    falls linearly over the last interval.
    """

    integer_times = True

    def __init__(self, alphas_cumprod: Float[Tensor, " T"], prediction_type: str, zero_snr: bool, identity: tuple):
        # The scheduler's own float32 values: they, not their exact counterparts, are the noise that training added.
        alpha2 = alphas_cumprod.detach().cpu().double()
        # Some schedulers store 2^-24 in place of the zero, which can be out of order.
        self.T, alpha2 = len(alpha2), alpha2[: -1 if zero_snr else None]
        self.log_s = ((1 - alpha2) / alpha2).log() / 2
        if not (self.log_s.isfinite().all() and (self.log_s.diff() > 0).all()):
            raise ValueError(
                "The scheduler's noise levels do not increase strictly from t=0: alphas_cumprod has to fall within (0, 1). "
                "Check its beta_start, beta_end and trained_betas."
            )
        self.s_min, self.s_last = self.log_s[0].exp().item(), self.log_s[-1].exp().item()
        # A predicted noise says nothing about the sample where the input is pure noise.
        self.zero_snr = zero_snr and prediction_type != "epsilon"
        self.s_max = math.inf if self.zero_snr else self.s_last
        self.prediction_type, self.identity = prediction_type, ("vp", prediction_type, zero_snr, *identity)

    def scale(self, s):
        return (1 + s**2).rsqrt()

    def time(self, s):
        table = self._table(s)
        i = torch.searchsorted(table, s.log()).clamp(1, len(table) - 1)
        t = i - 1 + ((s.log() - table[i - 1]) / (table[i] - table[i - 1])).clamp(0, 1)
        if self.zero_snr:
            t = torch.where(s > self.s_last, self.T - 1 - self.s_last / s, t)
        return t.float()

    def sigma(self, t):
        t, table = t.double(), self._table(t)
        i = t.floor().long().clamp(0, len(table) - 2)
        s = (table[i] + (t - i).clamp(0, 1) * (table[i + 1] - table[i])).exp()
        if self.zero_snr:
            s = torch.where(t > self.T - 2, self.s_last / (self.T - 1 - t).clamp(min=0), s)
        return s

    def coefficients(self, s):
        return PREDICTIONS[self.prediction_type](s)

    def _table(self, s):
        self.log_s = self.log_s.to(s.device)  # stays where it was last used
        return self.log_s


class Flow(Schedule):
    r""".. math:: \alpha + \sigma = 1, \qquad t = T \sigma

    Shifts only choose the times at which a solver steps; a network's time argument is its noise level all the same. Inverted, it
    counts from noise to data, :math:`t = T (1 - \sigma)`, and the velocity points the other way.
    """

    def __init__(self, T: int, prediction_type: str = "flow_prediction", inverted: bool = False):
        self.T, self.prediction_type, self.inverted = T, prediction_type, inverted
        self.identity = ("flow", prediction_type, T, *["inverted"] * inverted)
        self.s_min = 1 / (T - 1)  # sigma = 1/T, the first of the T training times
        self.s_max = self.s_min * (T - 1) ** 2 if prediction_type == "epsilon" else math.inf

    def scale(self, s):
        return 1 / (1 + s)

    def time(self, s):
        return (self.T * (1 if self.inverted else s) / (1 + s)).float()

    def sigma(self, t):
        sigma = 1 - t.double() / self.T if self.inverted else t.double() / self.T
        return sigma / (1 - sigma).clamp(min=0)

    def coefficients(self, s):
        a, b = PREDICTIONS[self.prediction_type](s)
        return a, -b if self.inverted else b


class Preconditioned(Schedule):
    r"""Karras et al.'s preconditioning.

    .. math:: D = \frac{c^2}{w^2} z \pm \frac{s\,c}{w} F\Bigl(\frac{z}{w}, \tfrac14 \log s\Bigr), \qquad w^2 = s^2 + c^2,

    with :math:`c^2` the variance of the data.
    """

    def __init__(self, s_min: float, s_max: float, sigma_data: float, prediction_type: str):
        self.s_min, self.s_max, self.sigma_data, self.prediction_type = float(s_min), float(s_max), sigma_data, prediction_type
        self.sign = {"epsilon": 1, "v_prediction": -1}[prediction_type]
        self.identity = ("edm", prediction_type, sigma_data, self.s_min, self.s_max)

    def scale(self, s):
        return (s**2 + self.sigma_data**2).rsqrt()

    def time(self, s):
        return (s.log() / 4).float()

    def sigma(self, t):
        return (4 * t.double()).exp()

    def coefficients(self, s):
        c, w = self.sigma_data, (s**2 + self.sigma_data**2).sqrt()
        return (c / w) ** 2, self.sign * s * c / w


class VarianceExploding(Schedule):
    r""":math:`z = x`, the time argument is s, and the output is the score :math:`(D - z) / s^2`."""

    prediction_type = "score"

    def __init__(self, s_min: float, s_max: float):
        self.s_min, self.s_max, self.identity = float(s_min), float(s_max), ("ve", s_min, s_max)

    def scale(self, s):
        return torch.ones_like(s)

    def time(self, s):
        return s.float()

    def sigma(self, t):
        return t.double()

    def coefficients(self, s):
        return PREDICTIONS["score"](s)


_DISCRETE = (
    "DDPM DDPMParallel DDIM DDIMParallel PNDM DPMSolverMultistep DPMSolverSinglestep DPMSolverSDE UniPCMultistep DEISMultistep "
    "SASolver EulerDiscrete EulerAncestralDiscrete HeunDiscrete KDPM2Discrete KDPM2AncestralDiscrete LMSDiscrete UnCLIP "
    "CogVideoXDDIM CogVideoXDPM"
)
_FAMILIES = {
    "variance preserving": _DISCRETE.split(),
    "EDM": ["EDMEuler", "EDMDPMSolverMultistep"],
    "flow matching": ["FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM"],
    "variance exploding": ["ScoreSdeVe"],
}


def schedule_of(scheduler: Any) -> Schedule:
    """The path that a network was trained on, from the diffusers scheduler of its training."""
    names = {parent.__name__.removesuffix("Scheduler") for parent in type(scheduler).__mro__}
    family = next((family for family, known in _FAMILIES.items() if names & set(known)), None)
    if family is None:
        supported = "; ".join(f"{family}: {', '.join(known)}" for family, known in _FAMILIES.items())
        raise ValueError(
            f"Cannot read a Gaussian path from {type(scheduler).__name__}. Supported are diffusers' schedulers {supported}. "
            "Pass the scheduler that the model was trained with, or one of these with the same betas or sigmas."
        )
    config = scheduler.config
    if family == "EDM":
        _check_prediction(scheduler, ("epsilon", "v_prediction"))
        return Preconditioned(config.sigma_min, config.sigma_max, config.sigma_data, config.prediction_type)
    if family == "variance exploding":
        return VarianceExploding(config.sigma_min, config.sigma_max)
    if family == "flow matching":
        return Flow(config.num_train_timesteps, inverted=bool(config.get("invert_sigmas")))
    return _discrete(scheduler)


def _discrete(scheduler: Any) -> Schedule:
    config = scheduler.config
    if config.get("use_flow_sigmas"):
        return Flow(config.num_train_timesteps, _check_prediction(scheduler, ("flow_prediction", "epsilon", "sample")))
    prediction_type = _check_prediction(scheduler, ("epsilon", "sample", "original_sample", "v_prediction"))
    alphas_cumprod = scheduler.alphas_cumprod
    if config.get("timestep_type") == "continuous" and prediction_type == "v_prediction":
        # Stable Video Diffusion: Karras et al.'s preconditioning at unit data variance.
        ends = ((1 - alphas_cumprod[[0, -1]].double()) / alphas_cumprod[[0, -1]].double()).sqrt().tolist()
        return Preconditioned(config.get("sigma_min") or ends[0], config.get("sigma_max") or ends[1], 1.0, prediction_type)
    betas = config.get("trained_betas")
    betas = None if betas is None else tuple(float(beta) for beta in betas)
    entries = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "snr_shift_scale")
    zero_snr = bool(config.get("rescale_betas_zero_snr") or alphas_cumprod[-1] == 0)
    identity = (betas, *(None if betas else config.get(entry) for entry in entries))
    return VariancePreserving(alphas_cumprod, prediction_type.removeprefix("original_"), zero_snr, identity)


def _check_prediction(scheduler: Any, known: tuple[str, ...]) -> str:
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    if prediction_type not in known:
        hint = " A velocity needs use_flow_sigmas=True." if prediction_type == "flow_prediction" else ""
        raise ValueError(
            f"{type(scheduler).__name__} has prediction_type={prediction_type!r}; on its path the supported ones are "
            f"{', '.join(known)}. Set the one that the model was trained for.{hint}"
        )
    return prediction_type
