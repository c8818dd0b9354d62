"""Results that can be kept: parts, joins, files, pickles, previews, and what they say of themselves."""

import copy
import dataclasses
import json
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers_models import exact_model, three_rings
from gflownet_models import ENVIRONMENTS, perfect
from safetensors.torch import save_file

import sculpt
from sculpt.diagnostics import LEVELS, Diagnostics, Verdict
from sculpt.particles import Population
from sculpt.samples import Samples

RINGS = three_rings()
P, Q, _ = (exact_model(mixture, name=name) for mixture, name in zip(RINGS, "pqr", strict=True))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def diffusion(seed=7, **options):
    return (P - Q).sample(50, sculpt.Tracked(particles=200, **options), steps=12, generator=generator(seed), progress=False)


def gflownet(seed=7, **options):
    p, q = perfect(ENVIRONMENTS["grid-2d"](), 2)
    return (p & q).sample(50, sculpt.Tracked(particles=200, **options), generator=generator(seed))


MAKERS = {"diffusion": diffusion, "gflownet": gflownet, "weighted": lambda seed=7: diffusion(seed, resample=False)}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def same(one, two):
    weights = (one.log_weights is None) == (two.log_weights is None)
    weights = weights and (one.log_weights is None or torch.equal(one.log_weights, two.log_weights))
    return (
        type(one) is type(two)
        and torch.equal(one.x, two.x)
        and one.x.dtype == two.x.dtype
        and weights
        and one.diagnostics == two.diagnostics
    )


@makers
def test_a_result_is_the_same_after_a_file_and_after_a_pickle(make, tmp_path):
    samples = make()
    samples.save(tmp_path / "kept.safetensors")
    for again in (Samples.load(tmp_path / "kept.safetensors"), pickle.loads(pickle.dumps(samples))):
        assert same(again, samples)
        assert str(again.verdict) == str(samples.verdict) and repr(again) == repr(samples)
        assert torch.equal(again.decode(), samples.decode())
    assert samples.diagnostics.seed == 7


def test_the_file_says_what_it_is_without_sculpt(tmp_path):
    from safetensors import safe_open

    samples = diffusion()
    samples.save(tmp_path / "kept.safetensors")
    with safe_open(tmp_path / "kept.safetensors", "np") as file:
        about = json.loads(file.metadata()["sculpt"])
    assert about["formula"] == "p ◑ q" and about["seed"] == 7 and about["version"] == sculpt.__version__
    assert about["verdict"] == str(samples.verdict)
    samples.save(tmp_path / "arrays.npz")
    arrays = np.load(tmp_path / "arrays.npz")
    assert np.array_equal(arrays["x"], samples.x.numpy()) and json.loads(str(arrays["about"]))["formula"] == "p ◑ q"


def test_a_pickle_does_not_carry_the_model(tmp_path):
    network = torch.nn.Linear(1000, 1000)
    model = sculpt.Diffusion(lambda x, t: network.weight[:2, :2].sum() * x, P.scheduler, (2,), name="heavy")
    assert len(pickle.dumps(model.sample(10, steps=3, progress=False))) < 10_000
    # It is read where neither the model nor its library is.
    pickle.dump(diffusion(), (tmp_path / "kept.pickle").open("wb"))
    code = f"import pickle, sys; s = pickle.load(open({str(tmp_path / 'kept.pickle')!r}, 'rb')); print(s); print('diffusers' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "p ◑ q" in said and said.strip().endswith("False")


def test_images_decode_without_their_model_and_latents_ask_for_it(tmp_path):
    images = Samples(torch.randn(3, 1, 4, 4), decoder=sculpt.samples.pixels)
    images.save(tmp_path / "images.safetensors")
    assert torch.equal(Samples.load(tmp_path / "images.safetensors").decode(), images.decode())

    class Doubling:
        def decode(self, x):
            return 2 * x

    model = Doubling()
    latents = Samples(torch.ones(3, 2), decoder=model.decode)
    latents.save(tmp_path / "latents.safetensors")
    for lost in (Samples.load(tmp_path / "latents.safetensors"), pickle.loads(pickle.dumps(latents))):
        with pytest.raises(ValueError, match="read back without their model.*Samples.load\\(path, model=model\\)"):
            lost.decode()
    model.decoder = model.decode
    assert torch.equal(Samples.load(tmp_path / "latents.safetensors", model).decode(), latents.decode())


