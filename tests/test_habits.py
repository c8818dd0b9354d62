"""What people do by habit works, or says what to write: moving, other libraries' words, and, or and not, looking at things."""

import math
import re
from pathlib import Path

import pytest
import torch
from checkpoints import save_pipeline
from diffusers import DDPMPipeline
from gflownet_models import ENVIRONMENTS, network_policy
from molecule_models import molecule_model
from token_models import recurrent_models

import sculpt
from sculpt.formula import Mixture, Posterior, PowerMean, Product, Tilted
from sculpt.gflownet.environments import describe, on_device, rules
from sculpt.habits import WORDS
from sculpt.looks import target

GRID = Path(__file__).parents[1] / "pretrained" / "grid"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("pq"):
        save_pipeline(home / name, seed)
        env = ENVIRONMENTS["grid-2d"]()
        sculpt.GFlowNet(env, network_policy(env, seed), name=name).save_pretrained(home / f"grid-{name}")
    return home


def drawn(model, **options):
    return model.sample(4, generator=torch.Generator().manual_seed(0), progress=False, **options).x


# Moving -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [("p", {"steps": 3}), ("grid-p", {})])
def test_a_model_that_moves_to_a_precision_is_the_one_that_is_loaded_in_it(folders, name, options):
    moved, loaded = sculpt.load(folders / name), sculpt.load(folders / name, dtype=torch.float64)
    before = moved.key
    assert moved.to(torch.float64) is moved
    assert moved.key == loaded.key != before
    assert torch.equal(drawn(moved, **options), drawn(loaded, **options))
    halved = sculpt.load(folders / name).half()
    assert {p.dtype for network in halved.networks for p in network.parameters()} == {torch.float16}


def test_a_composition_moves_all_that_is_in_it(folders):
    p, q = (sculpt.load(folders / name) for name in "pq")
    nested = (p | q) - p
    nested.to("cpu", torch.float64)
    assert p.dtype == q.dtype == torch.float64
    network = (p & q).as_unet()
    assert network.to(torch.float32).dtype == torch.float32 and p.dtype == q.dtype == torch.float64  # which are the caller's


def test_a_guided_composition_moves_its_models_and_its_heads_keep_their_precision():
    p, q, classifier = (sculpt.load(GRID / name) for name in ("symmetric_shubert", "diag_sigmoid", "pair"))
    guided = (p & q).guided(classifier)
    guided.to(torch.float64)
    assert {weight.dtype for model in (p, q) for weight in model.policy.parameters()} == {torch.float64}
    assert next(classifier.parameters()).dtype == torch.float32
    assert len(guided.sample(5, progress=False)) == 5


def test_what_cannot_move_says_so(folders):
    p = sculpt.load(folders / "grid-p")
    with pytest.raises(TypeError, match=r"Where to\? Pass a device"):
        p.to()
    with pytest.raises(TypeError, match="floating-point numbers, got torch.int64"):
        p.to(torch.int64)
    function = sculpt.Tokens(lambda tokens, cache: (torch.zeros(*tokens.shape, 3), None), vocabulary=3, end=2, name="flat")
    with pytest.raises(ValueError, match="flat has no networks to move"):
        function.to("cpu")


def test_samples_are_halved_and_their_weights_stay():
    samples = sculpt.Samples(torch.randn(3, 2), torch.randn(3))
    assert samples.half().x.dtype == torch.float16 and torch.equal(samples.half().log_weights, samples.log_weights)


# Words --------------------------------------------------------------------------------------------------------------------------


def test_other_libraries_words_are_answered_by_ours(folders, unchecked):
    p = sculpt.load(folders / "p")
    for option, said in {
        "seed": "generator=torch.Generator",
        "num_inference_steps": "steps=",
        "num_images_per_prompt": "n, the",
    }.items():
        with pytest.raises(TypeError, match=f"{option}: sample calls it .*{said}"):
            p.sample(2, **{option: 1})
    with pytest.raises(TypeError, match="torch_dtype: sculpt.load calls it dtype="):
        sculpt.load(folders / "p", torch_dtype=torch.float16)
    with pytest.raises(TypeError, match=r"seed: loading draws nothing. Pass sample\(n, generator="):
        sculpt.load(folders / "p", seed=0)
    with pytest.raises(TypeError, match="particles: not an option of sample, .* sculpt.Guided"):
        p.sample(2, particles=3)


def test_every_word_has_an_option_that_is_there():
    import inspect

    known = {*inspect.signature(sculpt.BaseModel.sample).parameters, *inspect.signature(sculpt.load).parameters}
    assert {re.match(r"\w+", said)[0] for said in WORDS.values()} <= known


def test_and_or_and_not_say_what_to_write(folders):
    p, q = (sculpt.load(folders / f"grid-{name}") for name in "pq")
    for python in (lambda: p and q, lambda: p or q, lambda: not p, lambda: p & q if p & q else None):
        with pytest.raises(TypeError, match=r"Write p & q \(likely under both\)"):
            python()


def test_wrong_kinds_are_refused_at_once(folders, unchecked):
    p, q = (sculpt.load(folders / f"grid-{name}") for name in "pq")
    with pytest.raises(TypeError, match="n=10.5"):
        p.sample(10.5)
    with pytest.raises(TypeError, match=r"Got 'pair' where a road belongs.* loaded first: sculpt.load\('pair'\)"):
        (p & q).sample(3, "pair")
    with pytest.raises(TypeError, match=r"Got GFlowNet\('p', .*where a road belongs"):
        (p & q).sample(5, p)
    for one in (p, p & q):
        with pytest.raises(TypeError, match="models has to be a list of base models, got GFlowNet"):
            sculpt.fit(one)
    with pytest.raises(TypeError, match="steps has to be a whole number, got 1.5"):
        sculpt.fit([p, q], steps=1.5)


