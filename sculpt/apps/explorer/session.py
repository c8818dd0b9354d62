"""The logic of the explorer, without widgets: what can be chosen, the code that says it, and runs in the background.

A run composes what the code for copying says, read back from its text, so the two do not drift apart.
"""

from __future__ import annotations

import ast
import contextlib
import re
import threading
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from sculpt.apps.explorer.beside import LogDensities, Shown, beside, drawn, known, so_far, width_of
from sculpt.apps.explorer.names import named, variables
from sculpt.apps.explorer.tables import listed
from sculpt.apps.formulas import compose
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


LOOK, SHOWN = 0.6, 500
"""Seconds between two looks at a run that goes on, and how many samples previews and base models have."""


@dataclass(frozen=True)
class Settings:
    """What is chosen: the observed labels or, instead of them, a formula in text."""

    labels: tuple[int, ...] = (0, 1)
    formula: str | None = None
    odds: tuple[float, ...] | None = None
    """one number for each operand of the formula; ``None`` are equal odds"""
    road: str = "tracked"
    steps: int = 32
    n: int = 16
    seed: int = 0
    beside: bool = True
    """whether base models, and the exact answer where it is known, are shown beside the samples"""


class Run:
    """One run of a session. ``progress`` is the last that it told, ``samples`` what came out."""

    def __init__(self, settings: Settings, notify: Callable[[Run], None]):
        self.settings, self.notify = settings, notify
        self.state: Literal["waiting", "working", "done", "cancelled", "failed"] = "waiting"
        self.progress: Progress | None = None
        self.samples: Samples | None = None
        self.picture: tuple[str, bytes] | None = None
        self.preview: tuple[str, bytes] | None = None
        self.beside: list[Shown] = []
        self.listed = ""
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
        log_p: the models' log-densities, where the caller knows them.
    """

    def __init__(
        self,
        models: Any,
        classifier: Any | None = None,
        scope: Mapping[str, Any] | None = None,
        log_p: LogDensities | None = None,
    ):
        values, self.names, self.given, self.preamble = named(models, scope or {})
        _check(values, classifier)
        self.models: dict[str, BaseModel] = dict(zip(self.names, values, strict=True))
        self.classifier: Guide | None = classifier
        self.classifier_name = variables(scope or {}).get(id(classifier), "classifier")
        self.observations = 3 if classifier is None else classifier.observations
        self.shape, self.takes_steps = values[0].shape, values[0].default_steps is not None
        # Images cost much and points little; what is read has few rows.
        self.usual = 16 if len(self.shape) == 3 else 2000 if values[0].samples_class is Samples else 200
        self.log_p, self._alone, self._half_width = log_p, dict[tuple[int, int, int | None], Samples](), 0.0
        self.run: Run | None = None
        self._turn = threading.Lock()

    # What can be chosen

    def expression(self, settings: Settings) -> str:
        """The composition in text: operators, or a function of sculpt where there are odds."""
        return self._read(settings)[0]

    def composition(self, settings: Settings) -> BaseModel:
        """What is to be sampled."""
        return self._read(settings)[1]

    def said(self, settings: Settings) -> str:
        """The composition as a person names it."""
        given, (text, model, _) = dict(zip(self.names, self.given, strict=True)), self._read(settings)
        if text.startswith("posterior(") and settings.formula is None and isinstance(model, Composition):
            return model.formula.write(self.given)
        return re.sub(r"\w+", lambda word: given.get(word[0], word[0]), text)

    def operands(self, settings: Settings) -> list[str]:
        """The models of the formula that odds belong to, in its order: chains of ``&`` or of ``-`` over base models have odds."""
        return self._read(settings)[2]

    def refuses_odds(self, settings: Settings) -> str:
        """Why odds cannot be turned on the road that is chosen; empty where they can."""
        operands = self.operands(settings)
        if not operands:
            return "odds belong to two or more observed labels of base models."
        turned = replace(settings, odds=(0.3, *[0.7 / (len(operands) - 1)] * (len(operands) - 1)))
        model = self.composition(turned)
        reason = self._reason(settings.road, model) if isinstance(model, Composition) else ""
        return reason and "odds cannot be turned here: " + re.sub(r"\([\d., ]+\) ", "", reason)  # nobody chose the numbers

    def _read(self, settings: Settings) -> tuple[str, BaseModel, list[str]]:
        """The composition in text, itself, and the models that odds belong to."""
        if settings.formula is None:
            labels, names = settings.labels, self.names
            text = _posterior(names, labels, settings.odds)
            own = [names[labels[0]], names[1 - labels[0]]] if len(names) == len(labels) == 2 else names
            return text, compose(text, self.models), own if len(labels) > 1 else []
        text = settings.formula.strip()
        model = compose(text, self.models)
        if not _takes_odds(model):
            return text, model, []
        own = [next(name for name, known in self.models.items() if known is part) for part in model.models]
        if settings.odds is not None:
            text = _posterior(own, model.formula.labels, settings.odds)
            model = compose(text, self.models)
        return text, model, own

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
                if run.state == "done" and run.settings.beside:
                    self._look_beside(run)
            finally:
                run._ended.set()

    def _sample(self, run: Run, began: float) -> None:
        """Go through the steps of a run, as long as it is wanted."""
        run.state, run.code, told, next_look = "working", self.code(run.settings), began, began + LOOK
        model = self.composition(run.settings)
        run.notify(run)
        with contextlib.closing(self.stream(run.settings)) as steps:
            for run.progress in steps:
                if run._stop.is_set():
                    return
                now = time.monotonic()
                run.seconds = now - began
                if now > next_look:
                    run.preview = so_far(model, run.progress, min(run.settings.n, SHOWN), self._half_width) or run.preview
                    next_look = time.monotonic() + max(LOOK, 4 * (time.monotonic() - now))  # a fifth of the time at most
                if now - told > 0.2:
                    told = now
                    run.notify(run)
        if run.progress is None or run.progress.samples is None:
            raise RuntimeError("the run ended without samples.")
        run.samples = run.progress.samples
        run.listed = listed(run.samples)  # first: molecules are drawn with the scores of their table
        run.picture = drawn(run.samples, max(self._half_width, width_of(run.samples)))

    def _look_beside(self, run: Run) -> None:
        """Sample the base models of the formula alone, each once, and ask for the exact answer. Whatever fails here is left out."""
        model, settings = self.composition(run.settings), run.settings
        if not isinstance(model, Composition) or run.samples is None:
            return
        models, alone = list(self.models.values()), dict[str, Samples]()
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            for given, leaf in zip(self.given, models, strict=True):
                if any(leaf is used for used in model.leaves):
                    if (found := self._by_itself(leaf, settings, run._stop)) is None:
                        return
                    alone[given] = found
            self._half_width = width_of(*alone.values())
            half_width = max(self._half_width, width_of(run.samples))
            if answer := known(models, self.log_p, half_width):
                half_width = answer.half_width
            exact = None if answer is None else answer.picture(model, models)
            run.beside = beside(alone, exact, half_width)
            run.picture = drawn(run.samples, half_width) if half_width else run.picture
        if run.beside:
            run.notify(run)

    def _by_itself(self, leaf: BaseModel, settings: Settings, stop: threading.Event) -> Samples | None:
        """Samples of a base model, kept for the next time; ``None`` where the run is not wanted any more."""
        n, steps = min(settings.n, SHOWN), settings.steps if self.takes_steps else None
        if (key := (id(leaf), n, steps)) not in self._alone:
            with contextlib.closing(leaf.run(n, steps=steps, generator=torch.Generator().manual_seed(0))) as stream:
                for progress in stream:
                    if stop.is_set():
                        return None
                    if progress.samples is not None:
                        self._alone[key] = progress.samples
        return self._alone[key]


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
    if odds is None and tuple(labels) == tuple(range(len(names))):
        return " & ".join(names)
    if len(names) == len(labels) == 2:
        i, j = labels[0], 1 - labels[0]
        function, operator = ("contrast", "-") if labels[0] == labels[1] else ("harmonic_mean", "&")
        if odds is None:
            return f"{names[i]} {operator} {names[j]}"
        return f"{function}({names[i]}, {names[j]}, odds={round(odds[0] / sum(odds), 6)})"
    models, ending = ", ".join(names), "" if odds is None else f", odds={[round(v, 6) for v in odds]}"
    return f"posterior([{models}], labels={list(labels)}{ending})"