@makers
def test_slices_masks_and_single_samples(make):
    samples = make()
    n = len(samples)
    mask = torch.arange(n) % 3 == 0
    for index, rows in (
        (slice(5, 20), range(5, 20)), (-1, [n - 1]), ([3, 1, 1], [3, 1, 1]), (mask, mask.nonzero()[:, 0].tolist()), (torch.tensor([2, 0]), [2, 0]),
    ):  # fmt: skip
        part = samples[index]
        assert torch.equal(part.x, samples.x[list(rows)]) and part.diagnostics is samples.diagnostics
        if samples.log_weights is not None:
            assert torch.equal(part.log_weights, samples.log_weights[list(rows)])
    with pytest.raises(IndexError):
        samples[n]


@makers
def test_samples_of_several_runs_go_together(make):
    runs = [make(7), make(8)]
    whole = Samples.cat(runs)
    assert torch.equal(whole.x, torch.cat([run.x for run in runs])) and len(whole.diagnostics.parts) == 2
    assert whole.diagnostics.formula == runs[0].diagnostics.formula and whole.diagnostics.particles == 400
    z = [math.exp(run.log_z) for run in runs]
    assert (
        whole.log_z == pytest.approx(math.log(sum(z) / 2)) and whole.diagnostics.log_z_error < runs[0].diagnostics.log_z_error
    )
    assert whole.verdict.level == runs[0].verdict.level and "of 2 runs" in str(whole.verdict)


@makers
def test_slices_of_a_run_go_together_to_the_run_again(make):
    run, half = make(), 20
    for again in (Samples.cat([run[:half], run[half:]]), Samples.cat([run[:0], run[:half], run[half:]])):
        assert torch.equal(again.x, run.x) and again.diagnostics == run.diagnostics
        assert run.log_weights is None or torch.allclose(again.log_weights, run.log_weights)


def test_weighted_runs_count_as_much_as_their_z_says():
    def run(z, n, particles):
        return Samples(
            torch.zeros(n, 2),
            torch.full((n,), -math.log(n)),
            Diagnostics("t", "f", particles=particles, log_z=z, log_z_error=0.1),
        )

    whole = Samples.cat([run(math.log(3), 10, 100), run(math.log(1), 30, 100)])
    assert float(whole.log_weights[:10].exp().sum()) == pytest.approx(0.75)
    assert whole.log_z == pytest.approx(math.log(2))


def test_what_does_not_go_together_says_so():
    with pytest.raises(ValueError, match=r"Samples of \(2,\) and Samples of \(3,\)"):
        Samples.cat([Samples(torch.zeros(1, 2)), Samples(torch.zeros(1, 3))])
    with pytest.raises(ValueError, match="nothing to put together"):
        Samples.cat([])
    with pytest.raises(ValueError, match="Got 3 log-weights for 2 samples"):
        Samples(torch.zeros(2, 2), torch.zeros(3))


def test_samples_move_and_change_their_type():
    samples = diffusion().to(torch.float64)
    assert samples.x.dtype == torch.float64 and samples.diagnostics.formula == "p ◑ q"


def test_copies_keep_the_model_that_decodes():
    class Doubling:
        def decode(self, x):
            return 2 * x

    model = Doubling()
    samples = Samples(torch.ones(3, 2), torch.zeros(3), Diagnostics("t"), decoder=model.decode)
    for again in (copy.copy(samples), copy.deepcopy(samples)):
        assert again.decoder.__self__ is model and torch.equal(again.decode(), samples.decode()) and same(again, samples)
    shallow, deep = copy.copy(samples), copy.deepcopy(samples)
    assert shallow.x is samples.x and deep.x is not samples.x and deep.diagnostics is not samples.diagnostics


