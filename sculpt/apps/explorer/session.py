"""The logic of the explorer, without widgets: what can be chosen, the code that says it, and runs in the background.

A run composes what the code for copying says, read back from its text, so the two do not drift apart.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import keyword
import re
import threading
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sculpt.apps.formulas import FUNCTIONS, compose
from sculpt.chain import Progress
from sculpt.classifier.guide import Guide
from sculpt.composition import Composition
from sculpt.formula import Posterior
from sculpt.model import BaseModel, check_composable, same_model
from sculpt.roads import Guided, Rejection, Road, Tracked
from sculpt.samples import Samples

__all__ = ["ROADS", "Run", "Session", "Settings"]

ROADS = {
    "guided": "guided",
    "corrected": "guided, corrected",
    "tracked": "tracked densities",
    "rejection": "rejection",
}


@dataclass(frozen=True)
class Settings:
    """What is chosen: the observed labels or, instead of them, a formula in text."""

    labels: tuple[int, ...] = (0, 1)
    formula: str | None = None
    odds: tuple[float, ...] | None = None
    """one number per model; ``None`` are equal odds"""
    road: str = "tracked"
    steps: int = 32
    n: int = 16
    seed: int = 0


class Run:
    """One run of a session. ``progress`` is the last that it told, ``samples`` what came out."""

    def __init__(self, settings: Settings, notify: Callable[[Run], None]):
        self.settings, self.notify = settings, notify
        self.state: Literal["waiting", "working", "done", "cancelled", "failed"] = "waiting"
        self.progress: Progress | None = None
        self.samples: Samples | None = None
        self.picture: tuple[str, bytes] | None = None
        self.code = self.error = ""
        self.notes: list[str] = []
        self.seconds = 0.0
        self._stop, self._ended = threading.Event(), threading.Event()

    def cancel(self) -> None:
        """Stop at the end of the step that it is at."""
        self._stop.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end; whether it has come."""
        return self._ended.wait(timeout)


