"""Roads as objects: their options, which models offer them, the generator behind ``sample``, and what nesting costs."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers_models import exact_model, three_rings
from gflownet_models import ENVIRONMENTS, perfect
from oracles import ExactGuide, GaussianMixture

import sculpt
from sculpt import MALA, Guided, Rejection, Road, Tracked
from sculpt.chain import Progress
from sculpt.diagnostics import Diagnostics
from sculpt.formula import Mixture, Posterior
from sculpt.model import BaseModel
from sculpt.roads import as_road

RINGS = three_rings()
P, Q, R = (exact_model(mixture, name=name) for mixture, name in zip(RINGS, "pqr", strict=True))
GUIDE = ExactGuide(RINGS[:2], [P.key, Q.key])
G, H = perfect(ENVIRONMENTS["grid-2d"](), 2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def log_densities(x):
    return torch.stack([mixture.log_prob(x) for mixture in RINGS[:2]], -1)


class Finished(BaseModel):
    """A base model that offers samples and nothing on the way to them."""

    shape, device = (2,), torch.device("cpu")

    def __init__(self, mixture, name):
        self.mixture, self.name = mixture, name

    @property
    def key(self):
        return f"finished {self.name}"

    def stream(self, n, road, settings):
        x = self.mixture.draw(n, settings.generator).float()
        yield Progress(f"sampling {self}", 0, None, n, n, None, self.result(x, None, Diagnostics("finished", str(self))))

    def check_composable(self, other):
        if not isinstance(other, Finished):
            raise ValueError(f"{self} and {other} have no states in common.")


A, B = (Finished(mixture, name) for mixture, name in zip(RINGS[:2], "ab", strict=True))


# Options -------------------------------------------------------------------------------------------------------------------------


def made(road, *arguments, **options):
    """The road as users make it: without the type checker of the tests, which would speak first."""
    one = object.__new__(road)
    road.__init__.__wrapped__(one, *arguments, **options)
    return one


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: made(Guided, None), TypeError, "Guided takes a classifier, from sculpt.fit or sculpt.load; got None"),
        (lambda: made(Guided, P), TypeError, "Guided takes a classifier.*got Diffusion"),
        (lambda: made(Guided, GUIDE, form="both"), ValueError, "form is 'anchored' or 'mixture', got 'both'"),
        (
            lambda: made(Guided, GUIDE, strength=-1),
            ValueError,
            "strength multiplies the guidance.* expected a number from 0, got -1",
        ),
        (lambda: made(Guided, GUIDE, strength=math.inf), ValueError, "expected a number from 0, got inf"),
        (lambda: made(Guided, GUIDE, strength=math.nan), ValueError, "expected a number from 0, got nan"),
        (lambda: made(Guided, GUIDE, correct="density"), ValueError, "correct is True, False or 'densities', got 'density'"),
        (lambda: made(Guided, GUIDE, correct=True, form="mixture"), ValueError, "Only the anchored form can be corrected"),
        (lambda: made(Guided, GUIDE, particles=10), ValueError, "add correct=True, or take sculpt.Tracked"),
        (lambda: made(Guided, GUIDE, threshold=0.3), ValueError, "add correct=True"),
        (lambda: made(Guided, GUIDE, resample=False), ValueError, "add correct=True"),
        (lambda: made(Guided, GUIDE, correct=True, particles=0), ValueError, "particles has to be at least 1, got 0"),
        (lambda: made(Guided, GUIDE, correct=True, threshold=1.1), ValueError, "between 0 .never. and 1; got 1.1"),
        (lambda: made(Tracked, particles=-3), ValueError, "particles has to be at least 1, got -3"),
        (lambda: made(Tracked, threshold=-0.1), ValueError, "between 0 .never. and 1; got -0.1"),
        (
            lambda: made(Rejection, 3),
            TypeError,
            "Rejection takes a classifier, or a function from samples to log-densities; got 3",
        ),
        (lambda: made(Rejection, GUIDE, max_draws=0), ValueError, "max_draws has to be at least 1, got 0"),
        # options of another road
        (lambda: Guided(GUIDE, corrector=MALA()), TypeError, "corrector: not an option of"),
        (lambda: Guided(GUIDE, max_draws=5), TypeError, "max_draws: not an option of"),
        (lambda: Tracked(strength=1), TypeError, "strength: not an option of"),
        (lambda: made(Tracked, detail=-1), ValueError, "detail is a noise level from 0, got -1"),
        (
            lambda: made(Rejection, GUIDE, detail=1.0),
            ValueError,
            "detail is a noise level from 0, and goes without a classifier",
        ),
        (lambda: Tracked(correct=True), TypeError, "correct: not an option of"),
        (lambda: Tracked(GUIDE), TypeError, "positional argument"),
        (lambda: Rejection(GUIDE, particles=10), TypeError, "particles: not an option of"),
        (lambda: (P & Q).sample(4, particles=10), TypeError, "particles: not an option of"),
        (lambda: (P & Q).sample(4, GUIDE, correct=True), TypeError, "correct: not an option of"),
        (lambda: (P & Q).run(4, stpes=3), TypeError, "stpes: not an option of"),
    ],
)
def test_wrong_options_fail_where_the_road_is_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_classifier_stands_for_guided_and_nothing_for_tracked():
    assert isinstance(as_road(None), Tracked) and isinstance(as_road(GUIDE), Guided) and as_road(GUIDE).classifier is GUIDE
    road = Rejection(GUIDE)
    assert as_road(road) is road
    options = {"steps": 6, "progress": False}
    for short, long in ((GUIDE, Guided(GUIDE)), (None, Tracked())):
        one, two = ((P & Q).sample(20, road, generator=generator(2), **options) for road in (short, long))
        assert torch.equal(one.x, two.x) and one.diagnostics == two.diagnostics
    for wrong in (Tracked, "tracked", log_densities, P):
        with pytest.raises(
            TypeError, match=r"where a road belongs: pass a classifier, sculpt.Guided\(classifier, ...\), .*sculpt.Rejection"
        ):
            as_road(wrong)


def test_a_road_of_ones_own_is_taken_like_the_others():
    class Exact(Road):
        def check(self, composition):
            if not isinstance(composition.formula, Mixture):
                raise ValueError(f"{composition} is no mixture.")

        def stream(self, composition, n, settings):
            self.check(composition)
            x = torch.cat([mixture.draw(n, settings.generator) for mixture in RINGS[:2]])[:n].float()
            yield Progress("exact", samples=composition.result(x, None, Diagnostics("exact", str(composition))))

    assert (P | Q).sample(5, Exact()).diagnostics.road == "exact"
    with pytest.raises(ValueError, match="p ⊗ q is no mixture"):
        (P & Q).sample(5, Exact())


# Roads that a model does not offer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        # models that offer finished samples only
        (lambda: (A & B).run(4), ValueError, "a offers finished samples only, .* Take sculpt.Rejection"),
        (lambda: ((A & B) | A).run(4), ValueError, "a offers finished samples only"),
        (
            lambda: (A & B).run(4, ExactGuide(RINGS[:2])),
            ValueError,
            "a offers finished samples only.*Take sculpt.Rejection",
        ),
        (
            lambda: (A & B).run(4, Rejection()),
            ValueError,
            r"needs a classifier of a, b, or a function .* sculpt.Rejection\(classifier\)",
        ),
        # one model has no roads
        (lambda: P.run(4, GUIDE), ValueError, r"p is one model, and roads lead to compositions; got .*, p.sample\(4\)"),
        (lambda: P.run(4, Tracked()), ValueError, "p is one model"),
        (lambda: G.run(4, Rejection()), ValueError, "is one model"),
        # a formula that the road does not know
        (
            lambda: (P | Q).run(4, GUIDE),
            ValueError,
            r"A classifier steers posteriors .*; p \| q is a mixture. Sample it without",
        ),
        (lambda: sculpt.product([P, Q], [1, 1]).run(4, GUIDE), ValueError, "p · q is a product. Sample it without"),
        (
            lambda: sculpt.product([P, Q], [1, 1]).run(4, Rejection(GUIDE)),
            ValueError,
            "p · q is a product. Sample it by tracked",
        ),
        (lambda: (sculpt.product([P, Q], [1, 1]) - R).run(4, Rejection(log_densities)), ValueError, "p · q is a product"),
        # populations that are none
        (
            lambda: (P | Q).run(4, Tracked(particles=10)),
            ValueError,
            r"particles, .* p \| q is sampled without: .* Leave them out",
        ),
        (lambda: (P | Q).run(4, Tracked(corrector=MALA())), ValueError, "corrector .* Leave them out"),
        (lambda: (P | Q).run(4, Tracked(resample=False)), ValueError, "Leave them out"),
        (lambda: sculpt.posterior([P], (0,)).run(4, Tracked(particles=10)), ValueError, "sampled without"),
        (lambda: ((P & Q) | R).run(4, Tracked(resample=False)), ValueError, r"resample=False: \(p ⊗ q\) \| r is a mixture"),
        # the anchor
        (
            lambda: (P & Q).run(4, Guided(GUIDE, anchor=2)),
            ValueError,
            r"anchor=2 is not an observed label; p ⊗ q observes \(0, 1\)",
        ),
        (lambda: (P - Q).run(4, Guided(GUIDE, anchor=Q)), ValueError, "anchor=q is not an observed label"),
        (lambda: (P & Q).run(4, Guided(GUIDE, anchor=R)), ValueError, "anchor=r is not an observed label"),
        (lambda: (P & Q).run(4, Rejection(GUIDE, anchor=2)), ValueError, "anchor=2 is not an observed label"),
        (lambda: (P | Q).run(4, Rejection(GUIDE, anchor=0)), ValueError, r"anchor=0: p \| q is a mixture, .* Leave it out"),
        # what diffusion and action models do not have
        (lambda: (P & Q).run(4, Guided(GUIDE, correct="densities")), ValueError, "correct is True or False for diffusion"),
        (
            lambda: (P & Q).run(4, Guided(GUIDE, correct=True), solver=DPMSolverMultistepScheduler()),
            ValueError,
            "needs the solver's own Gaussian kernel, and DPMSolverMultistepScheduler gives none .* Leave solver out",
        ),
        (
            lambda: G.run(4, steps=5),
            ValueError,
            "steps: not an option of .*, whose samples decide how many steps they take. Leave it out",
        ),
        (lambda: (G & H).run(4, steps=5, solver=1), ValueError, "steps, solver: not an option of"),
        (
            lambda: (G & H).run(4, Guided(ExactGuide(RINGS[:2]), strength=2)),
            ValueError,
            "steered by probabilities of actions; expected 1, got 2",
        ),
        # exports
        (
            lambda: type(P & Q).guided.__wrapped__(P & Q, Tracked()),
            TypeError,
            r"bound to a classifier, guided\(classifier\) or .*; got .*Tracked",
        ),
        (lambda: (P | Q).as_unet(GUIDE), ValueError, "A classifier steers posteriors"),
    ],
)
def test_a_road_that_a_composition_does_not_offer_says_so_before_anything_is_sampled(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: (P & Q).sample(4, Tracked(corrector="mala")), TypeError, r"MCMC kernel, .*sculpt.MALA\(\).*; got 'mala'"),
        (lambda: (P & Q).sample(4, Tracked(corrector=MALA)), TypeError, "MCMC kernel.*got <class"),
        (
            lambda: (G & H).sample(4, Tracked(corrector=MALA())),
            ValueError,
            "corrector: .* has no noise levels to run MCMC at. Leave it out",
        ),
        (
            lambda: (P & Q).sample(4, solver=DPMSolverMultistepScheduler()),
            ValueError,
            "solver: not an option of tracked densities",
        ),
        (
            lambda: (P & Q).sample(4, Rejection(lambda x: log_densities(x)[:, :1]), steps=3),
            ValueError,
            r"shape \(64, 1\) .* one column for each of p, q",
        ),
        (
            lambda: (P & Q).sample(4, Rejection(lambda x: log_densities(x) * math.nan), steps=3),
            FloatingPointError,
            "Check the function",
        ),
    ],
)
def test_what_only_the_chain_can_know_is_named_too(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_unet_of_models_without_a_scheduler_asks_for_one():
    models = [sculpt.EnergyModel(lambda z, s: z.square().sum(-1), (2,), name=name) for name in "ef"]
    with pytest.raises(ValueError, match="has no diffusers scheduler of its own: pass scheduler="):
        (models[0] & models[1]).as_unet(ExactGuide(RINGS[:2]))


def test_models_that_offer_finished_samples_have_rejection_and_mixtures():
    n = 4000
    x = (A & B).sample(n, Rejection(log_densities), generator=generator(1)).x.double()
    # Against the other road from the other side: draws of b, weighted with a / (a + b).
    y = RINGS[1].draw(100_000, generator(2))
    w = torch.log_softmax(log_densities(y), -1)[:, 0].softmax(0)
    mean, spread = w @ y, (w @ y.square() - (w @ y).square()).sqrt()
    assert ((x.mean(0) - mean).abs() < 5 * spread / math.sqrt(n)).all()
    mixed = (A | B).sample(n, generator=generator(3))
    assert len(mixed) == n and mixed.diagnostics.road == "a model picked per sample" and mixed.log_z == 0.0


@pytest.mark.parametrize("road", [None, Rejection(lambda x: x)], ids=["picked", "rejection"])
def test_samples_of_a_mixture_come_in_random_order(road):
    left, right = (Finished(GaussianMixture([[mean, 0.0]], 0.1), name) for mean, name in ((-5.0, "left"), (5.0, "right")))
    n = 2000
    from_right = sculpt.mixture(left, right, weights=[1, 3]).sample(n, road, generator=generator(1)).x[:, 0] > 0
    # Both halves hold three quarters, and neighbours differ with probability 3/8; five standard deviations.
    assert all(abs(float(half.double().mean()) - 0.75) < 5 * math.sqrt(3 / 16 / (n / 2)) for half in from_right.chunk(2))
    assert abs(float((from_right[1:] != from_right[:-1]).double().mean()) - 0.375) < 5 * math.sqrt(0.375 * 0.625 / n) * 1.5


def test_options_of_a_population_go_to_the_parts_that_have_one():
    composition = (P | Q) | sculpt.mixture(P & Q, R, weights=[1, 2]) | sculpt.mixture(P, R, weights=[1, 2])
    samples = composition.sample(30, Tracked(particles=50), steps=4, generator=generator(), progress=False)
    assert len(samples) == 30


def test_a_composition_that_is_one_model_is_sampled_as_that_model():
    options = {"steps": 6, "progress": False}
    for one, alone in ((P & P, P), (P - P, P), (sculpt.mixture(P, P), P)):
        x, y = (model.sample(20, generator=generator(3), **options) for model in (one, alone))
        assert torch.equal(x.x, y.x) and x.diagnostics.formula == str(one)
    road = Tracked(particles=60, resample=False)
    inner = sculpt.posterior([P & Q], (0, 0))
    x, y = (model.sample(20, road, generator=generator(3), **options) for model in (inner, P & Q))
    assert torch.equal(x.x, y.x) and torch.equal(x.log_weights, y.log_weights)
    assert x.diagnostics.ess == y.diagnostics.ess and x.diagnostics.formula == str(inner)


# The generator behind sample ---------------------------------------------------------------------------------------------------------


STEPS = 6
RUNS = {
    "base": (P, None, 20),
    "guided": (P & Q, GUIDE, 20),
    "mixture form": (P & Q, Guided(GUIDE, form="mixture"), 20),
    "corrected": (P & Q, Guided(GUIDE, correct=True, particles=30), 30),
    "tracked": (P - Q, Tracked(particles=40), 40),
    "one model": (P & P, None, 20),
    "mixture": (P | Q, None, None),
    "nested": ((P & Q) - R, Tracked(particles=40), 40),
    "rejection": (P & Q, Rejection(GUIDE), None),
}


@pytest.mark.parametrize("name", RUNS)
def test_run_is_the_generator_of_sample(name):
    model, road, _ = RUNS[name]
    *way, last = model.run(20, road, steps=STEPS, generator=generator(4))
    samples = model.sample(20, road, steps=STEPS, generator=generator(4), progress=False)
    assert torch.equal(last.samples.x, samples.x) and last.samples.diagnostics == samples.diagnostics
    assert len(way) > STEPS and all(progress.samples is None for progress in way)
    assert last.samples.diagnostics.formula == str(model)


@pytest.mark.parametrize("name", ["base", "guided", "mixture form", "corrected", "tracked", "one model"])
def test_a_run_tells_every_step(name):
    model, road, n = RUNS[name]
    way = list(model.run(20, road, steps=STEPS, generator=generator(4)))
    assert [progress.step for progress in way] == [*range(STEPS + 1), STEPS]
    assert {(progress.steps, progress.n) for progress in way} == {(STEPS, n)}
    assert [progress.ended for progress in way] == [0] * STEPS + [n, n]
    assert {progress.title for progress in way} == {"sampling p" if name == "one model" else f"sampling {model}"}
    weighted = name in ("guided", "corrected", "tracked")
    assert way[0].effective is None and all((progress.effective is not None) == weighted for progress in way[1:])


def test_a_run_of_a_nested_composition_tells_of_every_inner_run():
    composition = ((P & Q) - R) & sculpt.product([P, R], [1, 0.5])
    way = list(composition.run(20, Tracked(particles=40), steps=STEPS, generator=generator(4)))
    titles = [f"sampling {part}" for part in ("p ⊗ q", "(p ⊗ q) ◑ r", "p · r^0.5", str(composition))]
    assert list(dict.fromkeys(progress.title for progress in way)) == titles
    for title in titles:
        steps = [progress.step for progress in way if progress.title == title]
        assert steps == [*range(STEPS + 1)] + [STEPS] * (title == titles[-1])
    assert {(progress.steps, progress.n) for progress in way} == {(STEPS, 40)}


def test_what_a_bound_composition_cannot_do_is_refused():
    for bind in (P & Q).guided, (P & Q).as_unet:
        with pytest.raises(ValueError, match="corrects a population of particles.*Leave correct out here"):
            bind(Guided(GUIDE, correct=True))


def test_a_run_of_a_mixture_tells_of_every_part():
    *way, last = ((P & Q) | R).run(50, Tracked(particles=60), steps=STEPS, generator=generator(4))
    for title in ("sampling p ⊗ q", "sampling r"):
        assert [progress.step for progress in way if progress.title == title] == [*range(STEPS + 1)]
    assert {progress.steps for progress in way} == {STEPS} and last.step == last.steps == STEPS
    assert last.ended == last.n == len(last.samples) == 50 and last.title == "sampling (p ⊗ q) | r"


def test_a_run_of_rejection_tells_how_many_are_kept():
    seldom = sculpt.harmonic_mean(P, Q, 0.9)
    *way, last = seldom.run(200, Rejection(GUIDE, anchor=0), steps=STEPS, generator=generator(4))
    kept = [progress for progress in way if progress.title == "rejection from p"]
    assert len(kept) > 1 and {(progress.steps, progress.n) for progress in kept} == {(None, 200)}
    counts = [progress.ended for progress in kept]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] < 200
    # One bar for all of it, and a chance to leave after every step of the anchor.
    assert len(kept) == len(way) > 2 * STEPS


@pytest.mark.parametrize("name", RUNS)
def test_leaving_a_run_stops_the_calls_of_networks(name):
    model, road, _ = RUNS[name]
    calls = []
    hooks = [leaf.model.register_forward_hook(lambda *_: calls.append(1)) for leaf in (P, Q, R)]
    way = model.run(20, road, steps=STEPS, generator=generator(4))
    assert not calls  # nothing is computed before the first look
    seen = [next(way) for _ in range(4)]
    way.close()
    few = len(calls)
    assert 0 < few < STEPS * 3 and len(list(way)) == 0 and len(calls) == few and not seen[-1].samples
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", RUNS)
def test_a_run_leaves_gradients_on_in_the_code_that_looks_at_it(name):
    model, road, _ = RUNS[name]
    assert torch.is_grad_enabled()
    for _ in model.run(20, road, steps=3, generator=generator(4)):
        assert torch.is_grad_enabled()


class Linear(torch.nn.Module):
    """A network whose weights want gradients."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x, t):
        return self.layer(x)


