"""``sculpt.explore``: turn the knobs of a composition in a notebook, and see its samples.

:class:`Session` is the logic: what can be chosen, the code that says it, and runs in the background. :class:`View` shows one with
ipywidgets. A run composes what the code for copying says, read back from its text, so the two do not drift apart.
"""

from __future__ import annotations

import ast
import copy
import functools
import html
import inspect
import io
import itertools
import keyword
import re
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sculpt.base import BaseModel, check_composable, same_model
from sculpt.classifier import Guide
from sculpt.cli.formulas import FUNCTIONS, compose
from sculpt.composition import Composition
from sculpt.formula import Mixture, Posterior
from sculpt.particles import Samples
from sculpt.rejection import reject

__all__ = ["explore", "Notice", "Run", "Session", "Settings", "View", "picture"]

ROADS = {
    "guided": "guided",
    "corrected": "guided, corrected",
    "tracked": "tracked densities",
    "rejection": "rejection",
}


def explore(
    models: BaseModel | Sequence[BaseModel] | Mapping[str, BaseModel] | Any, classifier: Guide | Any | None = None
) -> View | Notice:
    """Compose models by clicking, in JupyterLab or Voilà: formula, odds, road, steps; samples, diagnostics, and the code for them.

    Args:
        models: two or more base models of one family, or by name, ``{"p": model, "q": model}``. Without names they are called
            as the variables that hold them.
        classifier: of these models, for the guided roads.

    What is wrong with them stands in the cell instead of the explorer. Needs ipywidgets, ``pip install 'sculpt[notebook]'``.
    """
    caller = inspect.currentframe().f_back
    try:
        return View(Session(models, classifier, {**caller.f_globals, **caller.f_locals}))
    except (ImportError, TypeError, ValueError) as error:
        return Notice(str(error))


@dataclass(frozen=True)
class Notice:
    """A message where an explorer would have been."""

    message: str

    def __repr__(self) -> str:
        return f"sculpt.explore: {self.message}"

    def _repr_html_(self) -> str:
        return f'<div style="{_BOX}; border-color: {_RED}"><b>sculpt.explore</b><br>{html.escape(self.message)}</div>'


# ---------------------------------------------------------------------------------------------------------------------- logic


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


class Cancelled(Exception):
    """Raised inside a run that is no longer wanted, before its next call of a network."""


