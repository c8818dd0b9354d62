r"""Models that write their samples action by action: the contract of a family, and everything that follows from it.

A family says what its states are, which actions it has, and how probable each is. Every road, training and exact answers then work.

Notation: states s as raw tensors ``(b, *s)``, actions a with the exit last, ``log_pf`` = :math:`\log P(s'|s)` per action and
``log_pb`` = :math:`\log P_B(s|s')` per action that led to s'.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from sculpt.actions.chains import ActionChain, DensityCorrectedChain, GuidedChain, TrackedChain
from sculpt.actions.guidance import Guidance
from sculpt.actions.paths import ONE_PARENT, path_ratios
from sculpt.actions.reading import Memory
from sculpt.actions.students import PolicyStudent
from sculpt.actions.trajectories import TrajectoryStore
from sculpt.chain import Chain, Settings
from sculpt.identity import module_digest
from sculpt.model import BaseModel, Steered, Steppable, operand_names

if TYPE_CHECKING:
    from sculpt.classifier.guide import Guide
    from sculpt.composition import Composition
    from sculpt.factor import Factor
    from sculpt.formula import Formula, Posterior

__all__ = ["ActionModel", "GuidedActions"]


class ActionModel(Steppable):
    """A chain of actions, the last of which ends it. States are tensors; what is written can be unwritten where ``backtrack`` says how.

    A family fills ``name``, ``key``, ``device``, ``shape``, ``n_actions``, ``start``, ``log_pf`` and ``step``; where several states lead to
    one, ``log_pb`` and ``backward_key`` too.

    Example:
        >>> cell = one.start(1)
        >>> one.step(cell, one.log_pf(cell).argmax(-1)).shape  # the most likely action
        torch.Size([1, 2])
    """

    n_actions: int
    """The exit counts, and comes last."""

    longest: int | None = None
    """How many actions come before the exit at most, where that is known: bars then show how far a run is."""

    backward_key: str = ONE_PARENT
    """Equal where two models surely share their backward policy."""

    together: Any = None
    """Models with the same, which is not ``None``, are read in one call."""

    knows_density = True  # exactly where a state has one parent or the flows balance

    @abc.abstractmethod
    def start(self, n: int) -> Shaped[Tensor, "n *s"]:
        """n initial states, in memory of their own."""

    @abc.abstractmethod
    def log_pf(self, states: Shaped[Tensor, "b *s"]) -> Float[Tensor, "b a"]:
        r""":math:`\log P(s'|s)` of every action in float64, minus infinity where it is impossible."""

    @abc.abstractmethod
    def step(self, states: Shaped[Tensor, "b *s"], actions: Int[Tensor, "b"]) -> Shaped[Tensor, "b *s"]:
        """The children by these actions, none of them the exit. The states that were given stay as they are."""

    def read(
        self, models: Sequence[ActionModel], states: Shaped[Tensor, "b *s"], memory: Memory | None
    ) -> tuple[Sequence[Float[Tensor, "b a"]], Memory | None]:
        """:meth:`log_pf` of models that are read ``together``, this one the first of them, and what to keep of these states.

        Args:
            models: these.
            states: all of them a step behind those that were read before.
            memory: what was kept of those; ``None`` at first.
        """
        return [model.log_pf(states) for model in models], None

    def log_p(self, x: Shaped[Tensor, "b *s"]) -> Float[Tensor, "b"] | None:
        """Log-probabilities of finished samples, where a family has a shorter way to them than along their paths. Those of a model that
        learns have gradients."""
        return None

    def notes(self, x: Shaped[Tensor, "b *s"]) -> list[str]:
        """What the diagnostics should say of such samples."""
        return []

    def log_pb(self, states: Shaped[Tensor, "b *s"]) -> Float[Tensor, "b p"]:
        r""":math:`\log P_B(s|s')` of s' = ``states``, per action that may have led there. By default a state has one parent."""
        return torch.zeros(len(states), self.n_actions - 1, dtype=torch.float64, device=states.device)

    def backtrack(
        self, states: Shaped[Tensor, "b *s"], generator: torch.Generator | None = None
    ) -> tuple[Shaped[Tensor, "b *s"], Int[Tensor, "b"]]:
        """Parents of these states, drawn by the backward policy, and the actions that lead from them; none is an initial state."""
        raise NotImplementedError

    def default_network(self) -> nn.Module:
        """A backbone for a classifier of such states."""
        raise ValueError(f"No default classifier network for {self}. Pass network=, a module from states to features.")

    @property
    def one_parent(self) -> bool:
        """Whether one way leads to each state, so that its density is known on the way."""
        return self.backward_key == ONE_PARENT

    # Distillation

    @property
    def module(self) -> nn.Module:
        """The network of a model that learns."""
        raise ValueError(
            f"{type(self).__name__} does not say which network of it learns: define module, with_module and learner."
        )

    def with_module(self, module: nn.Module) -> ActionModel:
        """The same with another network of the same kind."""
        raise ValueError(
            f"{type(self).__name__} does not say which network of it learns: define module, with_module and learner."
        )

    def learner(self, name: str, network: nn.Module | None = None) -> ActionModel:
        """A model of such samples that learns. It begins as a copy of this one where this one's network can be copied.

        Args:
            name: of it.
            network: in the place of a copy, from states to the logits of all actions.
        """
        raise ValueError(
            f"{type(self).__name__} does not say how its compositions are distilled: define module, with_module and learner."
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model as a checkpoint."""
        raise ValueError(f"{type(self).__name__} does not say how it is saved: define save_pretrained(folder).")

    def student(self, composition: BaseModel, road: Any, **options: Any) -> PolicyStudent:
        return PolicyStudent(composition, road, **options)

    @property
    def rules(self) -> str:
        """What two models have to share to be composed, beside the number of actions and the shape of a state."""
        return type(self).__qualname__

    @property
    def batch_size(self) -> int:
        """How many trajectories at a time: at most 2²¹ numbers per table over actions."""
        return max(1, 2**21 // self.n_actions)

    def children(
        self, states: Shaped[Tensor, "b *s"], allowed: Bool[Tensor, "b a"]
    ) -> tuple[Int[Tensor, "c"], Int[Tensor, "c"], Shaped[Tensor, "c *s"]]:
        """Row, action and state of every allowed child; the exit has none."""
        rows, actions = allowed[:, :-1].nonzero(as_tuple=True)
        return rows, actions, self.step(states[rows], actions) if len(rows) else states[rows]

    def check_composable(self, other: BaseModel) -> None:
        if not isinstance(other, ActionModel):
            raise ValueError(f"{self} writes its samples action by action and {other} does not: they have no common states.")
        mine = (
            ("rules", self.rules),
            ("number of actions", self.n_actions),
            ("state shape", self.shape),
            ("device", self.device),
        )
        its = other.rules, other.n_actions, other.shape, other.device
        for (what, p), q in zip(mine, its, strict=True):
            if p != q:
                raise ValueError(
                    f"{self} and {other} cannot be composed: {what} {p} on one side, {q} on the other. "
                    "Base models need the same actions in the same order."
                )

    # What roads ask for

    def chain(self, settings: Settings) -> Chain:
        return ActionChain(self, settings)

    def tracked(
        self,
        formula: Formula,
        models: Sequence[Steppable],
        settings: Settings,
        road: Any = None,
        alone: bool = False,
        factors: Sequence[Factor] = (),
    ) -> Chain:
        if getattr(road, "corrector", None) is not None:
            raise ValueError(f"corrector: {self} has no noise levels to run MCMC at. Leave it out.")
        if getattr(road, "detail", None) is not None:
            raise ValueError(f"detail: {self} has no noise levels to look through. Leave it out.")
        return TrackedChain(formula, models, settings, factors)

    def guided(
        self,
        posterior: Posterior,
        models: Sequence[BaseModel],
        classifier: Guide,
        form: str = "anchored",
        strength: float = 1.0,
    ) -> GuidedActions:
        if strength != 1:
            raise ValueError(
                f"strength multiplies a gradient, and {self} is steered by probabilities of actions; expected 1, got {strength:g}."
            )
        return self.guided_by(Guidance(posterior, models, classifier, form))

    def guided_by(self, guidance: Guidance) -> GuidedActions:
        """The composed model of the family."""
        return GuidedActions(guidance)

    def log_ratios(
        self,
        models: Sequence[BaseModel],
        x: Tensor,
        generator: torch.Generator | None = None,
        *,
        made_by: int = 0,
        detail: float | None = None,
        paths: int | None = None,
    ) -> Tensor:
        if detail is not None:
            raise ValueError(f"detail: {self} has no noise levels. Leave it out.")
        try:
            return path_ratios(models, x, generator, made_by=made_by, paths=paths)
        except NotImplementedError:
            raise ValueError(f"The samples of {self} cannot be traced back to their start: pass a classifier.") from None

    def store(self, models: Sequence[BaseModel], **options: Any) -> TrajectoryStore:
        return TrajectoryStore(models, **options)


class GuidedActions(ActionModel, Steered):
    """A posterior of such models, steered by a classifier: itself a base model again.

    Conditioning a chain on an observation of its end leaves its backward policy as it is, so the anchor's goes on.
    """

    def __init__(self, guidance: Guidance):
        self.guidance, self.anchor = guidance, guidance.anchor
        self.n_actions, self.shape, self.samples_class = self.anchor.n_actions, self.anchor.shape, self.anchor.samples_class
        self.name, self.longest = guidance.posterior.write(operand_names(guidance.models)), self.anchor.longest

    @property
    def key(self) -> str:
        """The same weights are the same model, also when they are loaded again: what was fitted on top of it stays valid."""
        judge, posterior = self.guidance.classifier, self.guidance.posterior
        said = module_digest(judge) if isinstance(judge, nn.Module) else (type(judge).__name__, judge.keys)
        models = [model.key for model in self.guidance.models]
        return hashlib.sha256(repr((posterior.labels, posterior.odds, self.guidance.form, models, said)).encode()).hexdigest()

    @property
    def device(self) -> torch.device:
        return self.anchor.device

    def place(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        for model in self.guidance.models:
            model.place(device, dtype)
        if isinstance(self.guidance.classifier, nn.Module):
            self.guidance.classifier.to(device)  # its heads keep their precision

    @property
    def rules(self) -> str:
        return self.anchor.rules

    @property
    def backward_key(self) -> str:  # type: ignore[override]
        """The anchor's."""
        return self.anchor.backward_key

    @property
    def one_parent(self) -> bool:
        return self.anchor.one_parent

    @property
    def decoder(self) -> Callable[[Tensor], Any] | None:
        return self.anchor.decoder

    def start(self, n):
        return self.anchor.start(n)

    def log_pf(self, states):
        return self.guidance.log_pf(states)

    def read(self, models, states, memory):
        log_p, memory = self.guidance.read(states, memory)
        return [log_p], memory

    def notes(self, x):
        return self.anchor.notes(x)

    def step(self, states, actions):
        return self.anchor.step(states, actions)

    def log_pb(self, states):
        return self.anchor.log_pb(states)

    def backtrack(self, states, generator=None):
        return self.anchor.backtrack(states, generator)

    def default_network(self) -> nn.Module:
        return self.anchor.default_network()

    def learner(self, name: str, network: nn.Module | None = None) -> ActionModel:
        return self.anchor.learner(name, network)

    def guided_by(self, guidance: Guidance) -> GuidedActions:
        return self.anchor.guided_by(guidance)

    def check_composable(self, other: BaseModel) -> None:
        self.anchor.check_composable(other)

    def compose(self, formula: Formula, models: Sequence[BaseModel], *how: Any) -> Composition:
        return self.anchor.compose(formula, models, *how)

    def chain(self, settings: Settings) -> Chain:
        if self.guidance.form == "mixture":
            return ActionChain(self, settings, "classifier, mixture form")
        return GuidedChain(self, settings)

    def corrected(self, settings: Settings, densities: bool) -> Chain:
        if not densities:
            return GuidedChain(self, settings, corrected=True)
        self.guidance.check_densities()
        return DensityCorrectedChain(self, settings)