U, V, W = (sculpt.Diffusion(Linear(seed), P.scheduler, (2,), name=name) for seed, name in enumerate("uvw"))
WRONG = ExactGuide(RINGS[:2])


@pytest.mark.parametrize(
    ("model", "road"),
    [
        (U, None),
        (U | V, None),
        (U & V, WRONG),
        (U & V, Guided(WRONG, form="mixture")),
        (U - V, Guided(WRONG, correct=True, particles=20)),
        ((U & V) - W, Tracked(particles=20)),
        (U & V, Rejection(WRONG)),
    ],
    ids=range(7),
)
def test_samples_carry_no_graph_of_the_networks(model, road):
    assert not model.sample(5, road, steps=3, generator=generator(), progress=False).x.requires_grad


# What nesting costs ------------------------------------------------------------------------------------------------------------------


def deep(depth):
    composition = P
    for k in range(depth):
        composition = composition & Q if k % 2 == 0 else composition - R
    return composition


def test_printing_is_linear_in_the_depth(monkeypatch):
    work, write, text = [], Posterior.write, BaseModel.__str__
    monkeypatch.setattr(Posterior, "write", lambda self, names: work.append(1) or write(self, names))
    monkeypatch.setattr(BaseModel, "__str__", lambda self: work.append(1) or text(self))

    def calls(depth):
        work.clear()
        composition = deep(depth)
        assert str(composition).count("(") == depth - 1 and str(composition) in repr(composition)
        return len(work)

    four, eight, sixteen = calls(4), calls(8), calls(16)
    assert sixteen - eight == 2 * (eight - four) and sixteen < 16 * 5