class Run:
    """One run of a session: ``state`` is waiting, working, done, cancelled or failed."""

    def __init__(self, settings: Settings, notify: Callable[[Run], None]):
        self.settings, self.notify, self.state = settings, notify, "waiting"
        self.samples: Samples | None = None
        self.picture: tuple[str, bytes] | None = None
        self.code = self.error = ""
        self.notes: list[str] = []
        self.calls = self.step = 0
        self.level: float | None = None
        self.began = self.told = time.monotonic()
        self.seconds = 0.0
        self._stop, self._ended = threading.Event(), threading.Event()

    def cancel(self) -> None:
        """Stop before the next call of a network."""
        self._stop.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end; whether it has come."""
        return self._ended.wait(timeout)


class Session:
    """Models, the names by which code knows them, and at most one run at a time.

    Samplers are not interrupted: every base model is a twin of the given one that looks whether its run is still wanted before
    each call of its network, and counts the call.
    """

    def __init__(self, models: Any, classifier: Any | None = None, scope: Mapping[str, Any] | None = None):
        self.models, self.names, self.preamble = _named(models, scope or {})
        if len(self.models) < 2:
            raise ValueError(f"Exploring takes two or more base models, got {len(self.models)}. Pass a list, explore([p, q]).")
        for model in self.models:
            if not isinstance(model, BaseModel) or isinstance(model, Composition):
                raise TypeError(
                    f"explore takes base models and composes them itself, got {model!r:.200}. "
                    "Wrap a network in sculpt.Diffusion or sculpt.GFlowNet, or pass what sculpt.load gives."
                )
        check_composable(self.models)
        for i, model in enumerate(self.models):
            if any(same_model(model, other) for other in self.models[:i]):
                raise ValueError(f"{model} is there twice (the same weights and configuration). Pass different models.")
        if classifier is not None:
            if not isinstance(classifier, Guide):
                raise TypeError(f"The classifier comes from sculpt.fit or sculpt.load, got {classifier!r:.200}.")
            classifier.align(Posterior(len(self.models), (0,)), self.models)
        self.classifier = classifier
        self.classifier_name = _variables(scope or {}).get(id(classifier), "classifier")
        self.family = self.models[0].family
        self.observations = classifier.observations if classifier is not None else 3
        self.twins = {name: _watched(model, self._tick) for name, model in zip(self.names, self.models, strict=True)}
        self.run: Run | None = None
        self._running: Run | None = None
        self._turn = threading.Lock()

    # What can be chosen

    def expression(self, settings: Settings) -> str:
        """The composition in text: operators, or a function of sculpt where there are odds."""
        if settings.formula is None:
            return _posterior(self.names, settings.labels, settings.odds)
        composition = compose(settings.formula, self.twins)
        if settings.odds is None or not self.takes_odds(settings):
            return settings.formula.strip()
        position = {id(twin): i for i, twin in enumerate(self.twins.values())}
        which = [position[id(model)] for model in composition.models]
        return _posterior([self.names[i] for i in which], composition.formula.labels, [settings.odds[i] for i in which])

    def composition(self, settings: Settings) -> BaseModel:
        """What is to be sampled."""
        return compose(self.expression(settings), self.twins)

    def takes_odds(self, settings: Settings) -> bool:
        """Odds belong to observed labels: chains of ``&`` or of ``-`` over base models."""
        if settings.formula is None:
            return len(settings.labels) > 1
        composition = compose(settings.formula, self.twins)
        plain = isinstance(composition, Composition) and composition.operator in ("&", "-") and len(composition.models) > 1
        return plain and not any(isinstance(model, Composition) for model in composition.models)

    def roads(self, settings: Settings) -> dict[str, str]:
        """For every road why it cannot be taken; an empty reason where it can."""
        composition = self.composition(settings)
        reasons = dict.fromkeys(ROADS, "")
        try:
            if not isinstance(composition, Composition):
                raise ValueError("one model alone needs no classifier.")
            if self.classifier is None:
                raise ValueError("needs a classifier: explore(models, classifier), from sculpt.fit(models).")
            composition.guided(self.classifier)
            if settings.odds and self.takes_odds(settings) and not getattr(self.classifier, "odds", True):
                raise ValueError("these odds need a classifier that takes them: sculpt.fit(models, odds=True).")
        except ValueError as error:
            reasons["guided"] = reasons["corrected"] = str(error)
        if not isinstance(composition, Composition):
            reasons["rejection"] = "one model alone has nothing to reject."
        elif not isinstance(composition.formula, Posterior | Mixture):
            reasons["rejection"] = "is for posteriors and mixtures."
        elif self.family == "diffusion" and self.classifier is None:
            reasons["rejection"] = "needs a classifier."
        return reasons

    def code(self, settings: Settings) -> str:
        """Python that gives these samples again."""
        tree = ast.parse(self.expression(settings), mode="eval")
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            call.func = ast.Attribute(ast.Name("sculpt"), call.func.id)
        text = ast.unparse(tree)
        guide, options = self._arguments(settings)
        arguments = [str(settings.n), *[self.classifier_name for _ in guide], *[f"{name}={x}" for name, x in options.items()]]
        arguments.append(f"generator=torch.Generator().manual_seed({settings.seed})")
        if settings.road == "rejection":
            call, arguments = "sculpt.reject", [text, *arguments]
        else:
            call = f"({text}).sample" if isinstance(tree.body, ast.BinOp) else f"{text}.sample"
        lines = ["import sculpt, torch", *self.preamble, f"samples = {call}({', '.join(arguments)})"]
        return "\n".join(lines)

    def sample(self, settings: Settings) -> Samples:
        """The samples that :meth:`code` gives."""
        composition = self.composition(settings)
        call = functools.partial(reject, composition) if settings.road == "rejection" else composition.sample
        guide, options = self._arguments(settings)
        return call(settings.n, *guide, **options, generator=torch.Generator().manual_seed(settings.seed), progress=False)

    def _arguments(self, settings: Settings) -> tuple[list[Any], dict[str, Any]]:
        """What sampling is given: the classifier where the road asks it, and options."""
        diffusion = self.family == "diffusion"
        asked = settings.road in ("guided", "corrected") or (settings.road == "rejection" and diffusion)
        options = {"correct": True} if settings.road == "corrected" else {}
        return [self.classifier] * asked, options | ({"steps": settings.steps} if diffusion else {})

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
        with self._turn:  # the run before ends at its next call of a network
            run.began, self._running = time.monotonic(), run
            try:
                if run._stop.is_set():
                    raise Cancelled
                run.state = "working"
                run.notify(run)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("default")
                    run.code, run.samples = self.code(run.settings), self.sample(run.settings)
                    run.picture = picture(run.samples)
                run.notes = [str(warning.message) for warning in caught if warning.category is UserWarning]
                run.state = "done"
            except Cancelled:
                run.state = "cancelled"
            except Exception as error:  # whatever it is belongs into the cell, and the next run may do better
                run.state, run.error = "failed", f"{type(error).__name__}: {error}"
            run.seconds, self._running = time.monotonic() - run.began, None
            try:
                run.notify(run)
            finally:
                run._ended.set()

    def _tick(self, *state: Any) -> None:
        """Before each call of a base model's network."""
        run = self._running
        if run is None:
            return
        if run._stop.is_set():
            raise Cancelled
        run.calls += 1
        if len(state) > 1:  # (z, s): every noise level is a step, and where the level rises another pass begins
            level = float(state[1])
            run.step = 1 if run.level is None or level > run.level else run.step + (level < run.level)
            run.level = level
        now = time.monotonic()
        run.seconds = now - run.began
        if now - run.told > 0.2:
            run.told = now
            run.notify(run)