NAMES = [
    "",
    "p" * 5000,
    "名前 é 𝔘",
    "p & q | -r",
    "a\nb\tc\x00\x1b[31m",
    "'\"<b>&amp;</b>",
    "$x_{1$",
    "\u202eabc",
    "\ud800",
    "\\",
    "{0} %s",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_whatever_models_are_called_their_samples_are_kept_and_shown(tmp_path, name):
    said = Diagnostics("t", f"{name} & {name}", notes=[name], doubt=name)
    samples = Samples(torch.rand(4, 2), None, said)
    samples.save(tmp_path / "kept.safetensors")
    again = Samples.load(tmp_path / "kept.safetensors").diagnostics
    assert again == said or name == "\ud800"  # half a character: no file of text can hold it
    samples.save(tmp_path / "kept.npz")
    page, text = samples._repr_html_(), f"{samples!r}\n{samples.diagnostics}"
    assert "data:image/png" in page and '<img alt="samples of ' in page
    assert "<b>" not in page and len(page) < 10**6 and page.encode()
    assert all(c.isprintable() or c == "\n" for c in text) and text.encode() and len(text) < 10_000
    assert len(text.splitlines()) == 2 * len(str(samples.diagnostics).splitlines()) + 1


def test_runs_put_together_one_by_one_are_runs_side_by_side(tmp_path):
    def run(seed, formula="f"):
        return Samples(
            torch.zeros(1, 2), None, Diagnostics("t", formula, particles=10 + seed, log_z=0.1 * seed, log_z_error=0.1)
        )

    whole = run(0)
    for seed in range(1, 100):
        whole = Samples.cat([whole, run(seed)])
    at_once = Samples.cat([run(seed) for seed in range(100)])
    assert whole.diagnostics == at_once.diagnostics and len(whole.diagnostics.parts) == 100
    whole.save(tmp_path / "kept.safetensors")
    assert Samples.load(tmp_path / "kept.safetensors").diagnostics == whole.diagnostics
    several = Samples.cat([run(1), run(2, "g")])
    assert len(Samples.cat([several, run(3)]).diagnostics.parts) == 3
    mixture = dataclasses.replace(run(4).diagnostics, parts=[run(5, "g").diagnostics])
    assert len(Diagnostics.join([mixture, run(6).diagnostics]).parts) == 2


def test_nothing_and_nothing_are_nothing(tmp_path):
    none = Samples(torch.zeros(0, 2), torch.zeros(0))
    none.save(tmp_path / "kept.safetensors")
    again = Samples.load(tmp_path / "kept.safetensors")
    assert len(again) == len(Samples.cat([again, again])) == 0 and "no samples" in again._repr_html_()


def test_samples_with_too_much_to_say_for_a_file_say_so(tmp_path, monkeypatch):
    samples = Samples(torch.zeros(1, 2), None, Diagnostics("t", notes=["x" * 10**6] * 101))
    with pytest.raises(ValueError, match="1 samples have too much to say for one .safetensors file"):
        samples.save(tmp_path / "kept.safetensors")
    assert not list(tmp_path.iterdir())
    kept = Samples(torch.zeros(1, 2), None, Diagnostics("t", notes=["x" * 10**6] * 50))
    kept.save(tmp_path / "kept.safetensors")
    assert Samples.load(tmp_path / "kept.safetensors").diagnostics == kept.diagnostics


def test_far_cells_are_listed_and_not_drawn():
    kind, text = Samples(torch.tensor([[2**60, 2**61], [0, 1]])).picture()
    assert kind == "text" and str(2**60).encode() in text


# Files that are not what they should be ------------------------------------------------------------------------------


def nested(n):
    return [{"road": "x", "parts": nested(n - 1)}] if n else []


def rewritten(path, change):
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["sculpt"])
    tensors = load_file(path)
    change(about, tensors)
    save_file(tensors, path, {"sculpt": json.dumps(about)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about, tensors: about.update(format=99, version="9.9"), r"written by sculpt 9.9 in format 99, this sculpt .* reads format 1"),
        (lambda about, tensors: about.pop("format"), "format is missing, expected a whole number"),
        (lambda about, tensors: about.pop("diagnostics"), "diagnostics is missing, expected an object"),
        (lambda about, tensors: about.update({"class": "Popen"}), "'Popen' is not a Samples of this sculpt"),
        (lambda about, tensors: about.update({"class": "VectorNetwork"}), "'VectorNetwork' is not a Samples"),
        (lambda about, tensors: about["diagnostics"].update(road=[]), "diagnostics: road is a list of 0 entries, expected a text"),
        (lambda about, tensors: about["diagnostics"].update(surprise=1), "surprise is 1, expected no such entry"),
        (lambda about, tensors: about["diagnostics"].update(ess=[math.nan]), "ess is a list of 1 entries, expected numbers of particles"),
        (lambda about, tensors: about["diagnostics"].update(referee="x"), "acceptance is None, expected a number"),
        (lambda about, tensors: about["diagnostics"].update(parts=nested(70)), "nested deeper than"),
        (lambda about, tensors: tensors.pop("x"), "damaged.*'x'"),
        (lambda about, tensors: tensors.update(log_weights=torch.zeros(3)), r"log_weights is \(3,\), expected \(50,\)"),
        (lambda about, tensors: tensors.update(log_weights=torch.full((50,), math.nan)), "damaged"),
        (lambda about, tensors: tensors.update(x=torch.zeros(())), "damaged.*samples along the first axis"),
        (lambda about, tensors: tensors.update(x=torch.zeros(50, 2, dtype=torch.complex64)), "torch.complex64, expected real numbers"),
        (lambda about, tensors: tensors.update(y=torch.zeros(1)), "y is .*expected no such tensor"),
        (lambda about, tensors: about.update(decoder="eval"), "decoder is 'eval', expected one of '', 'pixels', 'model'"),
    ],
)  # fmt: skip
def test_a_file_of_another_version_or_damaged_is_refused(tmp_path, change, message):
    path = tmp_path / "kept.safetensors"
    diffusion().save(path)
    rewritten(path, change)
    with pytest.raises(ValueError, match=message):
        Samples.load(path)


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    path = tmp_path / "kept.safetensors"
    diffusion().save(path)
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="truncated or damaged"):
            Samples.load(path)
    with pytest.raises(ValueError, match="There is no file"):
        Samples.load(tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not a file of samples"):
        Samples.load(path)


def test_a_name_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    with pytest.raises(ValueError, match="expected a name that ends in .safetensors, .npz, .png"):
        diffusion().save(tmp_path / "x.pickle")
    with pytest.raises(ValueError, match="is a folder"):
        diffusion().save(tmp_path)
    assert not list(tmp_path.iterdir())


# Verdicts -------------------------------------------------------------------------------------------------------------


def weighted(log_w, selected=True):
    population = Population(len(log_w))
    population.reweight(log_w.double())
    diagnostics = Diagnostics("test")
    diagnostics.observe(population, selected=selected)
    return diagnostics


def test_a_verdict_is_a_level_and_a_reason():
    n = 1000
    cases = {
        "sound": weighted(torch.zeros(n)),
        "strained": weighted(torch.where(torch.arange(n) < 20, 6.0, 0.0)),
        "collapsed": weighted(50.0 * (torch.arange(n) == 0)),
        "biased": weighted(20.0 * (torch.arange(n) == 0), selected=False),
        "doubtful": dataclasses.replace(weighted(torch.zeros(n)), doubt="many dimensions."),
        "exact": Diagnostics("rejection", referee="the terminal head", acceptance=0.25),
    }
    for level, diagnostics in cases.items():
        verdict = diagnostics.verdict
        assert verdict.level == level and verdict.level in LEVELS and verdict.reason
        shown = level.upper() if verdict.trust == "bad" else level
        assert str(verdict) == f"{shown}: {verdict.reason}" and str(diagnostics).endswith(str(verdict))
    trust = {level: Verdict(level, "").trust for level in LEVELS}
    assert [trust[level] for level in ("exact", "sound", "thin", "strained", "biased", "doubtful", "collapsed", "uncovered")] == [
        "good", "good", "careful", "careful", "careful", "bad", "bad", "bad",
    ]  # fmt: skip


def test_rejection_says_what_decided():
    densities = lambda x: torch.stack([mixture.log_prob(x) for mixture in RINGS[:2]], -1)  # noqa: E731
    given = (P & Q).sample(20, sculpt.Rejection(densities), steps=8, generator=generator(), progress=False)
    assert "for the base samplers and the given densities" in str(given.verdict)
    p, q = perfect(ENVIRONMENTS["grid-2d"](), 2)
    assert "the models' own densities" in str((p & q).sample(20, sculpt.Rejection(), generator=generator()).verdict)


# Previews -------------------------------------------------------------------------------------------------------------


def test_a_notebook_sees_a_picture_the_diagnostics_and_the_verdict():
    for samples, mark in (
        (diffusion(), "data:image/png"),
        (Samples(torch.rand(4, 3, 8, 8), decoder=sculpt.samples.pixels), "data:image/png"),
        (Samples(torch.zeros(5, 7, dtype=torch.long)), "5 ×"),
    ):
        page = samples._repr_html_()
        assert mark in page and "sound" in page
    assert "effective share" in diffusion()._repr_html_() and "&lt;" not in diffusion()._repr_html_()
    lost = pickle.loads(pickle.dumps(Samples(torch.zeros(3, 2), decoder=lambda x: x)))
    assert "read back without their model" in lost._repr_html_()