def test_a_sample_of_a_composition_of_depth_16_takes_one_run_for_each_inner_composition_and_its_own(monkeypatch):
    made, tracked = [], type(P).tracked

    def spy(self, formula, models, settings, *rest):
        made.append(formula.m)
        return tracked(self, formula, models, settings, *rest)

    monkeypatch.setattr(type(P), "tracked", spy)
    composition = deep(16)
    samples = composition.sample(4, Tracked(particles=200), steps=3, generator=generator(), progress=False)
    assert len(made) == 16 and len(samples) == 4
    # From the inside out, each once, with its error.
    names = [
        note.removeprefix("log Z of ").partition(": ")[0] for note in samples.diagnostics.notes if note.startswith("log Z")
    ]
    assert names == [str(deep(k)) for k in range(1, 16)]
    for note in samples.diagnostics.notes:
        assert " ± " not in note or float(note.partition(" ± ")[2]) > 0


def test_an_inner_composition_in_two_places_is_normalised_once(monkeypatch):
    made, tracked = [], type(P).tracked

    def spy(self, *arguments):
        made.append(arguments[0])
        return tracked(self, *arguments)

    monkeypatch.setattr(type(P), "tracked", spy)
    composition = ((P & Q) - R) & sculpt.product(
        [sculpt.harmonic_mean(P, Q), R], [1, 0.5]
    )  # another object of the same formula
    samples = composition.sample(20, Tracked(particles=400), steps=12, generator=generator(), progress=False)
    notes = [note.partition(": ")[0] for note in samples.diagnostics.notes]
    assert notes == ["log Z of p ⊗ q", "log Z of (p ⊗ q) ◑ r", "log Z of (p ⊗ q) · r^0.5"] and len(made) == 4
    z = float(samples.diagnostics.notes[0].partition(": ")[2].split(" ± ")[0])
    outer = made[-1]
    assert [part.log_z[0] for part in outer.parts] == pytest.approx([z, z], abs=1e-3)


