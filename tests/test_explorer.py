"""The explorer: its logic through the real widgets without a browser, and in a real browser, in Voilà and JupyterLab.

The browser tests need ``apt-get install chromium`` and ``pip install voila jupyterlab playwright``, and run with
``pytest tests/test_explorer.py -m slow``. With SCULPT_SCREENSHOTS=folder each leaves pictures of what it saw last, wide and narrow.
"""

import importlib.util
import inspect
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from molecule_models import molecule_classifier, molecule_model

import sculpt
from sculpt import exact, plots
from sculpt.apps.demos.discs import HALF_WIDTH, Exact, discs, log_densities
from sculpt.apps.explorer import Notice
from sculpt.apps.explorer.beside import known, so_far
from sculpt.apps.explorer.session import Session, Settings
from sculpt.apps.explorer.view import View
from sculpt.chain import Progress
from sculpt.diagnostics import Diagnostics
from sculpt.model import BaseModel

pytest.importorskip("ipywidgets")

CHROMIUM = "/usr/bin/chromium"
NARROW = 420
"""How wide the window of a telephone is."""


def explorer(models, classifier=None, n=20, steps=4):
    """What sculpt.explore gives to the caller, before its first run and with small numbers."""
    start, Session.start = Session.start, lambda self, settings, notify=None: None
    try:
        view = View(Session(models, classifier, inspect.currentframe().f_back.f_locals))
    finally:
        Session.start = start
    view.live.value = view.beside.value = False
    view.n.value, view.steps.value = n, steps
    view.live.value = True
    return view


def ended(view, state="done"):
    """The last run of an explorer, when it has ended."""
    run = view.session.run
    assert run.wait(120)
    assert run.state == state, run.error
    return run


def grid(m=2):
    from gflownet_models import ENVIRONMENTS, perfect

    return perfect(ENVIRONMENTS["grid-2d"](), m)


def again(code, **scope):
    """What the code gives to somebody who pastes it."""
    exec(code, scope)
    return scope["samples"]


# ------------------------------------------------------------------------------------------------------- what it samples


def test_changing_a_label_samples_another_composition():
    p, q = grid()
    view = explorer([p, q])
    view.go.click()
    both = ended(view)
    assert "samples of p &amp; q" in view.status.value
    assert "sound" in view.verdict.value and "log Z" in view.diagnostics.value
    assert '<img alt="20 samples of p &amp; q"' in view.picture.value and "data:image/png;" in view.picture.value
    view.labels[1].value = 0
    only = ended(view)
    assert only is not both
    assert "samples of p - q" in view.status.value
    assert not torch.equal(both.samples.x, only.samples.x)


@pytest.mark.parametrize("labels", [(0,), (0, 1), (1, 0), (1, 1), (0, 0, 1)])
@pytest.mark.parametrize("odds", [None, (0.3, 0.7)])
def test_the_code_gives_the_same_samples(labels, odds):
    p, q = grid()
    session = Session([p, q], None, {"p": p, "q": q})
    for road, reason in session.roads(Settings(labels=labels)).items():
        if reason:
            continue
        settings = Settings(labels=labels, odds=odds, road=road, n=30, seed=3)
        run = session.start(settings)
        assert run.wait(120) and run.state == "done", run.error
        assert torch.equal(run.samples.x, again(run.code, p=p, q=q).x)
        assert len(run.samples) == 30


def test_labels_and_odds_mean_what_they_say():
    p, q = grid()
    session = Session([p, q], None, {"p": p, "q": q})
    targets = {
        ((0, 1), None): p & q,
        ((1, 1), None): q - p,
        ((0, 1), (0.3, 0.7)): sculpt.harmonic_mean(p, q, odds=0.3),
        ((1, 1), (0.3, 0.7)): sculpt.contrast(q, p, odds=0.3),  # the first operand's, as the function has it
        ((0, 0, 1), (0.3, 0.7)): sculpt.posterior([p, q], (0, 0, 1), odds=0.3),
    }
    for (labels, odds), target in targets.items():
        composition = session.composition(Settings(labels=labels, odds=odds))
        assert str(composition) == str(target)
        assert composition.key == target.key