def picture(samples: Samples) -> tuple[str, bytes]:
    """Samples as a person looks at them: ``("png" | "svg+xml" | "text", its bytes)``."""
    if hasattr(samples, "draw"):
        return "svg+xml", samples.draw(6, columns=2).svg.encode()
    from sculpt import plots

    shown = samples.decode()
    if isinstance(shown, torch.Tensor) and shown.ndim == 4 and shown.shape[1] in (1, 3):
        figure = plots.image_grid(shown[:64])
    elif isinstance(shown, torch.Tensor) and shown.ndim == 2 and shown.shape[1] >= 2 and _in_plane(shown):
        figure = plots.points2d(shown[:, :2], "" if shown.shape[1] == 2 else f"the first two of {shown.shape[1]} coordinates")
    else:
        rows = Counter(str(x.tolist()) if isinstance(x, torch.Tensor) else str(x) for x in shown).most_common(12)
        return "text", "\n".join(f"{count:>6} ×  {x:.100}" for x, count in rows).encode()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return "png", buffer.getvalue()


def _in_plane(x: torch.Tensor) -> bool:
    """Vectors, and the cells of a grid in two dimensions."""
    return x.is_floating_point() or (x.shape[1] == 2 and int(x.min()) >= 0)


def _watched(model: BaseModel, tick: Callable[..., None]) -> BaseModel:
    """A twin that shares everything with the model and calls ``tick`` before its network."""
    twin = copy.copy(model)
    name = {"diffusion": "denoise", "gflownet": "log_pf"}[model.family]
    call = getattr(model, name)

    def watched(*state):
        tick(*state)
        return call(*state)

    setattr(twin, name, watched)
    return twin


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
    own = [variables.get(id(model)) for model in values]
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


