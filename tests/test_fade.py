"""Fading contrasts in: which formulas fade, from what, and what it does to the weights."""

import pytest
import torch
from diffusers_models import exact_model, sixteen_dimensions, three_rings

import sculpt
from sculpt.chain import Settings
from sculpt.diffusion import tracked
from sculpt.diffusion.fade import Faded, fade
from sculpt.formula import Mixture, Nested, Posterior, PowerMean, Product
from sculpt.particles import effective_sample_size

HARMONIC, CONTRAST = Posterior(2, (0, 1)), Posterior(2, (0, 0))
KEPT = [
    Mixture([1, 3]),
    HARMONIC,
    Posterior(3, (0, 1, 2), [1, 2, 3]),
    Posterior(1, (0,)),
    Product([2.0, 1.0]),
    PowerMean(-2, [1, 1]),
    Nested(HARMONIC, [HARMONIC, Mixture([1.0])], [(0, 1), (2,)], [-1.0, 0.0]),
]
FADED = [
    (CONTRAST, [1, 0]),
    (Posterior(2, (1, 1), [0.2, 0.8]), [0, 1]),
    (Posterior(3, (0, 1)), [0.5, 0.5, 0]),
    (Posterior(3, (0, 0, 0)), [1, 0, 0]),
    (Product([1.0, -0.5]), [0.5, 0]),
    (Product([2.0, 1.0, -1.0]), [4 / 3, 2 / 3, 0]),
]


def ells(m):
    return 3 * torch.randn(50, m, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("formula", KEPT, ids=str)
def test_a_formula_that_pushes_no_model_away_is_not_faded(formula):
    assert fade(formula, 0.3) == formula


@pytest.mark.parametrize(("formula", "start"), FADED, ids=str)
def test_fading_leads_from_positive_powers_of_the_same_degree_to_the_formula(formula, start):
    ell = ells(formula.m)
    torch.testing.assert_close(fade(formula, 0.0).gradient(ell), torch.tensor(start, dtype=torch.float64).expand(ell.shape))
    assert fade(formula, 1.0) == formula
    for beta in (0.0, 0.4, 1.0):
        assert fade(formula, beta).degree == formula.degree
        torch.testing.assert_close(
            fade(formula, beta).value(ell + 2.0), fade(formula, beta).value(ell) + 2.0 * formula.degree, atol=1e-12, rtol=0
        )


def test_nested_formulas_fade_level_by_level():
    nested = Nested(CONTRAST, [HARMONIC, CONTRAST], [(0, 1), (2, 0)], [-1.0, -0.2])
    faded = fade(nested, 0.4)
    assert isinstance(faded.outer, Faded) and isinstance(faded.parts[1], Faded)
    assert faded.parts[0] == HARMONIC and faded.log_z == nested.log_z
    assert fade(nested, 1.0) == nested


@pytest.mark.parametrize("formula", [formula for formula, _ in FADED], ids=str)
def test_gradient_and_hessian_of_a_faded_formula_are_its_derivatives(formula):
    faded = fade(formula, 0.4)
    for ell in ells(formula.m)[:5]:
        torch.testing.assert_close(faded.gradient(ell), torch.autograd.functional.jacobian(faded.value, ell))
        torch.testing.assert_close(faded.hessian(ell), torch.autograd.functional.hessian(faded.value, ell))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_weights_of_a_faded_contrast_grow_as_stated(beta):
    ell, faded = ells(2), fade(CONTRAST, beta)
    S = torch.randn(50, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a, inner = faded.gradient(ell), torch.einsum("nix,njx->nij", S, S)
    # What is left of a weight's increment in the limit of small steps, over the step.
    growth = torch.einsum("ni,nj,nij->n", a, a, inner) - torch.einsum("ni,nii->n", a, inner)
    growth = (growth + torch.einsum("nij,nij->n", faded.hessian(ell), inner)) / 2
    r = torch.sigmoid(ell[:, 1] - ell[:, 0])
    torch.testing.assert_close(growth, beta * (1 + beta) / 2 * r**2 * ((S[:, 0] - S[:, 1]) ** 2).sum(-1))


def test_a_contrast_that_is_faded_in_keeps_its_particles(monkeypatch):
    p, q = (exact_model(mixture, name=name) for mixture, name in zip(sixteen_dimensions(seed=7), "pq", strict=True))

    def effective_share():
        road = sculpt.Tracked(particles=2000, threshold=0.0, resample=False)
        samples = (p - q).sample(1, road, steps=64, progress=False, generator=torch.Generator().manual_seed(0))
        return effective_sample_size(samples.log_weights) / 2000

    assert effective_share() > 0.95
    # The mechanism itself: without fading, the same run loses a good part of them.
    monkeypatch.setattr(tracked, "fade", lambda formula, beta: formula)
    assert effective_share() < 0.85


def test_particles_that_go_alone_are_not_faded():
    p, q, _ = (exact_model(mixture, name=name) for mixture, name in zip(three_rings(), "pqr", strict=True))
    alone, together = ((p - q).leaves[0].tracked(CONTRAST, (p, q), Settings(steps=9), alone=way) for way in (True, False))
    assert all(target == CONTRAST for target in alone.targets)
    assert together.targets[0] != CONTRAST == together.targets[-1]