def test_a_formula_is_built_by_clicking():
    p, q, r = grid(3)
    view = explorer([p, q, r])
    buttons = {button.description: button for button in view.words}
    view.live.value = False
    view.tabs.selected_index = 1
    view.clear.click()
    for word in ("(", "p", "|", "q", ")", "-", "r", "-"):
        buttons[word].click()
    assert "not complete" in view.reasons.value
    assert view.start() is None
    view.back.click()
    assert view.formula.value == "(p | q) - r"
    view.live.value = True
    view.go.click()
    run = ended(view)
    assert torch.equal(run.samples.x, again(view.code.value, p=p, q=q, r=r).x)
    assert all(slider.disabled for slider in view.odds)
    view.formula.value = "p & r"
    view.odds[2].value = 10.0
    assert "odds=" in ended(view).code
    view.formula.value = "harmonic_mean(p, q, odds=0.1)"
    assert "sculpt.harmonic_mean(p, q, odds=0.1).sample(20" in ended(view).code


def test_a_classifier_opens_the_guided_roads():
    p, q = grid()
    classifier = molecule_classifier(p, q)
    view = explorer([p, q], classifier)
    assert [road for _, road in view.road.options] == ["guided", "corrected", "tracked", "rejection"]
    assert len(view.labels) == 2
    for road in ("guided", "corrected"):
        view.road.value = road
        run = ended(view)
        assert run.samples.diagnostics.road.startswith("classifier")
        correct = ", correct=True" if road == "corrected" else ""
        assert f".sample(20, sculpt.Guided(classifier{correct}), generator=" in run.code
        assert torch.equal(run.samples.x, again(run.code, p=p, q=q, classifier=classifier).x)
    assert view.odds[0].disabled and "odds cannot be turned here: Odds need a classifier" in view.reasons.value
    view.road.value = "tracked"
    assert not view.odds[0].disabled
    view.odds[0].value = 0.3
    assert "odds=0.3" in ended(view).code
    assert "need a classifier that takes them" in view.reasons.value
    assert "guided" not in [road for _, road in view.road.options]


def test_rejection_takes_the_classifier_where_the_models_do_not_know_their_densities():
    from diffusers_models import exact_model, three_rings
    from oracles import ExactGuide

    rings = three_rings()[:2]
    p, q = (exact_model(ring, name=name) for ring, name in zip(rings, "pq", strict=True))
    guide = ExactGuide(rings, [p.key, q.key])
    session = Session([p, q], guide, {"p": p, "q": q, "guide": guide})
    settings = Settings(road="rejection", steps=4, n=5)
    assert "(p & q).sample(5, sculpt.Rejection(guide), steps=4, generator=" in session.code(settings)
    p, q = grid()
    session = Session([p, q], molecule_classifier(p, q), {"p": p, "q": q})
    assert "(p & q).sample(16, sculpt.Rejection(), generator=" in session.code(Settings(road="rejection"))


def test_diffusion_models_step_and_show_points():
    p, q, _ = discs()
    view = explorer([p, q])
    view.go.click()
    run = ended(view)
    assert run.progress.steps == 4 and view.bar.layout.visibility == "hidden"
    assert "(p & q).sample(20, steps=4, generator=" in run.code
    assert torch.equal(run.samples.x, again(view.code.value, p=p, q=q).x)
    assert [road for _, road in view.road.options] == ["tracked", "rejection"]
    assert "guided: needs a classifier" in view.reasons.value


def test_image_models_show_images():
    from checkpoints import tiny_unet
    from diffusers import DDPMScheduler

    cats, dogs = (
        sculpt.Diffusion(tiny_unet(seed, in_channels=3, out_channels=3), DDPMScheduler(), name=f"{seed}") for seed in (0, 1)
    )
    view = explorer([cats, dogs], n=4)
    view.tabs.selected_index = 1
    view.formula.value = "cats | dogs"
    run = ended(view)
    assert run.samples.decode().shape == (4, 3, 8, 8)
    assert run.picture[0] == "png"


def test_molecules_are_drawn():
    view = explorer([molecule_model(0, "seh"), molecule_model(1, "sa")])
    view.go.click()
    run = ended(view)
    assert "data:image/svg+xml;" in view.picture.value
    assert run.picture == run.samples.picture()  # which shows a few, with their scores
    assert run.code.splitlines()[1].startswith("# seh, sa: the models")


def test_samples_without_a_picture_are_counted():
    from gflownet_models import ENVIRONMENTS, perfect

    view = explorer(perfect(ENVIRONMENTS["bits"](), 2))
    view.go.click()
    ended(view)
    assert "×" in view.picture.value and "<img" not in view.picture.value