def test_rejection_normalises_an_inner_composition_once_too():
    densities = lambda x: torch.stack([mixture.log_prob(x) for mixture in RINGS], -1)  # noqa: E731
    composition = sculpt.posterior([(P & Q) - R, sculpt.harmonic_mean(P, Q)], (0, 1))
    samples = composition.sample(300, Rejection(densities), steps=12, generator=generator(), progress=False)
    notes = [note.partition(": ")[0] for note in samples.diagnostics.notes[1:]]
    assert sorted(notes) == ["log Z of (p ⊗ q) ◑ r", "log Z of p ⊗ q"]
    assert all(float(note.partition(" ± ")[2]) > 0 for note in samples.diagnostics.notes[1:])


# Gradients of a guided denoiser -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [0.3, 2.0])
@pytest.mark.parametrize("options", [{}, {"form": "mixture"}, {"strength": 1.7}, {"anchor": 1}], ids=str)
def test_gradients_flow_through_a_guided_denoiser(options, s):
    guided = (P & Q).guided(Guided(GUIDE, **options))
    z, g = RINGS[0].draw(6, generator(), v=s**2), generator(1)
    towards, cotangent = torch.randn(2, 6, 2, dtype=torch.float64, generator=g)
    x = z.clone().requires_grad_()
    D = guided.denoise(x, s)
    (gradient,) = torch.autograd.grad((D * cotangent).sum(), x)
    h = 1e-4 * s
    difference = (guided.denoise(z + h * towards, s) - guided.denoise(z - h * towards, s)) / (2 * h)
    torch.testing.assert_close((gradient * towards).sum(1), (difference * cotangent).sum(1), rtol=1e-4, atol=1e-5)
    # The same number with gradients and without, whoever asks.
    torch.testing.assert_close(D.detach(), guided.denoise(z, s), rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(guided.denoise(x, s), D.detach(), rtol=0, atol=1e-12)
    per_sample = guided.denoise(x, torch.full((6,), s, dtype=torch.float64))
    torch.testing.assert_close(per_sample, D, rtol=0, atol=1e-9)
    (other,) = torch.autograd.grad((per_sample * cotangent).sum(), x)
    torch.testing.assert_close(other, gradient, rtol=1e-6, atol=1e-9)
