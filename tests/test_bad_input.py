"""Bad input: every wrong call is refused before time is spent, with what was got, what was expected and what to do next."""

import math
import subprocess
import sys
import warnings

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from diffusers_models import exact_model, three_rings
from oracles import ExactGuide, GaussianMixture
from torch import nn

import sculpt
from sculpt import Classifier, Guided, Rejection, Tracked
from sculpt.apps import cli
from sculpt.apps.cli.options import named_paths
from sculpt.apps.formulas import TextFormula
from sculpt.chain import check_count
from sculpt.diffusion.backbones import VectorNetwork
from sculpt.diffusion.clock import noise_levels

RINGS = three_rings()
P, Q, R = (exact_model(mixture, name=name) for mixture, name in zip(RINGS, "pqr", strict=True))
GUIDE = ExactGuide(RINGS[:2], [P.key, Q.key])
NAN = float("nan")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def classifier_of(*models, observations=2):
    torch.manual_seed(0)
    return Classifier(VectorNetwork(2, width=8), [model.key for model in models], observations).eval().requires_grad_(False)


def broken(where, name="broken", mixture=RINGS[0]):
    """The exact network, with NaN for the rows and times where ``where(z, t)`` holds."""
    exact = exact_model(mixture).model

    def network(x, t):
        out = exact(x, t)
        return torch.where(where(x, t).expand(len(x))[:, None], NAN, out)

    return sculpt.Diffusion(network, DDPMScheduler(clip_sample=False), (2,), name=name)


# What a run is told beside its road ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: (P & Q).sample(0), "at least 1, got n=0"),
        (lambda: (P & Q).sample(-3, GUIDE), "at least 1, got n=-3"),
        (lambda: (P | Q).sample(0), "at least 1"),
        (lambda: P.sample(0), "at least 1"),
        (lambda: (P & Q).sample(0, Rejection(GUIDE)), "at least 1"),
        (lambda: (P & Q).sample(100, Tracked(particles=50)), "particles=50 cannot give n=100"),
        (lambda: (P & Q).sample(100, Guided(GUIDE, correct=True, particles=50)), "particles=50 cannot give n=100"),
        (lambda: (P & Q).sample(4, steps=1), "at least 2 steps, got 1"),
        (lambda: (P & Q).sample(4, GUIDE, steps=0), "at least 2 steps, got 0"),
        (lambda: P.sample(4, steps=0, solver=DPMSolverMultistepScheduler()), "at least 1 step, got 0"),
        (lambda: (P & Q).sample(4, GUIDE, batch_size=0), "batch_size has to be at least 1, got 0"),
        (lambda: (P - Q).sample(4, batch_size=-1), "batch_size has to be at least 1, got -1"),
        # tracked densities and correction need a kernel of their own
        (
            lambda: (P & Q).sample(4, solver=DPMSolverMultistepScheduler()),
            "solver: not an option of tracked densities, .* Leave it out",
        ),
        (
            lambda: (P & Q).sample(4, Guided(GUIDE, correct=True), solver=DPMSolverMultistepScheduler()),
            "DPMSolverMultistepScheduler gives none",
        ),
    ],
)
def test_a_number_or_a_solver_that_makes_no_sense_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("n", [2.0, "16", True, None])
def test_the_number_of_samples_is_a_whole_number(n):
    with pytest.raises(TypeError, match=f"The number of samples is a whole number, got n={n!r}"):
        check_count(n)


def test_a_solver_that_is_no_scheduler_is_refused():
    with pytest.raises(TypeError, match="solver is a diffusers scheduler, e.g. .*got 'ddim'"):
        (P & Q).sample(4, GUIDE, solver="ddim")


def test_odds_without_a_classifier_for_them_are_refused_before_sampling():
    calls = []
    model = exact_model(RINGS[0], name="p")
    model.model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=r"sculpt.fit\(models, odds=True\)"):
        sculpt.harmonic_mean(model, Q, 0.9).sample(4, classifier_of(model, Q), progress=False)
    assert not calls


# Classifiers of other models -------------------------------------------------------------------------------------------------------------