class Session:
    """Models, the names by which code knows them, and at most one run at a time.

    Args:
        models: two or more base models, or by name; or a composition, whose models they are then.
        classifier: of these models, for the guided roads.
        scope: the variables that code for these models may name.
    """

    def __init__(self, models: Any, classifier: Any | None = None, scope: Mapping[str, Any] | None = None):
        values, self.names, self.preamble = _named(models, scope or {})
        _check(values, classifier)
        self.models: dict[str, BaseModel] = dict(zip(self.names, values, strict=True))
        self.classifier: Guide | None = classifier
        self.classifier_name = _variables(scope or {}).get(id(classifier), "classifier")
        self.observations = 3 if classifier is None else classifier.observations
        self.shape, self.takes_steps = values[0].shape, values[0].default_steps is not None
        self.run: Run | None = None
        self._turn = threading.Lock()

    # What can be chosen

    def expression(self, settings: Settings) -> str:
        """The composition in text: operators, or a function of sculpt where there are odds."""
        return self._read(settings)[0]

    def composition(self, settings: Settings) -> BaseModel:
        """What is to be sampled."""
        return self._read(settings)[1]

    def takes_odds(self, settings: Settings) -> bool:
        """Odds belong to observed labels: chains of ``&`` or of ``-`` over base models."""
        return self._read(settings)[2]

    def _read(self, settings: Settings) -> tuple[str, BaseModel, bool]:
        """The composition in text, itself, and whether it takes odds."""
        if settings.formula is None:
            text = _posterior(self.names, settings.labels, settings.odds)
            return text, compose(text, self.models), len(settings.labels) > 1
        text = settings.formula.strip()
        model = compose(text, self.models)
        if not _takes_odds(model):
            return text, model, False
        if settings.odds is not None:
            index = [next(i for i, own in enumerate(self.models.values()) if own is part) for part in model.models]
            odds = [settings.odds[i] for i in index]
            text = _posterior([self.names[i] for i in index], model.formula.labels, odds)
            model = compose(text, self.models)
        return text, model, True

    def roads(self, settings: Settings) -> dict[str, str]:
        """For every road why it cannot be taken; an empty reason where it can."""
        composition = self.composition(settings)
        if not isinstance(composition, Composition):
            alone = dict.fromkeys(("guided", "corrected"), "one model alone needs no classifier.")
            return alone | {"tracked": "", "rejection": "one model alone has nothing to reject."}
        return {name: self._reason(name, composition) for name in ROADS}

    def _reason(self, name: str, composition: Composition) -> str:
        try:
            self._road(name, composition)[0].check(composition)
        except ValueError as error:
            return str(error)
        return ""

    def _road(self, name: str, composition: Composition) -> tuple[Road, str]:
        """A road, and how code writes it."""
        guide, called = self.classifier, self.classifier_name
        if name == "tracked":
            return Tracked(), ""
        if name == "rejection":
            known = composition.knows_density
            return Rejection(None if known else guide), f"sculpt.Rejection({'' if known else called})"
        if name not in ROADS:
            raise ValueError(f"There is no road {name!r}; there are {', '.join(ROADS)}.")
        if guide is None:
            raise ValueError("needs a classifier: explore(models, classifier), from sculpt.fit(models).")
        if name == "corrected":
            return Guided(guide, correct=True), f"sculpt.Guided({called}, correct=True)"
        return Guided(guide), f"sculpt.Guided({called})"

    def _way(self, settings: Settings, model: BaseModel) -> tuple[Road | None, str]:
        return self._road(settings.road, model) if isinstance(model, Composition) else (None, "")

    def code(self, settings: Settings) -> str:
        """Python that gives these samples again."""
        text, model, _ = self._read(settings)
        tree = ast.parse(text, mode="eval")
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            call.func = ast.Attribute(ast.Name("sculpt"), ast.unparse(call.func))
        text, road = ast.unparse(tree), self._way(settings, model)[1]
        arguments = [str(settings.n), *([road] if road else []), *([f"steps={settings.steps}"] if self.takes_steps else [])]
        arguments.append(f"generator=torch.Generator().manual_seed({settings.seed})")
        of = f"({text})" if isinstance(tree.body, ast.BinOp) else text
        return "\n".join(["import sculpt, torch", *self.preamble, f"samples = {of}.sample({', '.join(arguments)})"])

    def stream(self, settings: Settings) -> Generator[Progress, None, None]:
        """The run that :meth:`code` writes. Close it and nothing goes on."""
        model = self.composition(settings)
        steps, generator = settings.steps if self.takes_steps else None, torch.Generator().manual_seed(settings.seed)
        yield from model.run(settings.n, self._way(settings, model)[0], steps=steps, generator=generator)

    # Runs

    def start(self, settings: Settings, notify: Callable[[Run], None] = lambda run: None) -> Run:
        """Cancel what runs and sample in the background. ``notify`` is called from there: a few times a second, and at the end."""
        self.cancel()
        self.run = run = Run(settings, notify)
        threading.Thread(target=self._work, args=(run,), daemon=True, name="sculpt.explore").start()
        return run

    def cancel(self) -> None:
        """Cancel what runs, if anything does."""
        if self.run is not None:
            self.run.cancel()

    def _work(self, run: Run) -> None:
        with self._turn:  # the run before ends after its step
            began = time.monotonic()
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("default")
                    if not run._stop.is_set():
                        self._sample(run, began)
                run.notes = [str(warning.message) for warning in caught if warning.category is UserWarning]
                run.state = "done" if run.picture else "cancelled"
            except Exception as error:  # whatever it is belongs into the cell, and the next run may do better
                run.state, run.error = "failed", f"{type(error).__name__}: {error}"
            run.seconds = time.monotonic() - began
            try:
                run.notify(run)
            finally:
                run._ended.set()

    def _sample(self, run: Run, began: float) -> None:
        """Go through the steps of a run, as long as it is wanted."""
        run.state, run.code, told = "working", self.code(run.settings), began
        run.notify(run)
        with contextlib.closing(self.stream(run.settings)) as steps:
            for run.progress in steps:
                if run._stop.is_set():
                    return
                now = time.monotonic()
                run.seconds = now - began
                if now - told > 0.2:
                    told = now
                    run.notify(run)
        if run.progress is None or run.progress.samples is None:
            raise RuntimeError("the run ended without samples.")
        run.samples = run.progress.samples
        run.picture = run.samples.picture()