def test_models_in_a_list_and_by_name_are_unpacked_in_the_code():
    models = grid()
    view = explorer(models)
    view.go.click()
    assert "p0, p1 = models\n" in ended(view).code
    assert torch.equal(view.shown.samples.x, again(view.code.value, models=models).x)
    named = dict(zip(("a model", "lambda"), models, strict=True))
    view = explorer(named)
    assert view.session.names == ["a_model", "p_lambda"] and view.session.given == ["a model", "lambda"]
    assert [name for name, _ in view.labels[0].options] == ["a model", "lambda"]
    view.go.click()
    ended(view)
    assert "samples of a model &amp; lambda" in view.status.value
    assert torch.equal(ended(view).samples.x, again(view.code.value, named=named).x)


def test_the_slider_is_of_the_first_operand_and_says_so():
    p, q = grid()
    view = explorer([p, q])
    for labels, operand in (((0, 1), "p"), ((1, 0), "q"), ((1, 1), "q"), ((0, 0), "p")):
        view.labels[0].value, view.labels[1].value = labels
        assert view.odds[0].description == f"odds α of {operand}"
    view.labels[0].value, view.labels[1].value, view.odds[0].value = 1, 1, 0.1
    assert "sculpt.contrast(q, p, odds=0.1)" in ended(view).code