def test_a_classifier_of_other_models_labels_or_numbers_is_refused():
    pq = classifier_of(P, Q)
    for call, message in (
        (lambda: (P & R).sample(4, pq), r"r \(key .*is not among its keys"),
        (lambda: (P & Q & R).sample(4, pq), "knows 2 base models, the composition has 3"),
        (lambda: sculpt.posterior([P, Q], (0, 1, 1)).sample(4, pq), "observations=3"),
        (lambda: ((P & Q) - R).sample(4, pq), "fitted for other base models"),
        (lambda: (P & R).sample(4, Rejection(pq)), "fitted for other base models"),
        (lambda: ((P & Q) - R).sample(4, Rejection(pq)), "knows 2 base models, the composition has 3"),
        (lambda: (P & Q & R).as_unet(pq), "knows 2 base models"),
        (lambda: (P | Q).sample(4, pq), "steers posteriors"),
        (lambda: sculpt.product([P, Q], [1, 1]).as_unet(pq), "steers posteriors"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_same_weights_with_another_schedule_are_another_model_to_a_classifier():
    with pytest.raises(ValueError, match="fitted for other base models"):
        (exact_model(RINGS[0], "cosine", name="p") & Q).sample(4, classifier_of(P, Q))


def test_an_anchor_that_is_a_composition_without_its_classifier_is_refused_with_the_way_out():
    inner = P & Q
    classifier = classifier_of(inner, R)
    for form in ("anchored", "mixture"):
        with pytest.raises(
            ValueError, match=r"p ⊗ q is a composition without a classifier of its own.*inner.guided\(its_classifier\)"
        ):
            (inner - R).sample(4, Guided(classifier, form=form), progress=False)


# Models that do not fit --------------------------------------------------------------------------------------------------------------------


def test_models_without_a_common_noise_level_are_refused():
    low = sculpt.EnergyModel(lambda z, s: (z**2).sum(-1), (2,), s_min=0.01, s_max=0.1, name="low")
    high = sculpt.EnergyModel(lambda z, s: (z**2).sum(-1), (2,), s_min=1.0, s_max=10.0, name="high")
    with pytest.raises(ValueError, match="none in common"):
        low & high
    with pytest.raises(ValueError, match="share no noise level: high .*low"):
        noise_levels([low, high], 10)


# Numbers that are not finite ------------------------------------------------------------------------------------------------------------------


def late(x, t):
    return torch.as_tensor(t).reshape(-1)[:1] < 300


def test_nan_from_a_network_names_the_model_and_the_step():
    calls = {
        "base": lambda: broken(late).sample(8, steps=20),
        "mixture": lambda: (broken(late) | Q).sample(8, steps=20),
        "tracked": lambda: (broken(late) & Q).sample(8, Tracked(particles=16), steps=20),
        "guided": lambda: (broken(late) & Q).sample(8, ExactGuide(RINGS[:2]), steps=20),
        "corrected": lambda: (broken(late) & Q).sample(8, Guided(ExactGuide(RINGS[:2]), correct=True), steps=20),
        "mixture form": lambda: (broken(late) & Q).sample(8, Guided(ExactGuide(RINGS[:2]), form="mixture"), steps=20),
        "rejection": lambda: (broken(late) & Q).sample(8, Rejection(ExactGuide(RINGS[:2])), steps=20),
        "solver": lambda: broken(late).sample(8, steps=20, solver=DPMSolverMultistepScheduler()),
    }
    for road, call in calls.items():
        with (
            pytest.raises(FloatingPointError, match=r"broken.* not finite for \d+ of \d+ samples at step \d+ \([st]="),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            call()
        assert road


def test_nan_from_a_classifier_names_the_classifier_and_the_step():
    class Nan(ExactGuide):
        def log_h(self, z, s, *, labels, odds=None):
            return super().log_h(z, s, labels=labels, odds=odds) * torch.where(s.max() < 1.0, NAN, 1.0)

    for correct in (False, True):
        with pytest.raises(FloatingPointError, match=r"the classifier of p ⊗ q gave .* at step \d+ \(s="):
            (P & Q).sample(8, Guided(Nan(RINGS[:2]), correct=correct), steps=20, progress=False)


@pytest.mark.filterwarnings("ignore:.*lose their weight")
def test_particles_with_nan_lose_their_weight_and_never_win():
    # NaN wherever the first coordinate is positive, from half of the way on: what survives is the target's other half.
    model = broken(lambda x, t: (x[:, 0] > 0) & (torch.as_tensor(t).reshape(-1)[:1] < 500), name="half")
    with pytest.warns(UserWarning, match=r"half gave numbers that are not finite for \d+ of 2000 particles at step \d+"):
        samples = (model & Q).sample(500, Tracked(particles=2000), steps=48, generator=generator(), progress=False)
    assert samples.x.isfinite().all() and math.isfinite(samples.log_z)
    assert (samples.x[:, 0] > 0.3).double().mean() < 0.01
    lost = int(next(note for note in samples.diagnostics.notes if "lost" in note).split()[0])
    assert lost > 100
    whole = (P & Q).sample(500, Tracked(particles=2000), steps=48, generator=generator(), progress=False)
    assert samples.log_z < whole.log_z  # mass that was lost is missing from Z


def test_a_population_that_is_lost_altogether_names_the_model():
    with pytest.raises(FloatingPointError, match="broken gave numbers that are not finite"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (broken(late) - Q).sample(10, Tracked(particles=50), steps=20, progress=False)


def test_a_network_that_answers_with_another_shape_is_refused_at_construction():
    with pytest.raises(ValueError, match="shape"):
        sculpt.Diffusion(lambda x, t: x[:, :1], DDPMScheduler(), (2,), name="narrow")


def test_models_that_hardly_overlap_are_reported_as_collapsed_or_refused():
    far = exact_model(GaussianMixture([[40.0, 0.0]], 0.1), name="far")
    near = exact_model(GaussianMixture([[-40.0, 0.0]], 0.1), name="near")
    try:
        samples = (near & far).sample(100, Tracked(particles=400), steps=32, generator=generator(), progress=False)
    except FloatingPointError as error:
        assert "more particles or steps" in str(error)
    else:
        assert samples.verdict.level == "collapsed"


class NoConfig(nn.Module):
    def forward(self, x, t):
        return x


def test_a_network_whose_shape_cannot_be_read_asks_for_it():
    with pytest.raises(ValueError, match="shape="):
        sculpt.Diffusion(NoConfig(), DDPMScheduler())


# The command ----------------------------------------------------------------------------------------------------------------------------------

A = ("--model", "a=nowhere/at/all")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sample", "a", *A, "-o", "x.npz", "-n", "²"), "'²' is no whole number from 1 on"),
        (("sample", "a", *A, "-o", "x.npz", "-n", "9" * 30), "is no whole number from 1 on"),
        (("sample", "a", *A, "-o", "x.npz", "-n", "9" * 5000), "is no whole number from 1 on"),
        (("sample", "a", *A, "-o", "x.npz", "--seed", "-1"), "'-1' is no whole number from 0 on"),
        (("demo", "--seed", str(10**30)), "is no whole number from 0 on"),
        (("sample", "a", *A, "-o", "x.npz", "--device", "nonsense"), "--device nonsense: Expected one of cpu, cuda"),
        (("sample", "a", *A, "-o", "x.npz", "--device", "cuda:99"), "--device cuda:99: "),
        (("sample", "a", *A, "-o", "x.npz", "--device", "meta"), "--device meta holds no numbers"),
        (("sample", "a", *A, "-o", "x.npz", "--with", "a.device=3"), "--with a.device=3: device is no condition"),
        (("sample", "a", "--model", "if=x", "-o", "x.npz"), "--model if=x: expected NAME=PATH"),
        (("sample", "(" + "-" * 9000 + "a)", *A, "-o", "x.npz"), "is not complete"),
        (("sample", "a & " * 200 + "a", *A, "-o", "x.npz"), "more than 100 parts are within each other"),
        (("sample", "mixture(a, weights=[1], weights=[2])", *A, "-o", "x.npz"), "an option is there twice"),
        (("sample", "product([a], [1e999])", *A, "-o", "x.npz"), "the number is too large"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(capsys, arguments, message):
    try:
        code = cli.main(arguments)
    except SystemExit as end:  # argparse
        code = end.code
    said = capsys.readouterr().err.rstrip().splitlines()
    assert code == 2 and message in said[-1] and len(said[-1]) < 1000, said
    assert not any(line.startswith("Traceback") for line in said)


def test_a_name_is_read_as_formulas_read_it(tmp_path):
    assert list(named_paths([f"ﬁ={tmp_path}"])) == TextFormula("ﬁ").names == ["fi"]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            KeyError("width"),
            1,
            "sculpt: error: KeyError: 'width'. This is a bug in sculpt; run again with --traceback to see where.",
        ),
        (AssertionError(), 1, "sculpt: error: AssertionError: AssertionError. This is a bug in sculpt"),
        (ValueError("one\ntwo"), 2, "sculpt: error: one two\n"),
        (MemoryError(), 2, "sculpt: error: there is not enough memory; ask for fewer samples"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "sculpt: error: there is not enough memory"),
        (BrokenPipeError(), 141, ""),
        (KeyboardInterrupt(), 130, "\nsculpt: stopped. Nothing was written.\n"),
    ],
)
def test_no_error_of_a_command_shows_a_traceback_unless_it_is_asked_for(monkeypatch, capsys, error, code, message):
    def fails(options):
        raise error

    monkeypatch.setattr(cli.inspect, "_run", fails)
    assert cli.main(["inspect", "x"]) == code
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) <= 1
    if code in (1, 2):
        with pytest.raises(type(error)):
            cli.main(["inspect", "x", "--traceback"])


def test_a_reader_that_has_had_enough_ends_the_command_quietly():
    script = "import sys; from sculpt.apps import cli; cli.demo._run = lambda o: [print('x' * 70) for _ in range(10**5)]; sys.exit(cli.main(['demo']))"
    first = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first.stdout.readline()
    first.stdout.close()
    assert first.wait(120) == 141 and first.stderr.read() == b""