# ----------------------------------------------------------------------------------------------------------------------- view

_SMALL = "color: #8c8698; font-size: 12px; line-height: 1.4"
_BOX = "border: 1px solid #d9d4e0; border-left-width: 4px; border-radius: 4px; padding: 6px 10px; line-height: 1.4"
_GREEN, _AMBER, _RED = "#2e7d32", "#b26a00", "#b3261e"
_TONES = {"sound": _GREEN, "exact": _GREEN, "nothing": _GREEN, "strained": _AMBER, "biased": _AMBER}
_COPY = (
    "(navigator.clipboard?.writeText(this.dataset.code) ?? Promise.reject())"
    ".then(() => this.textContent = 'copied', () => this.textContent = 'select the lines above and copy them')"
)


class View:
    """A :class:`Session` in ipywidgets. ``box`` is the widget; Jupyter shows the view itself."""

    def __init__(self, session: Session):
        self.session = session
        self.widgets = w = _ipywidgets()
        self.shown: Run | None = None
        self._quiet = False
        left = w.VBox(
            [self._formulas(), *self._knobs()],
            layout=w.Layout(flex="1 1 340px", min_width="300px", max_width="440px", padding="4px"),
        )
        right = w.VBox(self._results(), layout=w.Layout(flex="2 1 420px", min_width="320px", padding="4px"))
        self.box = w.HBox([left, right], layout=w.Layout(flex_flow="row wrap"))
        self.box.add_class("sculpt-explore")
        for widget in (*self.labels, self.formula, *self.odds, self.steps, self.road, self.n, self.seed):
            widget.observe(self._changed, names="value")
        self.tabs.observe(self._changed, names="selected_index")
        self._changed()

    def _formulas(self) -> Any:
        """The formula: a label for each observation, or operators."""
        w, names = self.widgets, self.session.names
        models = [(name, i) for i, name in enumerate(names)]
        self.labels = [
            w.ToggleButtons(
                options=[("none", -1), *models] if k else models, value=k if k < 2 else -1, style={"button_width": "auto"}
            )
            for k in range(self.session.observations)
        ]
        self.formula = w.Text(value=f"{names[0]} & {names[1]}", continuous_update=False, layout=w.Layout(width="98%"))
        words = (*names, "|", "&", "-", "(", ")")
        self.words = [self._button(word, lambda word=word: self._append(word)) for word in words]
        self.back = self._button("⌫", self._erase, tooltip="take the last word back")
        self.clear = self._button("clear", lambda: setattr(self.formula, "value", ""))
        rows = [w.HBox([w.Label(f"y{k + 1}"), label]) for k, label in enumerate(self.labels)]
        clicks = w.HBox([*self.words, self.back, self.clear], layout=w.Layout(flex_flow="row wrap"))
        self.tabs = w.Tab(
            children=[w.VBox([self._caption("the model that each observation names"), *rows]), w.VBox([self.formula, clicks])],
            titles=("labels", "formula"),
        )
        return self.tabs

    def _knobs(self) -> list[Any]:
        w, session = self.widgets, self.session
        knob = {"style": {"description_width": "64px"}, "layout": w.Layout(width="98%")}
        slider = {**knob, "continuous_update": False}
        if len(session.names) == 2:
            self.odds = [w.FloatSlider(value=0.5, min=0.05, max=0.95, step=0.05, description="odds α", **slider)]
        else:
            odds = {"value": 1.0, "min": -1.5, "max": 1.5, "step": 0.1}
            self.odds = [w.FloatLogSlider(**odds, description=f"odds {name}", **slider) for name in session.names]
        roads = [(text, road) for road, text in ROADS.items()]
        self.road = w.Dropdown(
            options=roads, value="tracked" if session.classifier is None else "guided", description="road", **knob
        )
        self.reasons = w.HTML()
        self.steps = w.IntSlider(value=32, min=4, max=256, step=4, description="steps", **slider)
        images = session.family == "diffusion" and len(session.models[0].shape) > 1  # they cost much, points little
        self.n = w.IntSlider(value=16 if images else 500, min=1, max=64 if images else 10_000, description="samples", **slider)
        self.seed = w.BoundedIntText(
            value=0, min=0, max=2**31 - 1, description="seed", style=knob["style"], layout=w.Layout(width="190px")
        )
        self.reseed = self._button("another", lambda: setattr(self.seed, "value", self.seed.value + 1))
        self.live = w.Checkbox(value=True, description="sample when something changes", indent=False)
        self.go = self._button("sample", self.start, button_style="primary", icon="play")
        self.stop = self._button("cancel", self.cancel, icon="stop", disabled=True)
        knobs = [*self.odds, self.road, self.reasons, *([self.steps] if session.family == "diffusion" else []), self.n]
        return [*knobs, w.HBox([self.seed, self.reseed]), self.live, w.HBox([self.go, self.stop])]

    def _results(self) -> list[Any]:
        """Progress, and what came out, which is hidden until there is something."""
        w = self.widgets
        self.bar = w.IntProgress(min=0, max=1, layout=w.Layout(width="98%", height="12px", visibility="hidden"))
        self.status, self.text, self.verdict, self.diagnostics, self.copy = (w.HTML() for _ in range(5))
        self.image = w.Image(layout=w.Layout(max_width="100%", object_fit="contain"))
        self.code = w.Textarea(rows=4, layout=w.Layout(width="98%"))
        caption = self._caption("as code: it gives the samples above again")
        parts = [self.image, self.text, self.verdict, self.diagnostics, caption, self.code, self.copy]
        self.result = w.VBox(parts, layout=w.Layout(display="none"))
        return [self.bar, self.status, self.result]

    def _button(self, text: str, click: Callable[[], Any], **options: Any) -> Any:
        w = self.widgets
        button = w.Button(description=text, layout=w.Layout(width="auto", min_width="34px"), **options)
        button.on_click(lambda _: click())
        return button

    def _caption(self, text: str) -> Any:
        return self.widgets.HTML(f'<div style="{_SMALL}">{text}</div>')

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return self.box._repr_mimebundle_(**options)

    @property
    def settings(self) -> Settings:
        """What the widgets say."""
        odds = tuple(slider.value for slider in self.odds)
        odds = odds if len(odds) > 1 else (odds[0], 1 - odds[0])
        return Settings(
            labels=tuple(label.value for label in self.labels if label.value >= 0),
            formula=self.formula.value if self.tabs.selected_index == 1 else None,
            odds=None if max(odds) - min(odds) < 1e-9 else odds,
            road=self.road.value,
            steps=self.steps.value,
            n=self.n.value,
            seed=self.seed.value,
        )

    def start(self) -> Run | None:
        """Sample what is chosen, in the background; ``None`` where the formula is not complete."""
        if not self._check():
            return None
        self.stop.disabled = False
        return self.session.start(self.settings, self._show)

    def cancel(self) -> None:
        """Stop before the next call of a network; the samples that are shown stay."""
        self.session.cancel()

    def _changed(self, _: Any = None) -> None:
        if self._quiet:
            return
        if not self._check():
            self.cancel()
        elif self.live.value:
            self.start()

    def _check(self) -> bool:
        """Offer the roads that the formula has; say what is wrong with it, if anything is."""
        try:
            reasons = self.session.roads(self.settings)
            takes_odds = self.session.takes_odds(self.settings)
        except (TypeError, ValueError) as error:
            self.reasons.value = f'<div style="{_SMALL}; color: {_RED}">{html.escape(str(error))}</div>'
            return False
        self._quiet = True
        try:
            possible = [road for road, reason in reasons.items() if not reason]
            road = self.road.value if self.road.value in possible else possible[0]
            self.road.options, self.road.value = [(ROADS[name], name) for name in possible], road
            for slider in self.odds:
                slider.disabled = not takes_odds
        finally:
            self._quiet = False
        lines = [f"{road}: {html.escape(reasons[road])}" for road in ("guided", "rejection") if reasons[road]]
        lines += [] if takes_odds else ["odds belong to two or more observed labels of base models."]
        self.reasons.value = f'<div style="{_SMALL}">{"<br>".join(lines)}</div>'
        return True

    def _append(self, word: str) -> None:
        self.formula.value = f"{self.formula.value.rstrip()} {word}".strip().replace("( ", "(").replace(" )", ")")

    def _erase(self) -> None:
        self.formula.value = re.sub(r"\s*(\w+|\S)\s*$", "", self.formula.value)

    def _say(self, text: str, color: str = "inherit") -> None:
        self.status.value = f'<div style="color: {color}; line-height: 1.4">{html.escape(text)}</div>'

    def _show(self, run: Run) -> None:
        """What a run has to tell, from its thread. One that was replaced by another has nothing to tell any more."""
        if run is not self.session.run:
            return
        working, diffusion = run.state in ("waiting", "working"), self.session.family == "diffusion"
        self.stop.disabled = not working
        self.bar.layout.visibility = "visible" if working and diffusion else "hidden"
        if working:
            total = self.bar.max = max(run.step, run.settings.steps)
            self.bar.value = run.step
            what = f"step {run.step} of {total}" if diffusion else f"{run.calls} calls of a policy"
            self._say(f"sampling … {what}, {run.seconds:.1f} s")
        elif run.state == "cancelled":
            expression = self.session.expression
            still = "" if self.shown is None else f" The samples are still those of {expression(self.shown.settings)}."
            self._say(f"Cancelled after {run.seconds:.1f} s.{still}", _AMBER)
        elif run.state == "failed":
            self._say(run.error, _RED)
        else:
            self._show_samples(run)

    def _show_samples(self, run: Run) -> None:
        self.shown, diagnostics = run, run.samples.diagnostics
        kind, data = run.picture
        self.image.layout.display = "none" if kind == "text" else "block"
        self.image.layout.max_height = "620px" if kind == "svg+xml" else "460px"  # the scores below molecules are small
        self.text.value = f"<pre style='font: 12px monospace'>{html.escape(data.decode())}</pre>" if kind == "text" else ""
        if kind != "text":
            self.image.format, self.image.value = kind, data
        color = _TONES.get(re.match(r"\w*", diagnostics.verdict)[0], _RED)
        notes = "".join(f"<br>{html.escape(note)}" for note in run.notes)
        self.verdict.value = f'<div style="{_BOX}; border-color: {color}">{html.escape(diagnostics.verdict)}{notes}</div>'
        table = "\n".join(line for line in str(diagnostics).splitlines() if not line.lstrip().startswith("verdict"))
        self.diagnostics.value = f'<pre style="font: 12px/1.35 monospace">{html.escape(table)}</pre>'
        self.code.value = run.code
        self.copy.value = (
            f'<button class="jupyter-button" style="width: auto" data-code="{html.escape(run.code)}" onclick="{_COPY}">'
            "copy as code</button>"
        )
        self.result.layout.display = "flex"
        self._say(f"{len(run.samples)} samples of {self.session.expression(run.settings)} in {run.seconds:.1f} s")


def _ipywidgets() -> Any:
    try:
        import ipywidgets
    except ImportError:
        raise ImportError(
            "The explorer needs ipywidgets, which is not installed here: pip install 'sculpt[notebook]', then restart the kernel. "
            "Everything else works without it: (p & q).sample(16)."
        ) from None
    return ipywidgets