def _check(models: Sequence[Any], classifier: Any) -> None:
    """Raise where these cannot be explored."""
    if len(models) < 2:
        raise ValueError(f"Exploring takes two or more base models, got {len(models)}. Pass a list, explore([p, q]).")
    for model in models:
        if not isinstance(model, BaseModel) or isinstance(model, Composition):
            raise TypeError(
                f"explore takes base models and composes them itself, got {model!r:.200}. "
                "Wrap a network in a base model of sculpt, or pass what sculpt.load gives."
            )
    check_composable(models)
    for i, model in enumerate(models):
        if any(same_model(model, other) for other in models[:i]):
            raise ValueError(f"{model} is there twice (the same weights and configuration). Pass different models.")
    if classifier is not None:
        if not isinstance(classifier, Guide):
            raise TypeError(f"The classifier comes from sculpt.fit or sculpt.load, got {classifier!r:.200}.")
        classifier.align(Posterior(len(models), (0,)), models)


def _takes_odds(model: BaseModel) -> bool:
    plain = isinstance(model, Composition) and model.operator in ("&", "-") and len(model.models) > 1
    return plain and not any(inner.models for inner in model.models)


def _posterior(names: Sequence[str], labels: Sequence[int], odds: Sequence[float] | None) -> str:
    if len(labels) == 1:
        return names[labels[0]]
    if len(names) == len(labels) == 2:
        i, j = labels[0], 1 - labels[0]
        function, operator = ("contrast", "-") if labels[0] == labels[1] else ("harmonic_mean", "&")
        if odds is None:
            return f"{names[i]} {operator} {names[j]}"
        return f"{function}({names[i]}, {names[j]}, odds={round(odds[i] / sum(odds), 6)})"
    models, ending = ", ".join(names), "" if odds is None else f", odds={[round(v, 6) for v in odds]}"
    return f"posterior([{models}], labels={list(labels)}{ending})"


# The names of models


_TAKEN = ("sculpt", "torch", "samples", *FUNCTIONS)
"""the words of the code"""


def _variables(scope: Mapping[str, Any]) -> dict[int, str]:
    return {id(value): name for name, value in scope.items() if not name.startswith("_") and name not in _TAKEN}


def _named(models: Any, scope: Mapping[str, Any]) -> tuple[list[Any], list[str], list[str]]:
    """Models, a name for each, and the lines of code that make them known by it."""
    if isinstance(models, BaseModel):
        models = list(models.leaves)
    elif not isinstance(models, Mapping | Sequence) or isinstance(models, str):
        raise TypeError(f"explore takes a list of base models, or a dictionary of them by name; got {models!r:.200}.")
    values = list(models.values()) if isinstance(models, Mapping) else list(models)
    variables = _variables(scope)
    own = [variables.get(id(model), "") for model in values]
    if isinstance(models, Mapping):
        wished = [str(name) for name in models]
    else:
        wished = own if all(own) and len(set(own)) == len(own) else [str(model) for model in values]
    names: list[str] = []
    for wish in wished:
        name = re.sub(r"\W", "_", wish)
        if not name.isidentifier() or keyword.iskeyword(name) or name in _TAKEN:
            name = f"p_{name}"[:24]
        candidates = itertools.chain([name], (f"{name}_{k}" for k in itertools.count(2)))
        names.append(next(candidate for candidate in candidates if candidate not in names))
    if own == names:
        return values, names, []
    whole = variables.get(id(models))
    if whole is None:
        return values, names, [f"# {', '.join(names)}: the models that sculpt.explore was given"]
    return values, names, [f"{', '.join(names)} = {whole}" + ".values()" * isinstance(models, Mapping)]
