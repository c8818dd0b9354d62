"""Training a classifier: the store of base-model samples, the loop, and its state, which a killed run continues from."""

from __future__ import annotations

import abc
import collections
import copy
import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sculpt.base import BaseModel, check_composable
from sculpt.classifier import Batch, Classifier
from sculpt.files import load_folder, save_folder

__all__ = ["Replay", "fit"]


WORSE = 0.01
"""Of all that there is to know, log m nats: by so much may p(y|x) get worse on held-out samples before labels teach it no more."""
PROGRESS = ("step", "best", "best_terminal", "settled", "stale", "history")


class Replay(abc.ABC):
    """A bounded store of base-model samples, drawn once, and the training batches made from it."""

    weights: dict[str, float] = {"terminal": 1.0, "marginal": 1.0, "joint": 1.0}
    """What each of the losses counts."""
    settled = False
    """Whether labels teach the terminal head no more, so that it follows the teacher (where a family has nothing better than labels).
    Set by the training."""

    @abc.abstractmethod
    def draw(self, size: int, generator: torch.Generator, held_out: bool = False) -> Batch:
        """A batch of about ``size`` finished samples per model, from the training or from the held-out part."""

    @abc.abstractmethod
    def default_network(self) -> nn.Module:
        """A backbone for these states, with ``width`` and, so that it can be saved, a JSON ``config``."""

    @property
    def children(self) -> int:
        """How many children a state's features score in one pass; 1 for the state itself."""
        return 1

    @property
    def batch_size(self) -> int:
        """Finished samples per model and step, where the caller does not say."""
        return 256

    def refresh(self, teacher: Classifier, generator: torch.Generator, device: torch.device) -> None:  # noqa: B027
        """Called before the first step and now and then: what a family keeps of the teacher's targets is to be made anew."""

    def losses(
        self,
        classifier: Classifier,
        teacher: Classifier,
        size: int,
        generator: torch.Generator,
        log_odds_range: float,
        device: torch.device,
        held_out: bool = False,
    ) -> dict[str, Tensor]:
        """The classifier's losses on a new batch, ``teacher`` giving the targets. A family that knows better ones overrides it."""
        batch = self.draw(size, generator, held_out).to(device)
        log_odds = draw_log_odds(len(batch.owner), classifier, log_odds_range, generator)
        follow = self.settled and not held_out
        return classifier.losses(batch, teacher, None if log_odds is None else log_odds.to(device), follow=follow)


def draw_log_odds(n: int, classifier, width: float, generator: torch.Generator) -> Float[Tensor, "n m"] | None:
    """Log-odds to train with, from U[-width, width] each; None where the classifier takes none."""
    if not classifier.odds:
        return None
    log_odds = width * (2 * torch.rand(n, classifier.m, generator=generator) - 1)
    # Of two models only the ratio counts; it is to cover the range evenly.
    return torch.stack([log_odds[:, 0], -log_odds[:, 0]], dim=-1) / 2 if classifier.m == 2 else log_odds


