"""Road (c), the referee: finished samples of one base model, kept as often as the posterior says."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from sculpt.chain import Progress, Settings
from sculpt.checks import check_whole, real, whole
from sculpt.classifier.guide import Guide
from sculpt.diagnostics import Diagnostics
from sculpt.formula import Mixture, Posterior, Tilted
from sculpt.model import BaseModel, same_model
from sculpt.roads.road import Road
from sculpt.roads.tracked import in_order, picks
from sculpt.state import in_parts

if TYPE_CHECKING:
    from sculpt.composition import Composition
    from sculpt.factor import Factor

__all__ = ["Rejection"]

PILOT = 4096
"""Accepted samples from which the log Z of an inner posterior is estimated."""
LOOKED_AT = 16
"""Samples that are looked at twice where nothing exact decides."""
MOST = 2**15
"""Draws of the anchor at a time."""


class Rejection(Road):
    r"""Reject: draw x from the anchor and keep it with probability :math:`\prod_{k \ge 2} p_v(y_k \mid x)`.

    Exact for the base samplers and the terminal head, whatever happens on the way; posteriors may nest. A factor is kept by in proportion to
    what it is, over the most that it can be.

    Args:
        classifier: a classifier of the base models, or a function from samples to their log-densities ``(b, m)``, in the order of
            ``composition.leaves``, up to a constant common to all models. Models that know their own densities need none; without one,
            diffusion models decide by their denoising errors, an approximation, and models whose samples several paths lead to by
            averages over paths.
        anchor: the observed label to draw from; by default the one with the best acceptance, which goes with one over its odds.
        max_draws: how many samples of the anchor to draw at most.
        detail: the noise level through which samples are looked at where there is no classifier (diffusion); as for ``Tracked``.
        paths: how many to average over where there is no classifier (GFlowNets); by default as many as their spread asks for.

    Example:
        >>> (one & two).sample(100, sculpt.Rejection(), generator=seed).verdict.level
        'exact'
    """

    def __init__(
        self,
        classifier: Guide | Callable[[Tensor], Tensor] | None = None,
        *,
        anchor: int | BaseModel | None = None,
        max_draws: int = 10_000_000,
        detail: float | None = None,
        paths: int | None = None,
    ):
        if not (classifier is None or callable(classifier) or isinstance(classifier, Guide)):
            raise TypeError(
                f"Rejection takes a classifier, or a function from samples to log-densities; got {classifier!r:.200}."
            )
        self.classifier, self.max_draws = classifier, whole("max_draws", max_draws)
        self.detail = None if detail is None else real("detail", detail)
        if self.detail is not None and (self.detail < 0 or classifier is not None):
            raise ValueError(f"detail is a noise level from 0, and goes without a classifier; got {detail}.")
        self.paths = check_whole("paths", paths)
        if paths is not None and classifier is not None:
            raise ValueError(f"paths are averaged over where there is no classifier; got both, paths={paths}. Leave one out.")
        self.anchor = anchor if anchor is None or isinstance(anchor, BaseModel) else whole("anchor", anchor, least=0)

    def check(self, composition: Composition) -> None:
        _check_covered(composition)
        if loose := [factor for factor in composition.factors if factor.bound is None]:
            raise ValueError(
                f"Rejection keeps samples by {loose[0]} over the most that it can be: pass sculpt.Factor(..., bound=...), or take sculpt.Tracked."
            )
        names = ", ".join(map(str, composition.leaves))
        if self._guesses(composition) and not composition.leaves[0].has_referee:
            raise ValueError(
                f"Rejection needs a classifier of {names}, or a function from samples to their log-densities (b, m): "
                "sculpt.Rejection(classifier)."
            )
        if isinstance(self.classifier, Guide):
            self.classifier.align(Posterior(len(composition.leaves), (0,)), composition.leaves)
        if isinstance(composition.formula, Posterior):
            composition.anchored(self.anchor)
        elif self.anchor is not None:
            raise ValueError(
                f"anchor={self.anchor}: {composition} is a mixture, whose models are picked for every sample. Leave it out."
            )

    def stream(self, composition: Composition, n: int, settings: Settings) -> Iterator[Progress]:
        self.check(composition)
        settings.refuse_each("rejection draws as many as it takes")
        return self._stream(composition, n, settings)

    def _stream(self, composition: Composition, n: int, settings: Settings) -> Iterator[Progress]:
        referee = _Referee(composition, self, settings, self.anchor)
        x, log_z, error, drawn = yield from referee.draw(n)
        apart = 0.0 if self.classifier is not None else (yield from referee.apart(x[:LOOKED_AT]))
        guesses = self._guesses(composition)
        diagnostics = Diagnostics(
            road="rejection",
            formula=str(composition),
            log_z=log_z,
            # Noise of the exponent raises its mean.
            log_z_error=math.hypot(error, apart**2 / 2, *(inner for _, inner in referee.known.values())),
            slip=apart**2 / 2,
            acceptance=len(x) / drawn,
            apart=apart,
            referee="the models' denoising errors" if guesses else self._decides,
            seed=settings.seed,
            notes=[f"{drawn} draws of the base models", *referee.said]
            + ["the models' denoising errors decided, an approximation"] * guesses,
        )
        yield Progress(f"sampling {composition}", 0, None, n, n, None, composition.result(x[:n], None, diagnostics))

    def _guesses(self, composition: Composition) -> bool:
        return self.classifier is None and not composition.knows_density and _compared(composition)

    @property
    def asked(self) -> dict[str, Any]:
        """What models are told beside the samples."""
        return {name: value for name in ("detail", "paths") if (value := getattr(self, name)) is not None}

    @property
    def _decides(self) -> str:
        if self.classifier is None:
            return "the models' own densities"
        return "the terminal head" if isinstance(self.classifier, Guide) else "the given densities"


def _check_covered(composition: BaseModel) -> None:
    if not isinstance(composition.formula, Posterior | Mixture | Tilted):  # type: ignore[attr-defined]
        raise ValueError(
            f"Rejection needs a density that one base model covers up to a constant: posteriors and mixtures do, {composition} is a "
            f"{type(composition.formula).__name__.lower()}. Sample it by tracked densities, without a classifier."  # type: ignore[attr-defined]
        )
    for model in composition.models:
        if model.models:
            _check_covered(model)


def _compared(composition: BaseModel) -> bool:
    """Whether densities are compared anywhere in it: mixtures pick their models, and factors need none."""
    own = isinstance(getattr(composition, "formula", None), Posterior) and len(composition.models) > 1
    return own or any(map(_compared, composition.models))


T = TypeVar("T")
Drawn = Generator[Progress, None, tuple[Tensor, float, float, int]]


class _Referee:
    """Rejection for one posterior or mixture; its operands are base models, or have a referee of their own."""

    def __init__(self, composition, road, settings, anchor=None, root=None):
        self.composition, self.road, self.settings = composition, road, settings
        self.leaves: Sequence[BaseModel] = composition.leaves if root is None else root.leaves
        """Of the whole composition: the columns of all log-densities."""
        self.factors: Sequence[Factor] = composition.factors if root is None else root.factors
        """The columns behind them."""
        self.compared: bool = _compared(composition) if root is None else root.compared
        self.known: dict[str, tuple[float, float]] = {} if root is None else root.known
        """The log Z of every inner composition, by its key, with its error."""
        self.said: list[str] = [] if root is None else root.said
        self.operands = [
            _Referee(model, road, settings, root=root or self) if model.models else self._column(model)
            for model in composition.models
        ]
        keys = [factor.key for factor in self.factors]
        self.operands += [len(self.leaves) + keys.index(factor.key) for factor in composition.own]
        formula = self.formula = composition.formula
        self.label: int | None = None
        """Of the operand that is drawn from; a mixture draws from all."""
        self.bound = 0.0
        """What the most that factors can be comes to."""
        if isinstance(formula, Tilted):
            self.label = 0
            self.bound = sum(power * factor.bound for power, factor in zip(formula.powers, composition.own, strict=True))
        if isinstance(formula, Posterior):
            # The acceptance is Z as the anchor sees it: it goes with one over the anchor's odds.
            label = min(formula.labels, key=formula.odds.__getitem__) if anchor is None else anchor
            self.formula = composition.anchored(label)
            self.label = self.formula.labels[0]

    def _column(self, leaf: BaseModel) -> int:
        return next(i for i, other in enumerate(self.leaves) if same_model(leaf, other))

    def columns(self, x: Tensor) -> Float[Tensor, "b m"]:
        """The leaves' log-densities up to a constant common to all, and what the factors say."""
        ell = self.ell(x) if self.compared else torch.zeros(len(x), len(self.leaves), dtype=torch.float64, device=x.device)
        said = [factor(self.leaves[0].told(x), len(x)).to(ell) for factor in self.factors]
        return torch.cat([ell, *(log_f[:, None] for log_f in said)], dim=1)

    def ell(self, x: Tensor) -> Float[Tensor, "b m"]:
        """The leaves' log-densities up to a constant common to all."""
        judge, names = self.road.classifier, ", ".join(map(str, self.leaves))
        with torch.no_grad():
            if judge is None:
                ell = self.leaves[0].log_ratios(self.leaves, x, self.settings.generator, **self.road.asked)
            elif isinstance(judge, Guide):
                ell = in_parts(lambda x: judge.shares(self.leaves, x), self.settings.batch_size or 1024, x)
            else:
                ell = judge(x)
        shape = tuple(ell.shape) if isinstance(ell, Tensor) else type(ell).__name__
        if shape != (len(x), len(self.leaves)):
            raise ValueError(
                f"Got log-densities of shape {shape} for {len(x)} samples; expected one column for each of {names}."
            )
        ell = ell.double()
        if bad := int((~(ell < math.inf)).any(1).sum()):
            raise FloatingPointError(
                f"{self.road._decides} of {names} gave log-densities that are no numbers for {bad} of {len(x)} samples of "
                f"{self.composition}. Check {'the models' if judge is None else 'the function or the classifier given to Rejection'}."
            )
        return ell

    def operand_densities(self, ell: Float[Tensor, "b m"]) -> Generator[Progress, None, Float[Tensor, "b k"]]:
        columns = []
        for operand in self.operands:
            columns.append((yield from operand.density(ell)) if isinstance(operand, _Referee) else ell[:, operand])
        return torch.stack(columns, dim=-1)

    def density(self, ell: Float[Tensor, "b m"]) -> Generator[Progress, None, Float[Tensor, "b"]]:
        """The composition's own log-density, normalised, up to the same constant."""
        own, key = self.composition.formula.value((yield from self.operand_densities(ell))), self.composition.key
        if self.label is None:
            return own
        if key not in self.known:
            _, log_z, error, _ = yield from self.draw(PILOT)
            self.known[key] = log_z, error
            self.said.append(f"log Z of {self.composition}: {log_z:.3f} ± {error:.2g}")
        return own - self.known[key][0]

    def apart(self, x: Tensor) -> Generator[Progress, None, float]:
        """How far two looks at the log-probability of being kept are apart for one sample: standard deviation, in nats."""
        if self.label is None:
            return 0.0
        looks = []
        for _ in range(2):
            ell = yield from self.operand_densities(self.columns(x))
            looks.append(self.formula.value(ell) - ell[:, self.label])
        apart = torch.where(looks[0] == looks[1], 0.0, looks[0] - looks[1])
        return float(apart.square().mean().sqrt()) / math.sqrt(2)

    def propose(self, label: int, n: int) -> Generator[Progress, None, tuple[Tensor, int]]:
        """n samples of an operand, and how many draws of the base models they took."""
        operand = self.operands[label]
        if isinstance(operand, _Referee):
            x, *_, drawn = yield from operand.draw(n)
            return x[:n], drawn
        for progress in self.composition.models[label].stream(n, None, self.settings):
            if progress.samples is None:
                yield progress
        return progress.samples.x, n

    def draw(self, n: int) -> Drawn:
        """At least n samples, log Z of the composition as it is written with its error, and how many draws of the base models it took."""
        if self.label is None:
            choice = picks(self.composition, n, self.settings.generator)
            parts = []
            for i in choice.unique().tolist():
                parts.append((yield from self.propose(i, int((choice == i).sum()))))
            x, drawn = zip(*parts, strict=True)
            return in_order(list(x), choice), 0.0, 0.0, sum(drawn)
        kept, total, drawn, below, expected, label = [], 0, 0, 0, 0.0, self.label
        generator, model = self.settings.generator, self.composition.models[label]
        while total < n:
            # Enough for what is missing at the acceptance seen so far, a little more than too little.
            rate = (total + 1) / (drawn + 4)
            size = int(min(max(64, 1.1 * (n - total) / rate), MOST, self.road.max_draws))
            now = Progress(f"rejection from {model}", 0, None, total, n)
            x, own = yield from _under(now, self.propose(label, size))
            ell = yield from self.operand_densities(self.columns(x))
            log_p = self.formula.value(ell) - ell[:, label] - self.bound
            self._check_bounds(ell)
            log_p = torch.where(log_p.isnan(), -math.inf, log_p)  # where the anchor itself has no density
            u = torch.rand(len(x), generator=generator, dtype=torch.float64, device=generator.device if generator else x.device)
            accepted = x[u.to(x.device).log() < log_p]
            kept.append(accepted)
            total, drawn, below = total + len(accepted), drawn + len(x), below + own
            expected += float(log_p.exp().sum())
            # Where no draw has any chance, no number of them will do.
            if total < n and (drawn >= self.road.max_draws or (not expected and drawn >= MOST)):
                raise RuntimeError(
                    f"Rejection kept {total} of {drawn} draws from {model}, {n} were asked for. The base models hardly overlap where the "
                    "composition lies; ask for fewer samples, raise max_draws, or see sculpt.overlap."
                )
        scale = self.composition.log_scale(label) if isinstance(self.formula, Posterior) else self.bound
        log_z = math.log(expected / drawn) + scale
        return torch.cat(kept), log_z, math.sqrt((1 - total / drawn) / total), below

    def _check_bounds(self, ell: Float[Tensor, "b k"]) -> None:
        """Raise where a factor is over its bound."""
        for k, factor in enumerate(self.composition.own, 1):
            factor.check_bound(ell[:, k])


def _under(now: Progress, run: Generator[Progress, None, T]) -> Generator[Progress, None, T]:
    """Another run, told as where this one is."""
    while True:
        yield now
        try:
            next(run)
        except StopIteration as end:
            return end.value
