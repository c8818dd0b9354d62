"""A session in ipywidgets."""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sculpt import preview
from sculpt.apps.explorer.session import ROADS, Run, Session, Settings
from sculpt.samples import Samples

__all__ = ["View"]

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
        self._operands: list[str] = []
        left = w.VBox(
            [self._formulas(), *self._knobs()],
            layout=w.Layout(flex="1 1 340px", min_width="min(300px, 100%)", max_width="440px", padding="4px"),
        )
        right = w.VBox(self._results(), layout=w.Layout(flex="2 1 420px", min_width="min(320px, 100%)", padding="4px"))
        self.box = w.HBox([left, right], layout=w.Layout(flex_flow="row wrap"))
        self.box.add_class("sculpt-explore")
        for widget in (*self.labels, self.formula, *self.odds, self.steps, self.road, self.n, self.seed, self.beside):
            widget.observe(self._changed, names="value")
        self.tabs.observe(self._changed, names="selected_index")
        self._changed()

    def _formulas(self) -> Any:
        """The formula: a label for each observation, or operators."""
        w, names, given = self.widgets, self.session.names, self.session.given
        models = [(name, i) for i, name in enumerate(given)]
        self.labels = [
            w.ToggleButtons(
                options=[("none", -1), *models] if k else models,
                tooltips=[f"y{k + 1}: {name}" for name in (["none", *given] if k else given)],
                value=k if k < 2 else -1,
                style={"button_width": "auto"},
            )
            for k in range(self.session.observations)
        ]
        self.formula = w.Text(
            value=f"{names[0]} & {names[1]}", continuous_update=False, tooltip="the formula", layout=w.Layout(width="98%")
        )
        words = [*zip(given, names, strict=True), *((sign, sign) for sign in "|&-()")]
        self.words = [self._button(said, functools.partial(self._append, word), tooltip=word) for said, word in words]
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
        # Names may be long: a description as wide as it needs to be is not cut.
        knob = {"style": {"description_width": "initial"}, "layout": w.Layout(width="98%")}
        slider = knob | {"continuous_update": False}
        if len(session.names) == 2:
            self.odds = [w.FloatSlider(value=0.5, min=0.05, max=0.95, step=0.05, description="odds α", **slider)]
        else:
            odds = {"value": 1.0, "min": -1.5, "max": 1.5, "step": 0.1}
            self.odds = [w.FloatLogSlider(**odds, description=f"odds of {name}", **slider) for name in session.given]
        roads = [(text, road) for road, text in ROADS.items()]
        self.road = w.Dropdown(
            options=roads, value="tracked" if session.classifier is None else "corrected", description="road", **knob
        )
        self.reasons = w.HTML()
        self.steps = w.IntSlider(value=32, min=4, max=256, step=4, description="steps", **slider)
        most = 64 if session.usual == 16 else 10_000
        self.n = w.IntSlider(value=session.usual, min=1, max=most, description="samples", **slider)
        self.seed = w.BoundedIntText(
            value=0, min=0, max=2**31 - 1, description="seed", style=knob["style"], layout=w.Layout(width="190px")
        )
        self.reseed = self._button("another", lambda: setattr(self.seed, "value", self.seed.value + 1))
        self.live = w.Checkbox(value=True, description="sample when something changes", indent=False)
        self.beside = w.Checkbox(value=True, description="base models beside the samples", indent=False)
        self.go = self._button("sample", self.start, button_style="primary", icon="play")
        self.stop = self._button("cancel", self.cancel, icon="stop", disabled=True)
        knobs = [*self.odds, self.road, self.reasons, *([self.steps] if session.takes_steps else []), self.n]
        return [*knobs, w.HBox([self.seed, self.reseed]), self.live, self.beside, w.HBox([self.go, self.stop])]

    def _results(self) -> list[Any]:
        """Progress, and what came out, which is hidden until there is something."""
        w = self.widgets
        self.bar = w.IntProgress(min=0, max=1, layout=w.Layout(width="98%", height="12px", visibility="hidden"))
        self.status, self.picture, self.rows, self.verdict, self.diagnostics, self.others, self.copy, self.preview = (
            w.HTML() for _ in range(8)
        )
        self.code = w.Textarea(rows=4, tooltip="the code for these samples", layout=w.Layout(width="98%"))
        caption = self._caption("as code: it gives the samples above again")
        looks = [self.picture, self.verdict, self.rows, self.others, self.diagnostics]
        self.result = w.VBox([*looks, caption, self.code, self.copy], layout=w.Layout(display="none"))
        return [self.bar, self.status, self.preview, self.result]

    def _button(self, text: str, click: Callable[[], Any], **options: Any) -> Any:
        w = self.widgets
        button = w.Button(description=text, layout=w.Layout(width="auto", min_width="34px"), **options)
        button.on_click(lambda _: click())
        return button

    def _caption(self, text: str) -> Any:
        return self.widgets.HTML(f'<div style="{preview.SMALL}">{text}</div>')

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return self.box._repr_mimebundle_(**options)

    @property
    def settings(self) -> Settings:
        """What the widgets say."""
        odds: tuple[float, ...] | None = None
        if self._operands and not all(slider.disabled for slider in self.odds):
            value = {name: slider.value for name, slider in zip(self.session.names, self.odds, strict=False)}
            alpha = self.odds[0].value
            odds = (alpha, 1 - alpha) if len(self.odds) == 1 else tuple(value[name] for name in self._operands)
        return Settings(
            labels=tuple(label.value for label in self.labels if label.value >= 0),
            formula=self.formula.value if self.tabs.selected_index == 1 else None,
            odds=odds if odds and max(odds) - min(odds) > 1e-9 else None,
            road=self.road.value or "tracked",
            steps=self.steps.value,
            n=self.n.value,
            seed=self.seed.value,
            beside=self.beside.value,
        )

    def start(self) -> Run | None:
        """Sample what is chosen, in the background; ``None`` where the formula is not complete."""
        if not self._check():
            return None
        self.stop.disabled = False
        return self.session.start(self.settings, self._show)

    def cancel(self) -> None:
        """Stop at the end of the step that is taken now; the samples that are shown stay."""
        self.session.cancel()

    def _changed(self, _: Any = None) -> None:
        if self._quiet:
            return
        if not self._check():
            self.cancel()
        elif self.live.value:
            self.start()

    def _check(self) -> bool:
        """Offer the roads and the odds that the formula has; say what is wrong with it, if anything is."""
        self._quiet = True
        try:
            self._offer_roads()
            refused = self._offer_odds()
            reasons = self._offer_roads()  # odds close some
        except (TypeError, ValueError) as error:
            self._explain([str(error)], preview.TONES["bad"])
            # A verdict belongs to a formula: not to this one.
            self.verdict.value = self.diagnostics.value = ""
            return False
        finally:
            self._quiet = False
        first: dict[str, str] = {}
        for name, reason in reasons.items():
            first.setdefault(reason, name)
        self._explain([f"{name}: {reason}" for reason, name in first.items() if reason] + ([refused] if refused else []))
        return not all(reasons.values())

    def _offer_roads(self) -> dict[str, str]:
        """Put the roads that can be taken into the list; why the others cannot."""
        reasons = self.session.roads(self.settings)
        possible = [road for road, reason in reasons.items() if not reason]
        # Options first: a dropdown refuses a value that it does not have.
        road = self.road.value if self.road.value in possible else next(iter(possible), None)
        self.road.options, self.road.value = [(ROADS[name], name) for name in possible], road
        return reasons

    def _offer_odds(self) -> str:
        """Switch on the sliders whose models have odds in this formula and on this road; why there are none."""
        plain, session = replace(self.settings, odds=None), self.session
        self._operands, refused = session.operands(plain), session.refuses_odds(plain)
        for name, slider in zip(session.names, self.odds, strict=False):
            slider.disabled = bool(refused) or (len(self.odds) > 1 and name not in self._operands)
        if len(self.odds) == 1 and self._operands:
            given = session.given[session.names.index(self._operands[0])]
            self.odds[0].description = f"odds α of {given}"
        return refused

    def _explain(self, lines: list[str], color: str = "inherit") -> None:
        text = "<br>".join(map(html.escape, lines))
        self.reasons.value = f'<div style="{preview.SMALL}; color: {color}">{text}</div>'

    def _append(self, word: str) -> None:
        self.formula.value = f"{self.formula.value.rstrip()} {word}".strip().replace("( ", "(").replace(" )", ")")

    def _erase(self) -> None:
        self.formula.value = re.sub(r"\s*(\w+|\S)\s*$", "", self.formula.value)

    def _say(self, text: str, color: str = "inherit") -> None:
        self.status.value = f'<div role="status" style="color: {color}; line-height: 1.4">{html.escape(text)}</div>'

    def _show(self, run: Run) -> None:
        """What a run has to tell, from its thread. One that was replaced by another has nothing to tell any more."""
        if run is not self.session.run:
            return
        working = run.state in ("waiting", "working")
        self.stop.disabled = not working
        self.bar.layout.visibility = "visible" if working else "hidden"
        looking = working and run.preview is not None
        self.preview.value = _large(*run.preview, alt="what there is so far") if looking and run.preview else ""
        self.result.layout.display = "none" if looking or self.shown is None else "flex"
        if working:
            self._show_progress(run)
        elif run.state == "cancelled":
            still = "" if self.shown is None else f" The samples are still those of {self.session.said(self.shown.settings)}."
            self._say(f"Cancelled after {run.seconds:.1f} s.{still}", preview.TONES["careful"])
        elif run.state == "failed":
            self._say(run.error, preview.TONES["bad"])
        elif run.samples is not None and run.picture is not None:
            self._show_samples(run, run.samples, *run.picture)

    def _show_progress(self, run: Run) -> None:
        now = run.progress
        if now is None:
            self.bar.value = 0
            return self._say("sampling …")
        done, of = now.far
        # Where nobody knows how long it takes, what has ended tells where it is.
        self.bar.max, self.bar.value = (now.n or 1, now.ended) if of is None else (of, done)
        where = f"{done}" if of is None else f"{done} of {of}"
        where = ", ".join([f"step {where}", *([now.note] if now.note else [])])
        self._say(f"{now.title} … {where}, {run.seconds:.1f} s")

    def _show_samples(self, run: Run, samples: Samples, kind: str, data: bytes) -> None:
        self.shown, verdict = run, samples.verdict
        said = f"{len(samples)} samples of {self.session.said(run.settings)}"
        self.picture.value = "" if kind == "text" and run.listed else _large(kind, data, said)
        self.rows.value = run.listed
        self.others.value = _row(run.beside)
        self.verdict.value = preview.box(str(verdict), verdict.trust, run.notes)
        # Its formula has the models' own names; the line above has it with those that were given.
        self.diagnostics.value = preview.table([row for row in samples.diagnostics.rows() if row[0] != "formula"])
        self.code.value = run.code
        self.code.rows = 1 + sum(1 + len(line) // 60 for line in run.code.splitlines())  # long lines wrap
        self.copy.value = (
            f'<button class="jupyter-button" style="width: auto" data-code="{html.escape(run.code)}" onclick="{_COPY}">'
            "copy as code</button>"
        )
        self.result.layout.display = "flex"
        self._say(f"{said} in {run.seconds:.1f} s")


def _large(kind: str, data: bytes, alt: str) -> str:
    """The picture of a run."""
    height = 620 if kind == "svg+xml" else 460  # the scores below molecules are small
    return preview.embedded(kind, data, alt, f"display: block; margin: auto; max-width: 100%; max-height: {height}px")


def _row(shown: Sequence[tuple[str, str, bytes]]) -> str:
    """Pictures side by side, each below its title."""
    figures = "".join(
        f'<figure style="margin: 0"><figcaption style="{preview.SMALL}">{html.escape(title)}</figcaption>'
        f"{preview.embedded(kind, data, title, 'max-width: 100%')}</figure>"
        for title, kind, data in shown
    )
    least, most = (300, 360) if any(kind == "svg+xml" for _, kind, _ in shown) else (150, 260)  # scores of molecules are read
    grid = f"display: grid; grid-template-columns: repeat(auto-fit, minmax(min({least}px, 100%), 1fr)); gap: 12px"
    # The width is of a box of its own: a grid that has it is never narrower.
    return figures and f'<div style="max-width: {most * len(shown)}px"><div style="{grid}">{figures}</div></div>'


def _ipywidgets() -> Any:
    try:
        import ipywidgets
    except ImportError:
        raise ImportError(
            "The explorer needs ipywidgets, which is not installed here: pip install 'compositional-sculpting[notebook]', then restart the kernel. "
            "Everything else works without it: (p & q).sample(16)."
        ) from None
    return ipywidgets