@torch.random.fork_rng(devices=[])
def fit(
    models: Sequence[BaseModel],
    observations: int = 2,
    odds: bool | float = False,
    *,
    network: nn.Module | None = None,
    steps: int = 4000,
    batch_size: int | None = None,
    learning_rate: float = 2e-3,
    patience: int | None = 20,
    checkpoint: str | Path | None = None,
    device: torch.device | str | None = None,
    mixed_precision: bool | None = None,
    seed: int = 0,
    progress: bool = True,
    **replay_options,
) -> Classifier:
    r"""Train a classifier for a set of base models: once, for all label sets, odds (``odds=True``) and compositions of them.

    Args:
        models: the base models; their order fixes the labels, their keys are saved.
        observations: n, how many labels one sample may be conditioned on; fewer are fine later.
        odds: whether odds are an input. A number r draws log-odds from U[-r, r] (``True``: 3.5).
        network: a backbone ``(*state) -> (b, width)`` of your own, with an attribute ``width``. For images,
            ``sculpt.diffusion.encoder.UNetEncoder.of(model)`` begins with what a base model's UNet has learned.
        batch_size: finished samples per model and step; by default what suits the family (256 vectors, 64 images).
        patience: stop early after this many of the 40 held-out evaluations without improvement. ``None`` trains to the end and
            keeps the last weights: the sum of held-out losses is not always least where a classifier guides best.
            Few samples are not learned by heart either way: labels teach p(y|x) only while that helps on held-out samples.
        checkpoint: a folder. The state of training is kept there, and a killed run that is called again continues.
        mixed_precision: bfloat16 autocast; by default on a GPU only.
        replay_options: for the family's store of training samples: ``samples`` per model (drawn once, held in a bounded
            cache), ``data`` (your own samples, one tensor per model, instead), sampling ``steps`` as ``sample_steps``;
            ``path`` whether diffusion classifiers learn gradients too (by default for samples of more than 64 numbers);
            ``composed`` whether GFlowNet classifiers see trajectories of compositions too: for models that overlap little.

    Returns the averaged weights with the best held-out loss (or the last); ``classifier.history`` is the training curve.
    """
    models = list(models)
    if len(models) < 2:
        raise ValueError(f"A classifier tells base models apart, got {len(models)}. Pass two or more.")
    check_composable(models)
    for p, q in itertools.combinations(models, 2):
        if p.key == q.key:
            raise ValueError(f"{p} and {q} are the same base model (equal keys). Pass different ones.")
    if observations < 2:
        raise ValueError(f"A classifier observes at least two labels, got observations={observations}.")
    if steps < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError(f"Training needs steps and a batch size of at least 1, got steps={steps} and batch_size={batch_size}.")
    device = torch.device(device or models[0].device)
    mixed_precision = device.type == "cuda" if mixed_precision is None else mixed_precision
    replay = models[0].replay(models, seed=seed, progress=progress, checkpoint=checkpoint, **replay_options)

    batch_size = batch_size or replay.batch_size
    torch.random.default_generator.manual_seed(seed)
    classifier = Classifier(
        copy.deepcopy(network) if network is not None else replay.default_network(),
        [model.key for model in models],
        observations,
        bool(odds),
        children=replay.children,
        names=[str(model) for model in models],
    ).to(device)
    log_odds_range = 3.5 if odds is True else float(odds)
    settings = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "log_odds_range": log_odds_range,
        "seed": seed,
    }
    run = _Training(classifier, settings, replay.weights, checkpoint, keep_last=patience is None)

    every = max(1, steps // 40)
    held_out_batches = max(1, min(8, every // 4))  # a short training is not spent on looking at itself

    def evaluate() -> dict[str, float]:
        # The same held-out states and odds every time, so that the curve has no noise of its own.
        generator = torch.Generator().manual_seed(seed + 1)
        totals = collections.defaultdict(float)
        with torch.no_grad():
            for _ in range(held_out_batches):
                losses = replay.losses(run.average, run.teacher, batch_size, generator, log_odds_range, device, held_out=True)
                for name, loss in losses.items():
                    totals[f"held_out_{name}"] += float(loss) / held_out_batches
        return dict(totals)

    from tqdm.auto import tqdm

    bar = tqdm(total=steps, initial=run.step, desc="fitting the classifier", disable=not progress, delay=2, mininterval=1)
    with bar:
        while run.step < steps and (patience is None or run.stale < patience):
            generator = torch.Generator().manual_seed(_seed_of_step(seed, run.step))
            torch.random.default_generator.manual_seed(_seed_of_step(seed, run.step))  # for a backbone's dropout
            if run.step % every == 0:  # states are kept at these steps, and a resumed run begins with one of them
                replay.refresh(run.teacher, torch.Generator().manual_seed(_seed_of_step(seed + 1, run.step)), device)
            replay.settled = run.settled
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision):
                losses = replay.losses(classifier, run.teacher, batch_size, generator, log_odds_range, device)
            # The targets come from a terminal head that knows nothing at first: what rests on them is ramped in.
            ramp = {"joint": min(1.0, run.step / (0.1 * steps))}
            ramp["path"] = ramp["joint"]
            run.update(sum(ramp.get(name, 1.0) * replay.weights[name] * loss for name, loss in losses.items()))
            bar.update()
            if run.step % every == 0 or run.step == steps:
                run.record({**{name: loss.item() for name, loss in losses.items()}, **evaluate()})
                bar.set_postfix(held_out=f"{run.history[-1]['held_out_joint']:.4f}", best=f"{run.best:.4f}")
    return run.finish()


def _seed_of_step(seed: int, step: int) -> int:
    """Every step has its own seed, so a resumed run draws what the uninterrupted one would have."""
    return (seed + 1) * 1_000_003 + step


class _Training:
    """Weights, their average, the optimiser and the curve; saved as one and resumed as one.

    The average gives the others' targets and learns from labels itself, as long as that helps on held-out samples. A head that knows
    its samples by heart gives all of a model's the same target: so from then on the best average so far is the teacher.
    """

    def __init__(
        self,
        classifier: Classifier,
        settings: dict[str, Any],
        weights: dict[str, float],
        checkpoint: str | Path | None,
        keep_last: bool = False,
    ):
        steps, learning_rate, self.weights = settings["steps"], settings["learning_rate"], weights
        self.classifier, self.average = classifier.train(), copy.deepcopy(classifier).eval().requires_grad_(False)
        self.best_weights = copy.deepcopy(self.average.state_dict())
        self.best_teacher, self.best_terminal, self.settled = copy.deepcopy(self.average), float("inf"), False
        self.optimizer = torch.optim.AdamW(classifier.parameters(), lr=learning_rate, weight_decay=1e-4)
        warm_up = max(1, steps // 20)

        def rate(step: int) -> float:
            return min(1.0, (step + 1) / warm_up) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))

        self.rate, self.learning_rate, self.steps = rate, learning_rate, steps
        self.step, self.best, self.stale, self.history, self.keep_last = 0, float("inf"), 0, [], keep_last
        self.folder = None if checkpoint is None else Path(checkpoint)
        self.identity = {"kind": "training", "version": 2, **settings}
        self.identity["classifier"] = {
            key: value for key, value in classifier.config.items() if key not in ("history", "names")
        }
        self.started = self.saved = time.monotonic()
        if self.folder is not None and (self.folder / "training" / "config.json").exists():
            self.resume()

    @property
    def teacher(self) -> Classifier:
        return self.best_teacher if self.settled else self.average

    def update(self, loss: Tensor) -> None:
        if not loss.isfinite():
            raise FloatingPointError(
                f"The classifier's loss is {loss.item()} at step {self.step}. Lower learning_rate, or look for NaN in the base samples."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * self.rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        try:
            loss.backward()
        except RuntimeError as error:
            if "derivative" not in str(error) and "differentiate twice" not in str(error):
                raise
            raise ValueError(
                f"The gradient of {type(self.classifier.network).__name__} is trained too, and it has no second derivative: {error}. "
                "Pass path=False to train its probabilities alone, or use layers that have one."
            ) from None
        nn.utils.clip_grad_norm_(self.classifier.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        # Short memory at first, then a window of about a tenth of the steps so far.
        decay = min(0.999, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, value in zip(self.average.state_dict().values(), self.classifier.state_dict().values(), strict=True):
                mean.lerp_(value, 1 - decay) if mean.is_floating_point() else mean.copy_(value)

    def record(self, row: dict[str, float]) -> None:
        self.history.append({"step": self.step, **row})
        terminal = row["held_out_terminal"]
        if terminal <= self.best_terminal:
            self.best_terminal, self.settled = terminal, False
            self.best_teacher.load_state_dict(self.average.state_dict())
        elif terminal > self.best_terminal + WORSE * math.log(self.classifier.m):
            self.settled = True
        held_out = sum(weight * row[f"held_out_{name}"] for name, weight in self.weights.items())
        # While the ramp is on, the targets themselves still move: no judgement yet.
        ramping = self.step < 0.15 * self.steps
        if held_out < self.best or ramping or self.keep_last:
            self.best, self.stale = held_out, 0
            self.best_weights = copy.deepcopy(self.average.state_dict())
        else:
            self.stale += 1
        if self.folder is not None and (time.monotonic() - self.saved > 30 or self.step >= self.steps or self.stale):
            self.save()

    def save(self) -> None:
        tensors = {f"weights.{name}": value for name, value in self.classifier.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best_weights.items()}
        tensors |= {f"teacher.{name}": value for name, value in self.best_teacher.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": torch.as_tensor(value) for name, value in state.items()}
        progress = {name: getattr(self, name) for name in PROGRESS}
        save_folder(self.folder / "training", {**self.identity, **progress}, tensors)
        self.saved = time.monotonic()

    def resume(self) -> None:
        config, tensors = load_folder(self.folder / "training", kind="training")
        if wrong := [key for key, value in self.identity.items() if config.get(key) != value]:
            raise ValueError(
                f"{self.folder} holds the training of another classifier: {', '.join(wrong)} differ. "
                "Call fit with the same arguments to continue it, or give another checkpoint folder."
            )

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        self.classifier.load_state_dict(part("weights."))
        self.average.load_state_dict(part("average."))
        self.best_weights = {name: value.to(self.average.state_dict()[name].device) for name, value in part("best.").items()}
        state = collections.defaultdict(dict)
        for name, value in part("optimizer.").items():
            i, _, key = name.partition(".")
            state[int(i)][key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": dict(state)})
        self.best_teacher.load_state_dict(part("teacher."))
        for name in PROGRESS:
            setattr(self, name, config[name])

    def finish(self) -> Classifier:
        self.average.load_state_dict(self.best_weights)
        self.average.history = self.history
        if self.folder is not None:
            self.save()
            self.average.save_pretrained(self.folder)
        return self.average.eval()
