"""Training that may be killed at any time: the one loop of ``sculpt.fit`` and of the recipes in ``pretrained/``.

The loop is a generator, so logging, evaluation, saving and early stopping stay with the caller:

.. code-block:: python

    training = Training(network, torch.optim.Adam(network.parameters(), 1e-3), folder, identity={"name": "cyan", "steps": steps})
    training.resume(buffer=buffer)
    for row in training.run(loss, steps):
        if training.step % 100 == 0:
            training.save()
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn

from sculpt.files import remove_debris, replace_file
from sculpt.resuming import FORMAT, Kept, fit_in, note_of, read_state, state_path
from sculpt.weights import Weights

__all__ = ["Kept", "Training", "clock_of", "constant", "cosine", "halved", "mean", "read_state", "seed_of_step"]

N = TypeVar("N", bound=nn.Module)

Row = dict[str, Any]
"""Numbers to log. Those of a step may still be tensors, so that a GPU is not waited for; :func:`mean` makes floats of them."""
Loss = Callable[[int], tuple[Tensor, Row]]
"""From the seed of a step to the loss of a batch that is drawn with it, and what else to log."""


class Training(Generic[N]):
    r"""A network, its average, its optimiser and how far they are.

    The average forgets quickly at first, and remembers about a tenth of the steps so far:

    .. math:: \bar\theta \leftarrow d \, \bar\theta + (1 - d) \, \theta, \qquad d = \min \bigl( \text{decay}, \tfrac{1 + k}{10 + k} \bigr)

    Every step k has a seed of its own, and all that the next step depends on is in one file, which is replaced as a whole. So a killed
    training ends with the same bits as one that was not killed.

    Args:
        network: what is trained, on its device already.
        optimizer: over the network's parameters, and over others that are kept (:meth:`resume`).
        folder: where the state is kept; ``None`` keeps none.
        identity: JSON settings that the result depends on. A state with other ones is refused.
        rate: from the step to the factor of the optimiser's learning rates.
        clip: the largest norm of the network's gradient; larger ones are scaled down to it.
        decay: of the average.
        seed: where the seeds of the steps begin.
        threads: how many shares of a batch are computed side by side, each by one thread; their gradients are averaged.
        bfloat16: whether the loss is computed under autocast to bfloat16.
    """

    def __init__(
        self,
        network: N,
        optimizer: torch.optim.Optimizer,
        folder: str | Path | None = None,
        *,
        identity: Mapping[str, Any] | None = None,
        rate: Callable[[int], float] | None = None,
        clip: float = math.inf,
        decay: float = 0.999,
        seed: int = 0,
        threads: int = 1,
        bfloat16: bool = False,
    ):
        self.network, self.optimizer = network.train(), optimizer
        self.average = copy.deepcopy(network).requires_grad_(False).eval()
        self.folder = None if folder is None else Path(folder)
        self.identity: dict[str, Any] = json.loads(json.dumps(dict(identity or {})))
        self.rate, self.clip, self.decay, self.seed = rate or constant, clip, decay, seed
        self.threads, self.bfloat16 = threads, bfloat16
        self.step, self.seconds = 0, 0.0
        self.curve: list[Row] = []
        """Rows that the caller wants kept, such as evaluations."""
        self.device = next(network.parameters()).device
        self.parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._kept: dict[str, Kept] = {"network": self.network, "average": self.average}
        self._saved = time.monotonic()

    # The loop

    def run(self, loss: Loss, steps: int) -> Iterator[Row]:
        """Train until so many steps have been taken in all; yield a row after each. A loop that is left can be entered again.

        Args:
            loss: takes the seed of a step (with threads, of a share of it) and gives the loss of its batch and what else to log.
            steps: the number of the last step.
        """
        clock = clock_of(self.device)
        with ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            each: Callable[..., Any] = pool.map if self.threads > 1 else map
            while self.step < steps:
                started = clock()
                seeds = [seed_of_step(self.seed, self.step * self.threads + i) for i in range(self.threads)]
                torch.default_generator.manual_seed(seeds[0])  # for dropout
                gradients, rows = zip(*each(lambda seed: self._gradients(loss, seed), seeds), strict=True)
                norm = self._update(gradients)
                self.seconds += clock() - started
                yield mean(rows) | {"norm": norm}

    def _gradients(self, loss: Loss, seed: int) -> tuple[tuple[Tensor | None, ...], Row]:
        """Of one share of a batch, and what to log of it."""
        # Threads share autocast's cache, and the first one to end would clear it.
        with torch.autocast(self.device.type, torch.bfloat16, self.bfloat16, cache_enabled=self.threads == 1):
            value, row = loss(seed)
        if not value.isfinite():
            raise FloatingPointError(
                f"The loss is {value.item()} at step {self.step}; the last saved state is untouched. Lower the learning rate, or look for "
                "NaN in the samples."
            )
        row = {"loss": value.item(), **row}
        try:
            if self.threads > 1:
                return torch.autograd.grad(value, self.parameters, allow_unused=True), row
            # The whole graph: a derivative with respect to the parameters alone passes over layers that have no second one.
            self.optimizer.zero_grad(set_to_none=True)
            value.backward()
            return tuple(parameter.grad for parameter in self.parameters), row
        except RuntimeError as error:
            if "derivative" not in str(error) and "differentiate twice" not in str(error):
                raise
            raise ValueError(
                f"The loss contains a gradient of {type(self.network).__name__}, which has no second derivative: {error}. "
                "Use layers that have one, or train without that loss (sculpt.fit: path=False)."
            ) from None

    def _update(self, gradients: Sequence[Sequence[Tensor | None]]) -> Tensor:
        """One step of the optimiser and of the average; returns the gradient's norm."""
        if self.threads > 1:
            for parameter, *shares in zip(self.parameters, *gradients, strict=True):
                parts = [part for part in shares if part is not None]
                # Laid out as the parameter is: fused optimisers want that, and cuDNN does not always do it.
                parameter.grad = torch.empty_like(parameter).copy_(sum(parts) / self.threads) if parts else None
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.rate(self.step)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        self.optimizer.step()
        self.step += 1
        self._follow(min(self.decay, (1 + self.step) / (10 + self.step)))
        return norm

    @torch.no_grad()
    def _follow(self, decay: float) -> None:
        """Move the average; what is no floating-point number is copied."""
        twins = zip(self.average.state_dict().values(), self.network.state_dict().values(), strict=True)
        pairs = list({average.data_ptr(): (average, value) for average, value in twins}.values())  # tied weights have two names
        averages, values = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
        torch._foreach_lerp_(averages, values, 1 - decay)
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)

    # The state

    def save(self, every: float = 0.0) -> None:
        """Write the state, unless it was written less than ``every`` seconds ago."""
        if self.folder is None or time.monotonic() - self._saved < every:
            return
        parts: dict[str, Mapping[str, Any]] = {name: kept.state_dict() for name, kept in self._kept.items()}
        parts |= {f"optimizer.{i}": state for i, state in self.optimizer.state_dict()["state"].items()}
        tensors, seen = {}, set()
        for part, values in parts.items():
            for name, value in values.items():
                tensor = torch.as_tensor(value).detach().cpu().contiguous()
                # Tied weights have two names, and a file has no shared tensors.
                tensors[f"{part}/{name}"] = tensor.clone() if tensor.data_ptr() in seen else tensor
                seen.add(tensor.data_ptr())
        about = {"step": self.step, "seconds": self.seconds, "curve": self.curve, "tensors": len(tensors)}
        note = json.dumps({"format": FORMAT, "identity": self.identity, **about})
        replace_file(state_path(self.folder), save(tensors, {"training": note}))
        self._saved = time.monotonic()

    def resume(self, **kept: Kept) -> bool:
        """Continue from the saved state; ``False`` where there is none.

        Args:
            kept: what else belongs to the state, by name: buffers of samples, other weights, parameters beside the network's.
        """
        self._kept |= kept
        if self.folder is None:
            return False
        remove_debris(self.folder)
        path = state_path(self.folder)
        if not path.exists():
            return False
        weights = Weights(path)
        note = note_of(weights)
        self._check_identity(note["identity"])
        fit_in(weights, self._kept, self.optimizer)
        self.step, self.seconds, self.curve = note["step"], note["seconds"], note["curve"]
        return True

    def _check_identity(self, saved: dict[str, Any]) -> None:
        names = [name for name in {**self.identity, **saved} if self.identity.get(name) != saved.get(name)]
        if names:
            said = ", ".join(
                f"{name:.60} is {saved.get(name)!r:.60} there and {self.identity.get(name)!r:.60} here" for name in names[:8]
            )
            raise ValueError(
                f"{self.folder} holds another training: {said}. Start it with the same settings to continue it, or give another folder."
            )


