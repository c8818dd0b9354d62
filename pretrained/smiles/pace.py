"""Training for so many minutes: the number of steps follows from the speed of the first ones, and is kept with the state."""

import time
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from sculpt.training import Row, Training, mean

UNKNOWN = 2**40


class Pace:
    """How many steps there will be.

    Once a twentieth of the time has passed, as many as fit in. Until half of them are done it looks again, since a machine that is
    shared changes its speed; after that they only become fewer, where they would come too late.

    Args:
        minutes: by the clock, of all runs together.
        steps: their number, if it does not depend on the clock.
    """

    def __init__(self, minutes: float | None, steps: int | None):
        self.budget, self.steps = 60 * (minutes or 0), steps or UNKNOWN
        self.fixed = steps is not None
        self.before, self.started = 0.0, time.monotonic()
        self.mark: tuple[int, float] | None = None

    @property
    def spent(self) -> float:
        """Seconds."""
        return self.before + time.monotonic() - self.started

    def state_dict(self) -> dict[str, Any]:
        return {"steps": torch.tensor(self.steps), "spent": torch.tensor(self.spent, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.steps, self.before = int(state["steps"]), float(state["spent"])

    def look(self, step: int) -> None:
        if self.fixed:
            return
        now = self.spent
        if self.mark is None or step < 5:  # the first steps are slow
            self.mark = (step, now)
        elif now - self.mark[1] > self.budget / 20:
            fit = step + max(1, int((self.budget - now) * (step - self.mark[0]) / (now - self.mark[1])))
            if fit < self.steps or step < self.steps / 2:
                self.steps = fit
            self.mark = (step, now)


class Recipe(Protocol):
    """How a network is trained."""

    name: str
    pace: Pace
    training: Training

    def loss(self, seed: int) -> tuple[Tensor, Row]: ...

    def evaluate(self) -> Row: ...


def train(recipe: Recipe, say: Any, *, report: int = 100, checks: int = 5, keep: float = 30.0) -> None:
    """Train to the end; print, evaluate and save on the way."""
    training, pace, rows = recipe.training, recipe.pace, []
    share = training.step * checks // pace.steps
    while training.step < pace.steps:
        planned = pace.steps
        for row in training.run(recipe.loss, planned):
            rows.append(row)
            pace.look(training.step)
            done = training.step >= pace.steps
            if done or training.step % report == 0:
                say(recipe, mean(rows))
                rows = []
            if done or (training.step * checks // pace.steps > share and (pace.fixed or pace.spent < 0.9 * pace.budget)):
                share = training.step * checks // pace.steps
                training.save()  # an evaluation takes its time, too
                training.curve.append({"step": training.step, **recipe.evaluate()})
                say(recipe, training.curve[-1])
                pace.mark = None
            training.save(every=0.0 if done else keep)
            if done or pace.steps != planned:
                break