def test_a_pipeline_with_a_composition_in_it_is_not_saved_and_says_what_is(folders, tmp_path):
    p, q = (sculpt.load(folders / name) for name in "pq")
    pipe = DDPMPipeline(unet=(p & q).as_unet(), scheduler=p.scheduler)
    with pytest.raises(
        ValueError, match=r"p ⊗ q is no network with weights of its own.* sculpt.distill\(composition, checkpoint=folder\)"
    ):
        pipe.save_pretrained(tmp_path / "pipe")
    assert not (tmp_path / "pipe" / "model_index.json").exists()


# Looking ------------------------------------------------------------------------------------------------------------------------


def test_models_are_one_line_with_what_counts(folders):
    p, q = (sculpt.load(folders / name) for name in "pq")
    size = sum(weight.numel() for weight in p.model.parameters())
    assert repr(p) == f"Diffusion('p', shape=(1, 8, 8), parameters={size:,}, device=cpu, dtype=float32, s=0.01 to 157)"
    assert repr(p - q) == f"DiffusionComposition('p ◑ q', written=p - q, shape=(1, 8, 8), parameters={2 * size:,}, device=cpu)"
    assert f"parameters={2 * size:,}" in repr((p & q) | p)  # a model that is there twice counts once
    assert ((p & q) - p).written == "(p & q) - p" and sculpt.product([p], [2]).written == "p^2"
    for model in recurrent_models(1):
        assert repr(model).startswith("Tokens('r0', shape=(4,), parameters=")


FORMULAS = [
    Mixture([1, 1]), Mixture([2, 1]), Posterior(2, (0, 1)), Posterior(2, (0, 0)), Posterior(2, (1,)), Posterior(2, (0, 1, 1), [1, 3]),
    Product([1, -0.5]), Tilted([0.5]), PowerMean(-2, [1, 1]), PowerMean(0.5, [3, 1]),
]  # fmt: skip


@pytest.mark.parametrize("formula", FORMULAS, ids=repr)
def test_what_a_page_says_of_a_formula_is_what_it_is(formula):
    """Read as arithmetic, it is in proportion to exp Φ. What is rounded on the page is off by a thousandth."""
    text = target(formula, ["p", "q"]).replace("&middot;", "*").replace("&nbsp;", "*")
    text = re.sub(r"<sup>(.*?)</sup>", r"**(\1)", text)
    points = [(0.3, 0.6), (0.9, 0.2), (0.5, 0.5)]
    said = [eval(text, {"p": p, "q": q}) for p, q in points]
    exact = [math.exp(float(formula.value(torch.tensor([p, q], dtype=torch.float64).log()))) for p, q in points]
    for k in (1, 2):
        assert said[k] / said[0] == pytest.approx(exact[k] / exact[0], rel=5e-3)


def test_notebooks_show_models_and_results_with_their_parts_and_names_are_no_markup(folders):
    p, q = (sculpt.load(folders / f"grid-{name}") for name in "pq")
    q._name = "<b>q"
    composition = (p & q) - p
    page = composition._repr_html_()
    assert "<ul><li>" in page and "&lt;b&gt;q" in page and "<b>q" not in page and page.count("GFlowNet,") >= 2
    assert "p &middot; (&lt;b&gt;q) / (p + (&lt;b&gt;q))" in page
    samples = (p & q).sample(5, sculpt.Tracked(particles=20), progress=False)
    shown = samples.diagnostics._repr_html_()
    assert "&lt;b&gt;q" in shown and samples.verdict.level in shown and samples._repr_html_().endswith(shown)
    assert repr(samples.diagnostics) == f"Diagnostics('tracked densities of p ⊗ (<b>q)', {samples.verdict.level})"
    assert "symmetric_shubert, diag_sigmoid" in sculpt.load(GRID / "pair")._repr_html_()


def test_a_library_is_shown_with_its_verdicts(folders, tmp_path):
    p, q = (sculpt.load(folders / f"grid-{name}") for name in "pq")
    library = sculpt.generate(p & q, 20, tmp_path / "cells", shard=10, progress=False)
    page = library._repr_html_()
    assert "p ⊗ q" in page and "20 samples" in page and "2 of 2 shards" in page


def test_the_package_lists_its_public_names_only_and_help_begins_with_a_use():
    assert dir(sculpt) == sorted(sculpt.__all__)
    assert "(p & q).sample(1000)" in sculpt.__doc__ and "sculpt.fit([p, q]" in sculpt.fit.__doc__
    _, table, _ = re.split("^=+  =+$", sculpt.__doc__.replace("\n\n", "\n"), maxsplit=2, flags=re.M)
    begin = [name for row in table.split("\n")[1:-1] for name in row.split("  ")[0].split(", ")]
    assert len(begin) >= 10 and set(begin) <= set(sculpt.__all__)


def test_trees_of_fragments_are_made_again_on_another_device():
    model = molecule_model(0)
    moved = on_device(model.env, torch.device("cpu"))
    assert moved is not model.env and rules(moved) == rules(model.env) and describe(moved) == describe(model.env)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named_before_anything_is_read():
    for move in (lambda: molecule_model(0).to("cuda"), lambda: sculpt.load("nowhere", device="cuda:1")):
        with pytest.raises(ValueError, match="sees no CUDA device here, and 'cuda.*' was asked for. Pass 'cpu'"):
            move()
