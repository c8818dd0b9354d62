"""Rejection, road (c): samples of a posterior from finished samples of one base model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sculpt.base import BaseModel, same_model
from sculpt.classifier import Guide
from sculpt.composition import Composition, call_road
from sculpt.formula import Mixture, Posterior
from sculpt.particles import Diagnostics, Samples

__all__ = ["reject"]


def reject(
    composition: Composition,
    n: int,
    classifier: Guide | Callable[[Tensor], Tensor] | None = None,
    *,
    anchor: int | BaseModel | None = None,
    max_draws: int = 10_000_000,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = True,
    **options: Any,
) -> Samples:
    r"""n samples of a posterior by rejection: road (c), the referee.

    Draw x from the anchor and keep it with probability :math:`\prod_{k \ge 2} p_v(y_k \mid x)`. Exact for the base samplers and
    the terminal head, whatever happens on the way; posteriors may nest.

    Args:
        classifier: a classifier of the base models, or a function from samples to their log-densities ``(b, m)``, in the order
            of ``composition.leaves``, up to a constant common to all models. GFlowNets need none: their log-densities are
            read off one path to each sample, exactly where a state has one parent or the flows balance.
        anchor: the observed label to draw from; by default the one with the best acceptance in a pilot.
        options: of the base models' own samplers, such as ``steps``.
    """
    if n < 1:
        raise ValueError(f"The number of samples has to be at least 1, got n={n}.")
    referee = _Referee(composition, classifier, anchor, max_draws, batch_size or 4096, generator, progress, options)
    x, log_z, drawn = referee.draw(n)
    acceptance = len(x) / drawn
    error = math.sqrt((1 - acceptance) / max(1, len(x)))
    diagnostics = Diagnostics(
        road="rejection",
        formula=str(composition),
        log_z=log_z,
        log_z_error=error,
        acceptance=acceptance,
        notes=[f"{drawn} draws of the anchor"],
    )
    return composition.result(x[:n], None, diagnostics)


class _Referee:
    """Rejection for one posterior; its operands are base models, mixtures, or posteriors with a referee of their own."""

    def __init__(self, composition, classifier, anchor, max_draws, batch_size, generator, progress, options):
        formula = composition.formula
        if not isinstance(formula, Posterior | Mixture):
            raise ValueError(
                f"Rejection needs a density that one base model covers up to a constant: posteriors and mixtures do, {composition} is a "
                f"{type(formula).__name__.lower()}. Sample it by tracked densities, without a classifier."
            )
        self.composition, self.classifier, self.max_draws = composition, classifier, max_draws
        self.batch_size, self.generator, self.progress, self.options = batch_size, generator, progress, options
        self.leaves = composition.leaves
        if classifier is None and composition.family != "gflownet":
            raise ValueError(
                f"Rejection needs a classifier of {', '.join(map(str, self.leaves))}, or a function from samples to their "
                "log-densities (b, m): sculpt.reject(composition, n, classifier)."
            )
        self.operands = [self._operand(model) for model in composition.models]
        self.posterior = None
        if isinstance(formula, Posterior):
            labels = dict.fromkeys(formula.labels) if anchor is None else [composition._anchored(anchor).labels[0]]
            forms = [composition._anchored(label) for label in labels]
            self.posterior = max(forms, key=self._pilot) if len(forms) > 1 else forms[0]

    def _operand(self, model: BaseModel) -> BaseModel | _Referee:
        if not isinstance(model, Composition):
            return model
        return _Referee(
            model, self.classifier, None, self.max_draws, self.batch_size, self.generator, self.progress, self.options
        )

    def ell(self, x: Tensor) -> Float[Tensor, "b m"]:
        """The leaves' log-densities up to a constant common to all."""
        if self.classifier is None:
            from sculpt.gflownet.sampler import path_ratios

            return path_ratios(self.leaves, x, self.generator)
        if isinstance(self.classifier, Guide):
            order = range(len(self.leaves))
            if self.classifier.keys is not None:
                self.classifier.align(Posterior(len(self.leaves), (0,)), self.leaves)
                order = [self.classifier.keys.index(leaf.key) for leaf in self.leaves]
            with torch.no_grad():
                return self.classifier.terminal(x)[:, list(order)].double()
        return self.classifier(x).double()

    def operand_densities(self, ell: Float[Tensor, "b m"]) -> Float[Tensor, "b k"]:
        columns = []
        for operand in self.operands:
            if isinstance(operand, _Referee):
                own = ell[:, [self._index(leaf) for leaf in operand.leaves]]
                columns.append(operand.density(own))
            else:
                columns.append(ell[:, self._index(operand)])
        return torch.stack(columns, dim=-1)

    def _index(self, leaf: BaseModel) -> int:
        return next(i for i, other in enumerate(self.leaves) if same_model(leaf, other))

    def density(self, ell: Float[Tensor, "b m"]) -> Float[Tensor, "b"]:
        """The composition's own log-density, normalised, up to the same constant."""
        if not hasattr(self, "_log_z"):
            self._log_z = 0.0 if self.posterior is None else self.draw(4096)[1]
        return self.composition.formula.value(self.operand_densities(ell)) - self._log_z

    def log_acceptance(self, x: Tensor, posterior: Posterior) -> Float[Tensor, "b"]:
        ell = self.operand_densities(self.ell(x))
        return posterior.value(ell) - ell[:, posterior.labels[0]]

    def propose(self, label: int, n: int) -> Tensor:
        operand = self.operands[label]
        if isinstance(operand, _Referee):
            return operand.draw(n)[0][:n]
        return call_road(operand.sample, f"sampling {operand}", n, generator=self.generator, progress=False, **self.options).x

    def _pilot(self, posterior: Posterior) -> float:
        return float(self.log_acceptance(self.propose(posterior.labels[0], 256), posterior).exp().mean())

    def draw(self, n: int) -> tuple[Tensor, float, int]:
        """At least n samples, log Z of the composition as it is written, and how many draws of the anchor it took."""
        if self.posterior is None:
            return self.composition.pick(n, self.propose, self.generator), 0.0, n
        from tqdm.auto import tqdm

        kept, total, drawn, expected = [], 0, 0, 0.0
        label = self.posterior.labels[0]
        with tqdm(
            total=n, desc=f"rejection from {self.composition.models[label]}", disable=not self.progress, delay=2, leave=False
        ) as bar:
            while total < n:
                # Enough for what is missing at the acceptance seen so far, a little more than too little.
                rate = (total + 1) / (drawn + 4)
                size = int(min(max(64, 1.1 * (n - total) / rate), 8 * self.batch_size, self.max_draws))
                x = self.propose(label, size)
                log_p = self.log_acceptance(x, self.posterior)
                device = x.device if self.generator is None else self.generator.device
                u = torch.rand(len(x), generator=self.generator, dtype=torch.float64, device=device).to(x.device)
                accepted = x[u.log() < log_p]
                kept.append(accepted)
                total, drawn, expected = total + len(accepted), drawn + len(x), expected + float(log_p.exp().sum())
                bar.update(len(accepted))
                if total < n and drawn >= self.max_draws:
                    raise RuntimeError(
                        f"Rejection kept {total} of {drawn} draws from {self.composition.models[label]}, {n} were asked for. The base models "
                        "hardly overlap where the composition lies; ask for fewer samples, raise max_draws, or see sculpt.overlap."
                    )
        return torch.cat(kept), math.log(expected / drawn) + self.composition._rescale(label), drawn