def seed_of_step(seed: int, step: int) -> int:
    """Every step has its own seed, so a resumed training draws what the uninterrupted one would have."""
    return (seed + 1) * 1_000_003 + step


def constant(step: int) -> float:
    """The learning rate stays as it is."""
    return 1.0


def cosine(steps: int, warm_up: int = 1, least: float = 0.0, hold: float = 0.0) -> Callable[[int], float]:
    """A learning rate that rises, stays, and falls along half a cosine.

    Args:
        steps: of the whole training.
        warm_up: steps until the rate is whole.
        least: the share of the rate that is left in the end.
        hold: the share of the steps after which it begins to fall.
    """

    def rate(step: int) -> float:
        way = min(1.0, max(0.0, step / steps - hold) / (1 - hold))
        return min(1.0, (step + 1) / warm_up) * (least + (1 - least) * 0.5 * (1 + math.cos(math.pi * way)))

    return rate


@torch.no_grad()
def halved(network: N) -> N:
    """The same network with weights that half precision can hold: what is saved so is what was there."""
    for parameter in network.parameters():
        parameter.copy_(parameter.half())
    return network


def mean(rows: Sequence[Row]) -> dict[str, float]:
    """The mean of rows of the same entries."""
    return {name: float(sum(row[name] for row in rows)) / len(rows) for name in rows[0]}


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds of the processor on a CPU; a GPU works beside that, and goes by the clock."""
    return time.process_time if device.type == "cpu" else time.monotonic