def test_the_code_box_has_room_for_every_line():
    view = explorer(grid())
    view.odds[0].value = 0.3
    ended(view)
    lines = view.code.value.splitlines()
    assert len(lines) > 2 and view.code.rows > sum(1 + len(line) // 60 for line in lines)


def test_a_verdict_does_not_outlive_its_formula():
    p, q = grid()
    view = explorer([p, q])
    view.tabs.selected_index = 1
    ended(view)
    assert "sound" in view.verdict.value
    view.formula.value = "p & nobody"
    assert "no such model" in view.reasons.value and not view.verdict.value and not view.diagnostics.value
    view.formula.value = "q & p"
    ended(view)
    assert "sound" in view.verdict.value


# ---------------------------------------------------------------------------------------------------- what stands beside it


def test_the_exact_answer_and_the_base_models_of_the_formula_stand_beside_samples_of_a_grid():
    p, q, r = grid(3)
    session = Session([p, q, r], None, {"p": p, "q": q, "r": r})
    run = session.start(Settings(formula="p & q", n=30))
    assert run.wait(120) and [title for title, *_ in run.beside] == ["exact", "p", "q"]
    assert all(data.startswith(b"\x89PNG") for *_, data in run.beside)
    view = explorer([p, q, r])
    view.beside.value = True  # and two labels of three models are a posterior of all three
    ended(view)
    assert view.others.value.count("<img") == 4
    densities = [exact.terminal_distribution(model) for model in (p, q, r)]
    inner = exact.target((p & q).formula, densities[:2])
    found = known([p, q, r], None, 1.0)
    nested = (p & q) - r
    target = exact.target(nested.formula, [inner, densities[2]])
    torch.testing.assert_close(found._log_density(nested, [p, q, r]).exp(), target)
    torch.testing.assert_close(found._log_density(q, [p, q, r]).exp(), densities[1])


def test_densities_that_the_caller_knows_give_the_exact_answer_in_the_plane():
    models = p, q, r = discs()
    for composition in (p & q, r - (p | q)):
        found = known(models, log_densities(p & q & r), HALF_WIDTH)
        side = math.isqrt(len(found.log_p))
        density = found._log_density(composition, models).exp().view(side, side)
        assert float(density.sum()) * (2 * HALF_WIDTH / side) ** 2 == pytest.approx(1)
        fine = Exact(composition).density
        assert float((density.max() - fine.max()).abs() / fine.max()) < 0.05
    assert known(models, None, HALF_WIDTH) is None


def test_samples_and_base_models_are_drawn_on_one_square(monkeypatch):
    squares, draw = [], plots.points2d
    monkeypatch.setattr(
        plots, "points2d", lambda x, *, half_width: squares.append(half_width) or draw(x, half_width=half_width)
    )
    for models in (grid(), discs()[:2]):
        run = Session(models).start(Settings(n=2, steps=4))  # of so few, none need be at the edge of the grid
        assert run.wait(120) and run.state == "done", run.error
        assert len(set(squares[-3:])) == 1 and run.beside
        if not run.samples.x.is_floating_point():
            assert squares[-1] == 3.0  # of 6 cells a side


def test_a_posterior_of_many_models_is_said_by_the_names_that_were_given():
    session = Session(dict(zip(("a model", "q", "r"), grid(3), strict=True)))
    assert session.said(Settings(labels=(0, 1))) == "p(x | y1=a model, y2=q; a model, q, r)"
    assert session.said(Settings(labels=(0, 1, 2))) == "a model & q & r"
    assert session.expression(Settings(labels=(0, 1, 2))) == "a_model & q & r"


def test_a_run_shows_what_it_has_so_far(monkeypatch):
    monkeypatch.setattr("sculpt.apps.explorer.session.LOOK", 0.0)
    p, q, _ = discs()
    seen = []
    run = Session([p, q]).start(Settings(steps=4, n=10, beside=False), lambda run: seen.append(run.preview))
    assert run.wait(120) and run.state == "done", run.error
    assert run.preview[0] == "png"
    last = list(p.run(10, steps=4))[-2]
    assert so_far(p, last, 5)[0] == "png"
    one, two = grid()
    assert so_far(one & two, list((one & two).run(10))[2], 5)[0] == "png"
    assert so_far(p, Progress("nothing to see"), 5) is None


def test_a_preview_stands_in_for_the_samples_until_there_are_new_ones():
    p, q = grid()
    view = explorer([p, q])
    view.go.click()
    run = ended(view)
    run.state, run.preview = "working", run.picture
    view._show(run)
    assert "<img" in view.preview.value and view.result.layout.display == "none"
    run.state = "cancelled"
    view._show(run)
    assert not view.preview.value and view.result.layout.display == "flex"


def test_molecules_and_texts_are_listed():
    from token_models import recurrent_models

    view = explorer([molecule_model(0, "seh"), molecule_model(1, "sa")])
    view.go.click()
    ended(view)
    for column in ("SMILES", "MW", "logP", "TPSA", "QED", "alerts"):
        assert f"<th>{column}</th>" in view.rows.value
    models = recurrent_models(2)
    view = explorer(models)
    view.go.click()
    ended(view)
    assert "<th>text</th><th>length</th><th>log p: " in view.rows.value and not view.picture.value


# ---------------------------------------------------------------------------------------------- what it tells of its runs


def test_progress_is_what_the_generator_tells():
    p, q, _ = discs()
    session = Session([p, q], None, {"p": p, "q": q})
    settings = Settings(steps=5, n=10)
    told = list(session.stream(settings))
    run = session.start(settings)
    assert run.wait(120) and run.state == "done", run.error
    assert torch.equal(told[-1].samples.x, run.samples.x)
    assert run.progress.samples is run.samples and run.progress.step == run.progress.steps == told[-1].step == 5
    assert sorted({now.step for now in told}) == list(range(6))
    p, q = grid()  # whose samples decide how many steps they take
    (*before, last) = Session([p, q], None, {"p": p, "q": q}).stream(Settings(n=10))
    assert all(now.steps is None and now.ended <= now.n for now in before)
    assert last.ended == last.n >= 10 and len(last.samples) == 10


class Dice(BaseModel):
    """An outsider's model, which offers samples only; it tells every step, and whether it was left."""

    device, shape, key = torch.device("cpu"), (), ""

    def __init__(self, name, steps=3):
        self.name = self.key = name
        self.steps, self.taken, self.left = steps, 0, False
        self.go = threading.Semaphore(0)

    def check_composable(self, other):
        pass

    def stream(self, n, road, settings):
        try:
            for step in range(self.steps):
                self.taken += 1
                yield Progress(f"throwing {self}", step, self.steps, 0, n)
                assert self.go.acquire(timeout=60)
            x = torch.randint(6, (n,), generator=settings.generator)
            yield Progress(
                f"throwing {self}", self.steps, self.steps, n, n, None, self.result(x, None, Diagnostics("dice", str(self)))
            )
        finally:
            self.left = True


def running(model, step):
    """Wait until a model has begun this step."""
    until = time.monotonic() + 60
    while model.taken < step:
        assert time.monotonic() < until
        time.sleep(0.005)


def test_cancelling_between_steps_leaves_nothing_running():
    p, q = Dice("p", steps=1000), Dice("q")
    session = Session([p, q])
    run = session.start(Settings(labels=(0,), n=5))
    for step in range(1, 4):
        running(p, step)
        assert run.state == "working" and not p.left
        p.go.release()
    running(p, 4)
    session.cancel()
    p.go.release()
    assert run.wait(60) and run.state == "cancelled"
    assert p.left and p.taken <= 5 and run.samples is None and run.picture is None
    for thread in threading.enumerate():
        if thread.name == "sculpt.explore":
            thread.join(60)
    assert "sculpt.explore" not in [thread.name for thread in threading.enumerate()]
    # One that waits for its turn and is not wanted any more does not begin.
    taken = p.taken
    with session._turn:
        run = session.start(Settings(labels=(0,)))
        session.cancel()
    assert run.wait(60) and run.state == "cancelled" and p.taken == taken


def test_the_widgets_show_where_a_run_is():
    p, q = Dice("p", steps=4), Dice("q")
    view = explorer([p, q])
    view.tabs.selected_index = 1  # p & q: neither can be followed, and there is no classifier
    assert view.session.run is None
    assert view.start() is None
    for text in ("guided: needs a classifier", "tracked: p offers finished samples only", "rejection: Rejection needs"):
        assert text in view.reasons.value
    view.formula.value = "p"
    running(p, 1)
    time.sleep(0.25)
    p.go.release()
    running(p, 2)
    time.sleep(0.05)
    assert "throwing p … step 1 of 4" in view.status.value and (view.bar.value, view.bar.max) == (1, 4)
    assert view.bar.layout.visibility == "visible"
    for _ in range(3):
        p.go.release()
    run = ended(view)
    assert "samples of p" in view.status.value and run.samples.diagnostics.road == "dice"
    assert view.steps not in view.box.children[0].children


def test_a_session_explores_an_outsiders_models():
    p, q = Dice("p"), Dice("q")
    for model in (p, q):
        model.go.release(100)
    session = Session({"p": p, "q": q})
    run = session.start(Settings(formula="p | q", n=50))
    assert run.wait(60) and run.state == "done", run.error
    assert run.picture[0] == "text" and run.samples.verdict.trust == "good"
    assert session.code(run.settings).endswith("samples = (p | q).sample(50, generator=torch.Generator().manual_seed(0))")


# --------------------------------------------------------------------------------------------------------- what goes wrong


class Slow:
    """A network that says when it is called and waits until it may answer."""

    def __init__(self):
        self.called, self.go = threading.Event(), threading.Event()

    def __call__(self, x, t):
        self.called.set()
        self.go.wait(60)
        return x


def slow_models():
    from diffusers import DDPMScheduler

    network = Slow()
    network.go.set()
    p, q = (sculpt.Diffusion(network, DDPMScheduler(clip_sample=False), (2,), name=name) for name in "pq")
    network.go.clear()
    network.called.clear()
    return network, p, q


def test_a_cancelled_run_leaves_the_samples_and_the_next_one_works():
    network, p, q = slow_models()
    view = explorer([p, q])
    network.go.set()
    view.go.click()
    first = ended(view)
    shown = view.picture.value
    network.go.clear()
    network.called.clear()
    view.seed.value = 1
    assert network.called.wait(60)
    assert not view.stop.disabled
    view.stop.click()
    network.go.set()
    assert ended(view, "cancelled").samples is None
    assert "Cancelled" in view.status.value and "still those of p &amp; q" in view.status.value
    assert view.picture.value == shown and view.code.value == first.code
    assert view.stop.disabled
    view.go.click()
    assert "seed(1)" in ended(view).code


def test_a_change_replaces_the_run_that_it_finds():
    network, p, q = slow_models()
    view = explorer([p, q])
    view.go.click()
    assert network.called.wait(60)
    first = view.session.run
    view.labels[1].value = 0
    network.go.set()
    assert "p - q" in ended(view).code
    assert first.state == "cancelled"
    assert "samples of p - q" in view.status.value


def test_an_incomplete_formula_stops_what_runs_and_is_told():
    network, p, q = slow_models()
    view = explorer([p, q])
    view.tabs.selected_index = 1
    assert network.called.wait(60)
    view.formula.value = "p &"
    network.go.set()
    ended(view, "cancelled")
    assert "not complete" in view.reasons.value


def test_a_failing_network_is_told_and_the_next_run_works():
    p, q = grid()
    p.log_pf = lambda states: 1 / 0
    view = explorer([p, q])
    view.go.click()
    ended(view, "failed")
    assert "ZeroDivisionError" in view.status.value
    del p.log_pf
    view.go.click()
    ended(view)


def test_the_models_themselves_are_left_alone():
    p, q = grid()
    before = dict(vars(p))
    view = explorer([p, q])
    view.go.click()
    ended(view)
    assert vars(p) == before
    assert all(view.session.models[name] is model for name, model in (("p", p), ("q", q)))


def test_what_cannot_be_explored_stands_in_the_cell():
    from gflownet_models import ENVIRONMENTS, perfect

    p, q = grid()
    (other,) = perfect(ENVIRONMENTS["bits"](), 1)
    classifier = molecule_classifier(p, q)
    third = grid(3)[2]
    disc = discs()[0]
    for models, judge, message in (
        ([p, disc], None, "have no common states"),
        ([p, other], None, "cannot be composed"),
        ([p, third], classifier, "fitted for other base models"),
        ([p, q, third], classifier, "knows 2 base models"),
        ([p, q], "pair", "comes from sculpt.fit"),
        ([p], None, "two or more"),
        ([], None, "two or more"),
        ([p, p], None, "there twice"),
        ([p, 3], None, "takes base models"),
        ([p & q, p], None, "takes base models"),
        (7, None, "a list of base models"),
        ("p & q", None, "a list of base models"),
    ):
        notice = sculpt.explore(models, judge)
        assert isinstance(notice, Notice)
        assert message in repr(notice)
        assert "<div" in notice._repr_html_()


def test_without_ipywidgets_the_cell_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert "pip install 'compositional-sculpting[notebook]'" in repr(sculpt.explore(grid()))


# ------------------------------------------------------------------------------------------------------------- in a browser

NOTEBOOK = """
import sculpt
from diffusers import DDPMScheduler

scheduler = DDPMScheduler(clip_sample=False)

def gaussian(mean):
    def network(x, t):
        alpha2 = scheduler.alphas_cumprod[t.long()].reshape(-1, 1)
        return (1 - alpha2).sqrt() * (x - alpha2.sqrt() * mean)
    return network

p, q = (sculpt.Diffusion(gaussian(mean), scheduler, shape=(2,), name=name) for mean, name in ((-1.0, "p"), (1.0, "q")))
sculpt.explore([p, q])
"""
KINDS = {
    "discs": """
from sculpt.apps.demos.discs import discs, log_densities

p, q, r = discs()
sculpt.explore({"left disc": p, "right disc": q}, log_p=log_densities(p & q))
""",
    "grid": """
p, q, r = (sculpt.load(PRETRAINED / "grid" / f"circle{i}") for i in (1, 2, 3))
sculpt.explore([p, q, r], sculpt.load(PRETRAINED / "grid" / "circles"))
""",
    "digits": """
models = {name: sculpt.load(PRETRAINED / "digits" / name) for name in ("cyan", "zero-one", "zero-two")}
sculpt.explore(models, sculpt.load(PRETRAINED / "digits" / "triple"))
""",
    "molecules": """
seh, sa = (sculpt.load(PRETRAINED / "molecules" / name, beta=32) for name in ("seh", "sa"))
sculpt.explore([seh, sa])
""",
    "prompts": """
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained(PRETRAINED / "shapes" / "model")
circle = sculpt.Diffusion.from_pipeline(pipe, prompt="a red circle", guidance_scale=1.0)
sculpt.explore({"a red circle": circle, "a blue square": circle.with_condition(prompt="a blue square")})
""",
    "texts": """
seh, sa = (sculpt.load(PRETRAINED / "smiles" / name, prompt=f"<{name}:16>", name=name) for name in ("seh", "sa"))
sculpt.explore([seh, sa])
""",
    "words": f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from token_models import recurrent_models

sculpt.explore(recurrent_models(2))
""",
}
"""What else is explored, after its imports."""
IMPORTS = """
import os
os.environ["TQDM_DISABLE"] = "1"
import sculpt
from sculpt.apps.demos.common import PRETRAINED
"""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def serve(tmp_path):
    """Serves one notebook with a program of Jupyter; gives the server's address."""
    servers = []

    def start(program, *options, source=NOTEBOOK):
        if importlib.util.find_spec(program) is None:
            pytest.skip(f"{program} is not installed: pip install {program}")
        import nbformat

        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source.strip())])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, tmp_path / "explore.ipynb")
        address = f"http://127.0.0.1:{(port := _free_port())}"
        own = ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")
        lab = ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
        environment = os.environ | {name: str(tmp_path / name) for name in (*own, *lab)}
        paths = [str(Path(sculpt.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        with open(tmp_path / "log", "w") as log:
            command = [sys.executable, "-m", program, "--no-browser", f"--port={port}", *options]
            servers.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log))
        for _ in range(360):
            assert servers[-1].poll() is None, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(address, timeout=5).read()
                return address
            except OSError:
                time.sleep(0.5)
        raise AssertionError((tmp_path / "log").read_text())

    yield start
    for server in servers:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture
def page(tmp_path, request):
    """A page of a real browser, which must not have had an error to tell in the end."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    if not shutil.which(CHROMIUM):
        pytest.skip(f"there is no {CHROMIUM}: apt-get install chromium")
    quiet = (
        "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    )
    # What Voilà's page sends when it is left, its server refuses, and while it loads it is told of widgets that it has yet to
    # ask for; JupyterLab asks for language servers that nobody installed.
    theirs = re.compile("/voila/api/shutdown|Comm not found|/lsp/status")
    problems: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch_persistent_context(
            tmp_path / "profile",
            executable_path=CHROMIUM,
            headless=True,
            args=[*quiet.split(), "--disable-sync"],
            viewport={"width": 1200, "height": 900},
            permissions=["clipboard-read", "clipboard-write"],
        )
        # Voilà's page asks for a font on the web; nothing of the explorer needs it.
        browser.route(
            re.compile(r"^https?://(?!127\.0\.0\.1)"),
            lambda route: route.fulfill(status=200, body="", content_type="text/css"),
        )
        page = browser.new_page()
        page.set_default_timeout(300_000)

        def hear(message):
            if message.type == "error" and not theirs.search(f"{message.location['url']} {message.text}"):
                problems.append(message.text)

        page.on("console", hear)
        page.on("pageerror", lambda error: problems.append(str(error)))
        yield page
        for width, height in ((1200, 1500), (NARROW, 2400)):
            if folder := os.environ.get("SCULPT_SCREENSHOTS"):
                page.set_viewport_size({"width": width, "height": height})
                page.wait_for_timeout(500)
                page.screenshot(path=Path(folder) / f"{request.node.name}-{width}.png")
        browser.close()
    assert not problems


def seen(page, what):
    """The picture of the samples of a composition, when it is there."""
    page.get_by_text(re.compile(rf"^\d+ samples of {re.escape(what)} in ")).wait_for()
    return page.locator(".sculpt-explore img").first.get_attribute("src")


def second_label(page, name):
    """Click the second observation's label."""
    row = page.locator(".sculpt-explore .widget-toggle-buttons").nth(1)
    row.get_by_role("button", name=name, exact=True).click()


def fits(page):
    """On a telephone every part is as wide as its place, or less."""
    page.set_viewport_size({"width": NARROW, "height": 900})
    place = "(node.closest('.jp-OutputArea-output') ?? document.body).getBoundingClientRect().right + 1"
    wider = f"nodes => nodes.filter(node => node.getBoundingClientRect().right > {place}).map(node => node.outerHTML)"
    parts = ".sculpt-explore :is(button, input, select, textarea, img, .widget-readout, [role=status])"
    assert page.locator(parts).evaluate_all(wider) == []


def start_and_cancel(page):
    """Start a run of many steps and cancel it."""
    steps = page.locator(".sculpt-explore .widget-readout").nth(1)
    steps.fill("256")
    steps.press("Enter")
    page.get_by_text(re.compile(r"^sampling .*… step \d+ of 256")).wait_for()
    page.get_by_role("button", name="cancel").click()
    page.get_by_text("Cancelled after").wait_for()


@pytest.mark.slow
def test_in_voila_a_label_changes_the_samples(serve, page):
    page.goto(serve("voila", "--Voila.ip=127.0.0.1") + "/voila/render/explore.ipynb")
    both = seen(page, "p & q")
    second_label(page, "p")
    assert seen(page, "p - q") != both
    assert "sound" in page.locator(".sculpt-explore").inner_text()
    page.get_by_role("button", name="copy as code").click()
    page.get_by_role("button", name="copied").wait_for()
    assert "(p - q).sample(2000" in page.evaluate("navigator.clipboard.readText()")
    # The formula by clicking
    page.get_by_role("tab", name="formula").click()
    seen(page, "p & q")
    page.get_by_role("button", name="clear").click()
    page.get_by_text("is not complete").wait_for()
    for word in ("q", "-", "p"):
        page.locator(".sculpt-explore").get_by_role("button", name=word, exact=True).last.click()
    seen(page, "q - p")
    start_and_cancel(page)
    page.reload()
    seen(page, "p & q")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_in_voila_every_kind_of_model_is_shown_with_its_base_models(serve, page, kind):
    page.goto(serve("voila", "--Voila.ip=127.0.0.1", source=IMPORTS + KINDS[kind]) + "/voila/render/explore.ipynb")
    page.get_by_text(re.compile(r"^\d+ samples of .* in ")).wait_for()
    page.locator(".sculpt-explore figcaption").nth(1).wait_for()
    cut = "nodes => nodes.filter(node => node.scrollWidth > node.clientWidth + 1).map(node => node.innerText)"
    assert page.locator(".sculpt-explore .widget-label").evaluate_all(cut) == []
    box = page.locator(".sculpt-explore textarea")
    assert box.evaluate("node => node.scrollHeight <= node.clientHeight + 1")
    pictures = page.locator(".sculpt-explore img").evaluate_all("nodes => nodes.map(node => node.alt)")
    assert all(pictures) and bool(pictures) == (kind != "words")
    fits(page)


@pytest.mark.slow
def test_in_voila_the_keyboard_reaches_and_turns_every_knob(serve, page):
    page.goto(serve("voila", "--Voila.ip=127.0.0.1") + "/voila/render/explore.ipynb")
    seen(page, "p & q")
    name = "node => node.labels?.[0]?.innerText || node.innerText || node.title || node.role"

    def walk(to):
        """Go to a control; the names of those that were passed, with it."""
        names = []
        while to not in names:
            assert len(names) < 60, names
            page.keyboard.press("Tab")
            names.append(page.locator(":focus").evaluate(name).strip())
        return names

    labels = ["labels", "p", "q", "none", "p", "q", "none", "p", "q"]
    knobs = ["slider", "0.50", "road", "slider", "32", "slider", "2000", "seed", "another"]
    ways = ["sample when something changes", "base models beside the samples", "sample"]
    assert walk("copy as code") == [*labels, *knobs, *ways, "the code for these samples", "copy as code"]
    page.locator(".sculpt-explore [role=tab]").first.focus()
    walk("none")
    walk("p")
    page.keyboard.press("Enter")
    seen(page, "p - q")
    walk("slider")
    page.keyboard.press("ArrowRight")
    seen(page, "contrast(p, q, odds=0.55)")
    walk("seed")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Tab")
    page.wait_for_function("() => document.querySelector('.sculpt-explore textarea').value.includes('manual_seed(1)')")
    page.locator(".sculpt-explore [role=tab]").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert walk("clear")[-3:] == [")", "⌫", "clear"]
    page.keyboard.press("Enter")
    page.get_by_text("is not complete").wait_for()


@pytest.mark.slow
def test_in_jupyterlab_a_label_changes_the_samples_and_a_reload_loses_nothing(serve, page):
    address = serve("jupyterlab", "--ip=127.0.0.1", "--allow-root", "--IdentityProvider.token=")
    page.goto(address + "/lab/tree/explore.ipynb")
    page.get_by_text("| Idle").wait_for()
    page.locator(".jp-CodeCell .cm-content").click()
    page.keyboard.press("Shift+Enter")
    both = seen(page, "p & q")
    second_label(page, "p")
    assert seen(page, "p - q") != both
    start_and_cancel(page)
    page.keyboard.press("Control+s")
    page.locator(".jp-mod-dirty").wait_for(state="detached")
    page.reload()
    page.get_by_text("Cancelled after").wait_for()
    page.get_by_text("| Idle").wait_for()
    second_label(page, "q")  # answered by the kernel, which has lived on
    seen(page, "p & q")
    page.keyboard.press("Control+b")  # without the list of files
    fits(page)
