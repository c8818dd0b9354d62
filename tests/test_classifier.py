"""The classifier: what its heads mean, what its losses are minimised by, what it learns, and how its training survives."""

import itertools
import json
import math

import pytest
import torch
from diffusers_models import exact_model, three_rings
from oracles import ExactGuide, GaussianMixture
from torch import nn

import sculpt
import sculpt.training
from sculpt.classifier.fit import Descent, _Judge
from sculpt.classifier.guide import with_odds
from sculpt.classifier.heads import Classifier, SetHead
from sculpt.classifier.losses import cross_entropies
from sculpt.classifier.store import Batch, Draw
from sculpt.diffusion.backbones import ImageNetwork, VectorNetwork
from sculpt.diffusion.clock import noise_range
from sculpt.diffusion.states import DiffusionStore
from sculpt.formula import Posterior, label_sets

RINGS = three_rings()
P, Q, R = MODELS = [exact_model(mixture, name=name) for mixture, name in zip(RINGS, "pqr", strict=True)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def draws(mixtures, n, seed=0):
    g = generator(seed)
    return [mixture.draw(n, g).float() for mixture in mixtures]


DATA = draws(RINGS, 400)
LEVELS = torch.tensor([0.02, 0.1, 0.3, 1.0, 3.0, 20.0], dtype=torch.float64)


def small(seed=0, width=16):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VectorNetwork(2, width=width, depth=2)


def quick(models=(P, Q), observations=2, odds=False, **options):
    """A fit of a second or so: nothing is learned, everything runs."""
    defaults = {"data": DATA[: len(models)], "steps": 12, "batch_size": 16, "progress": False, "network": small()}
    return sculpt.fit(list(models), observations, odds, **(defaults | options))


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# The head over label sets -----------------------------------------------------------------------------------------------------------

SHAPES = [(2, 2), (2, 3), (3, 2), (3, 3), (2, 5), (5, 4)]


def head(m, n, odds=False, children=1):
    torch.manual_seed(m * 10 + n)
    return SetHead(8, m, n, odds, children)


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("odds", [False, True])
def test_every_anchors_probabilities_sum_to_one_over_all_ordered_tuples(m, n, odds):
    set_head = head(m, n, odds, children=2)
    joint = set_head(3 * randn(4, 8), randn(4, m) if odds else None)
    assert joint.shape == (4, 2, m, math.comb(m + n - 2, n - 1))
    total = sum(joint[..., set_head.column(labels)].exp() for labels in itertools.product(range(m), repeat=n - 1))
    torch.testing.assert_close(total, torch.ones(4, 2, m))


@pytest.mark.parametrize("children", [1, 4])
def test_chosen_rows_children_and_anchors_are_those_of_the_whole_table(children):
    set_head, g = head(3, 4, odds=True, children=children), generator()
    features, odds = randn(6, 8), randn(6, 3, seed=1)
    rows, which, anchors = (torch.randint(k, (20,), generator=g) for k in (6, children, 3))
    whole = set_head(features, odds)
    torch.testing.assert_close(set_head(features, odds, rows, which), whole[rows, which])
    torch.testing.assert_close(set_head(features, odds, rows, which, anchors), whole[rows, which, anchors])
    log_p, columns = torch.log_softmax(randn(6, 5, 3, seed=2), -1), torch.randint(len(set_head.counts), (6, 2), generator=g)
    expected = set_head.log_f(log_p).gather(2, columns[:, None].expand(-1, 5, -1))
    torch.testing.assert_close(set_head.log_f(log_p, columns), expected)


def test_the_orderings_of_many_labels_are_counted():
    set_head = SetHead(4, 2, 160)
    exact = torch.tensor([math.log(math.comb(159, labels.count(0))) for labels in set_head.sets], dtype=torch.float64)
    torch.testing.assert_close(set_head.log_orderings.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_target_of_a_set_is_the_sum_over_its_orderings(m, n):
    set_head, log_p = head(m, n), torch.log_softmax(2 * randn(6, m), -1)
    target = set_head.target(log_p)
    torch.testing.assert_close(target.sum(-1), torch.ones(6))
    enumerated = torch.zeros(6, len(set_head.sets))
    for labels in itertools.product(range(m), repeat=n - 1):
        enumerated[:, set_head.column(labels)] += log_p[:, list(labels)].sum(-1).exp()
    torch.testing.assert_close(target, enumerated)


def test_certain_labels_have_a_target_without_nan():
    log_p = torch.tensor([[0.0, float("-inf"), float("-inf")], [math.log(0.5), math.log(0.5), float("-inf")]])
    target = head(3, 3).target(log_p)
    assert not target.isnan().any()
    torch.testing.assert_close(target.sum(-1), torch.ones(2))


@pytest.mark.parametrize(("m", "n"), [(2, 2), (2, 4), (3, 3), (5, 4)])
def test_observations_that_were_not_made_are_summed_out(m, n):
    classifier = Classifier(small(), [str(i) for i in range(m)], n).eval()
    joint = classifier.joint(randn(5, 2), torch.tensor(0.7))[:, 0].double()
    labels = tuple(i % m for i in range(n))
    for k in range(1, n + 1):
        expected = torch.zeros(5, dtype=torch.float64)
        for rest in itertools.product(range(m), repeat=n - k):
            expected += joint[:, labels[0], classifier.set_head.column(labels[1:k] + rest)].exp()
        torch.testing.assert_close(classifier.select(joint, labels[:k]).exp(), expected)
    torch.testing.assert_close(
        classifier.select(joint, labels[:1]).exp(), torch.ones(5, dtype=torch.float64), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(("m", "n"), [(2, 2), (2, 4), (3, 3)])
def test_smaller_label_sets_have_a_column_each(m, n):
    set_head, log_p = head(m, n), torch.log_softmax(2 * randn(6, m), -1)
    every = [*set_head.sets, *set_head.smaller]
    assert sorted(every) == sorted(labels for k in range(1, n) for labels in label_sets(m, k))
    of_one_ordering = set_head.log_f(log_p)[:, : len(set_head.sets)]
    # Independent labels: what is not observed sums to one.
    torch.testing.assert_close(set_head.with_smaller(of_one_ordering), set_head.log_f(log_p))


def test_the_labels_after_the_anchor_may_come_in_any_order():
    classifier = Classifier(small(), ["a", "b", "c"], 4).eval()
    z, s = randn(5, 2), torch.tensor(0.7)
    for rest in itertools.permutations((2, 0, 1)):
        assert torch.equal(classifier.log_h(z, s, labels=(1, *rest)), classifier.log_h(z, s, labels=(1, 0, 1, 2)))
    assert not torch.equal(classifier.log_h(z, s, labels=(0, 1, 1, 2)), classifier.log_h(z, s, labels=(1, 0, 1, 2)))


def test_equal_odds_are_no_odds_and_only_ratios_matter():
    log_p = torch.log_softmax(randn(6, 3), -1)
    assert torch.equal(with_odds(log_p, (0.2, 0.2, 0.2)), log_p)
    torch.testing.assert_close(with_odds(log_p, (1.0, 2.0, 5.0)), with_odds(log_p, (3.0, 6.0, 15.0)))
    v = torch.tensor([1.0, 2.0, 5.0])
    torch.testing.assert_close(
        with_odds(log_p, (1.0, 2.0, 5.0)).exp(), v * log_p.exp() / (v * log_p.exp()).sum(-1, keepdim=True)
    )
    with_input = Classifier(small(), ["a", "b"], 2, odds=True).eval()
    for odds in ((1.0, 1.0), (7.0, 7.0)):
        torch.testing.assert_close(
            with_input.joint(randn(3, 2), torch.tensor(1.0), odds=odds), with_input.joint(randn(3, 2), torch.tensor(1.0))
        )


# The exact joint ---------------------------------------------------------------------------------------------------------------------


def test_a_product_of_single_label_classifiers_is_not_the_joint_before_the_end():
    # Two narrow models far apart, midway between them under much noise: each label is a coin, but both labels are the same coin.
    exact = ExactGuide([GaussianMixture([[-1.0]], 0.01), GaussianMixture([[1.0]], 0.01)])
    z, s = torch.zeros(1, 1, dtype=torch.float64), torch.tensor(10.0, dtype=torch.float64)
    single = exact.marginal(z, s).exp()[0]
    torch.testing.assert_close(single, torch.full((2,), 0.5, dtype=torch.float64))
    joint = single[0] * exact.log_h(z, s, labels=(0, 1)).exp()[0]
    assert float(joint) < 1e-6 and float(single[0] * single[1]) == pytest.approx(0.25)


def test_at_the_end_the_joint_is_the_product():
    exact = ExactGuide(RINGS[:2])
    x = RINGS[0].draw(200, generator())
    s = torch.tensor(1e-4, dtype=torch.float64)
    for labels, odds in (((0, 1), None), ((1, 0, 0), (0.2, 0.8))):
        torch.testing.assert_close(
            exact.log_h(x, s, labels=labels, odds=odds), exact.log_h_terminal(x, labels=labels, odds=odds), rtol=0, atol=1e-4
        )


def test_the_exact_guide_is_a_martingale_and_its_labels_sum_to_one():
    # The oracle itself: h(z, s) is the mean of h over what z is noised from, checked by brute force; labels sum to one.
    exact, s = ExactGuide(RINGS[:2]), torch.tensor(0.5, dtype=torch.float64)
    z = RINGS[0].draw(3, generator(), v=0.25)
    x = RINGS[0].draw(400_000, generator(1))
    weight = torch.softmax(-((z[:, None] - x) ** 2).sum(-1) / (2 * s**2), -1)
    effective = 1 / (weight**2).sum(-1)
    for labels, odds in (((0, 1), None), ((0, 0, 1), (0.3, 0.7))):
        brute = weight @ exact.log_h_terminal(x, labels=labels, odds=odds).exp()
        # Terminal probabilities are at most one, so their weighted mean has a standard error of at most 1/2 over the root of the ESS.
        assert ((exact.log_h(z, s, labels=labels, odds=odds).exp() - brute).abs() < 4 * 0.5 / effective.sqrt()).all()
    total = sum(exact.log_h(z, s, labels=(1, *rest), odds=(0.3, 0.7)).exp() for rest in itertools.product(range(2), repeat=2))
    torch.testing.assert_close(total, torch.ones(3, dtype=torch.float64), rtol=1e-7, atol=0)


# The losses ---------------------------------------------------------------------------------------------------------------------------

# A world small enough to enumerate: 3 models of 4 samples, noised to 5 states. Probabilities are counts over 16 and over 8.
P_X = torch.tensor([[8, 4, 3, 1], [1, 2, 5, 8], [4, 4, 4, 4]])
P_S = torch.tensor([[4, 2, 1, 1, 0], [0, 5, 1, 1, 1], [1, 1, 2, 2, 2], [0, 0, 1, 3, 4]])


class OneHot(nn.Module):
    width = 5

    def forward(self, i, s=None):
        return torch.nn.functional.one_hot(i.long(), 5).double()


def finite_world(odds, dtype=torch.float64):
    """Every (label, sample, state) as often as it is probable, a classifier that is exact, and its log-odds."""
    rows = [
        (y, x, s) for y, x, s in itertools.product(range(3), range(4), range(5)) for _ in range(int(P_X[y, x]) * int(P_S[x, s]))
    ]
    y, x, s = torch.tensor(rows).T
    batch = Batch(x, y, (s, s), torch.arange(len(y)))
    classifier = Classifier(OneHot(), ["a", "b", "c"], 3, odds=odds is not None).to(dtype)
    p_x, p_s = (P_X / 16).double(), (P_S / 8).double()
    log_p = (p_x / p_x.sum(0)).log()  # (y, x)
    v = torch.ones(3) if odds is None else torch.tensor(odds)
    joint = torch.einsum("ix,xs->is", p_x, p_s)
    h_true = torch.zeros(5, 3, len(classifier.set_head.sets), dtype=dtype)
    p_v = (v[:, None] * log_p.exp()) / (v[:, None] * log_p.exp()).sum(0)
    for a, b in itertools.product(range(3), repeat=2):
        weight = torch.einsum("ix,xs,x->is", p_x, p_s, p_v[a] * p_v[b]) / joint
        h_true[:, :, classifier.set_head.column((a, b))] = weight.T  # of one ordering
    with torch.no_grad():
        silu = torch.nn.functional.silu(torch.ones((), dtype=dtype))
        classifier.set_head.hidden.weight.zero_()[:, :5] = torch.eye(5)
        classifier.set_head.hidden.bias.zero_()
        classifier.set_head.out.weight.copy_((h_true.clamp(min=1e-30).log().flatten(1) / silu).T)
        classifier.set_head.out.bias.zero_()
        classifier.terminal_head.weight.zero_()[:, :4] = log_p
        classifier.terminal_head.bias.zero_()
        classifier.marginal_head.weight.copy_((joint / joint.sum(0)).log())
        classifier.marginal_head.bias.zero_()
    return batch, classifier, h_true, None if odds is None else v.log().expand(len(y), -1).to(dtype)


@pytest.mark.parametrize("odds", [None, (0.5, 1.0, 3.0)])
def test_all_losses_are_stationary_at_the_exact_classifier_and_larger_elsewhere(odds):
    batch, classifier, h_true, log_odds = finite_world(odds)
    states = torch.arange(5)
    joint = classifier.joint(states, states, odds=odds)[:, 0].exp()
    torch.testing.assert_close(joint, h_true.float().double(), rtol=1e-5, atol=1e-6)
    losses = cross_entropies(classifier, batch, classifier, log_odds)
    heads = {"terminal": classifier.terminal_head, "marginal": classifier.marginal_head, "joint": classifier.set_head.out}
    for name, part in heads.items():
        weight = part.weight
        (gradient,) = torch.autograd.grad(losses[name], weight, retain_graph=True)
        assert gradient.abs().max() < 1e-6, name
        before, saved = losses[name].item(), weight.detach().clone()
        for seed in range(5):
            with torch.no_grad():
                weight.copy_(saved + 0.3 * randn(*weight.shape, seed=seed))
            assert cross_entropies(classifier, batch, finite_world(odds)[1], log_odds)[name].item() > before, name
        with torch.no_grad():
            weight.copy_(saved)


def test_the_exact_terminal_loss_is_the_conditional_entropy():
    batch, classifier, _, _ = finite_world(None)
    p_x = (P_X / 16).double()
    posterior = p_x / p_x.sum(0)
    entropy = -(p_x / 3 * posterior.log()).sum()
    assert cross_entropies(classifier, batch, classifier)["terminal"].item() == pytest.approx(entropy.item(), rel=1e-6)


def test_the_target_sends_no_gradient_to_the_terminal_head():
    classifier = Classifier(small(), ["a", "b"], 2)
    z = randn(8, 2)
    batch = Batch(z, torch.tensor([0, 1] * 4), (z, torch.full((8,), 0.5, dtype=torch.float64)), torch.arange(8))
    cross_entropies(classifier, batch, classifier)["joint"].backward()
    assert classifier.terminal_head.weight.grad is None and classifier.set_head.out.weight.grad is not None


# Gradients ----------------------------------------------------------------------------------------------------------------------------


class ExactHeads:
    """The heads that training would end in, log h times a factor."""

    m, odds = 2, False

    def __init__(self, factor=1.0, observations=2):
        self.exact, self.factor = ExactGuide(RINGS[:2]), factor
        self.set_head = SetHead(1, 2, observations)
        self.set_head.forward = lambda features, log_odds, *which: self.log_h(features, log_odds)[which]

    def network(self, z, s):
        return torch.cat([z.double(), s[:, None]], -1)

    def marginal_head(self, features):
        return self.exact.marginal(features[:, :2], features[:, 2])

    def terminal(self, x):
        return self.exact.terminal(x.double())

    def log_h(self, features, log_odds=None):
        z, s = features[:, :2], features[:, 2].detach()
        anchors = [[self.exact.log_h(z, s, labels=(i, *labels)) for labels in self.set_head.sets] for i in (0, 1)]
        return self.factor * torch.stack([torch.stack(columns, -1) for columns in anchors], 1).unsqueeze(1)


def path_losses(classifier, n=4000):
    store = DiffusionStore([P, Q], data=draws(RINGS[:2], 5 * n), path=True)
    store.refresh(ExactHeads(), generator())
    path, scores = torch.zeros(2)
    for level in (0.3, 1.0, 3.0):  # the closed forms know one level at a time
        for part in range(10):
            common = Draw(n // 10, generator(part)), lambda u, level=level: torch.full_like(u, level)
            path = path + store._path(classifier, *common) / 10
            scores = scores + store._scores(classifier, *common) / 10
    return path, scores


@pytest.mark.slow
def test_the_gradient_losses_are_least_at_the_exact_classifier():
    path, scores = (loss.detach() for loss in path_losses(ExactHeads()))
    twice = path_losses(ExactHeads(2.0))[0].detach()
    assert scores < 1e-6
    # The loss is a f² - 2 b f in the factor f, with its minimum at 1: the target's mean is the gradient.
    a = (twice - 2 * path) / 2
    b = (a - path) / 2
    assert a > 0.1 and float(b / a) == pytest.approx(1, abs=0.1)


def test_compositions_of_fewer_observations_are_among_the_paths():
    class Apart(ExactHeads):
        """Right about two more labels together, and not about one of them alone."""

        def __init__(self, factor):
            super().__init__(observations=3)
            self.set_head.with_smaller = lambda log_h: torch.cat(
                [log_h, factor * SetHead.with_smaller(self.set_head, log_h)[..., len(self.set_head.sets) :]], -1
            )

    exact, half, none = (path_losses(Apart(factor), 1500)[0].detach() for factor in (1.0, 0.5, 0.0))
    assert exact + 0.01 < half < none - 0.01


@pytest.mark.slow
def test_a_classifier_that_does_not_call_strays_back_is_noticed():
    class Flat(ExactHeads):
        def log_h(self, features, log_odds=None):
            return super().log_h(features, log_odds).clamp(min=-3)

    # On the composition's own path this costs .009 and would be lost in the noise.
    exact, flat = (path_losses(heads)[0].detach() for heads in (ExactHeads(), Flat()))
    assert flat - exact > 0.04


@pytest.mark.parametrize(
    ("level", "certain", "expected"),
    [
        (
            0.02,
            True,
            {0.0, 4 / 3},
        ),  # each state has one candidate, which the composition wants twice as often as its model, or never
        (1e3, True, {1.0}),  # either candidate may have been x, and the composition wants one of them
        (0.02, False, {1.0}),  # each state has one candidate
        (1e3, False, {1.5}),  # two candidates are plausible: b (1 - b) is a quarter for each
    ],
)
def test_a_state_counts_as_often_as_the_composition_visits_it_and_more_where_it_cannot_know_its_sample(
    level, certain, expected
):
    store = DiffusionStore([P, Q], data=draws(RINGS[:2], 20), path=True)
    log_p = torch.tensor([[0.0, -1e4], [-1e4, 0.0]]) if certain else torch.full((2, 2), math.log(0.5))
    store.candidates[False] = [(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), log_p)] * 2
    levels = lambda u: torch.full_like(u, level)  # noqa: E731
    weight = store._targets(0, ExactHeads(), Draw(64, generator()), levels)[-1]
    assert all(min(abs(w - v) for v in expected) < 2e-3 for w in weight.tolist())
    assert all(min(abs(w - v) for w in weight.tolist()) < 2e-3 for v in expected)


def test_samples_that_a_composition_cannot_want_are_no_division_by_zero():
    class Certain(ExactHeads):
        def terminal(self, x):
            return torch.log_softmax(500 * torch.stack([x[:, 0].sign(), -x[:, 0].sign()], -1), -1)

    store = DiffusionStore([P, Q], data=draws(RINGS[:2], 100), path=True)
    common = Draw(50, generator()), lambda u: torch.full_like(u, 0.02)
    for certain in (Certain(), Certain(2.0)):
        store.refresh(certain, generator())
        assert store._path(certain, *common).isfinite()


def test_gradients_are_trained_where_samples_are_large_and_a_network_without_second_derivatives_is_refused():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient * 2

    class Network(nn.Module):
        width, config = 4, None

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 4)

        def forward(self, z, s=None):
            return Once.apply(self.linear(Once.apply(z.float())))

    assert {"path", "scores"} <= set(quick(path=True).history[-1])
    assert "path" not in quick(network=Network()).history[-1]
    with pytest.raises(ValueError, match="no second derivative.*path=False"):
        quick(network=Network(), path=True)


# What is learned ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted():
    return sculpt.fit([P, Q], 3, odds=True, data=draws(RINGS[:2], 20_000), steps=200, progress=False)


def test_the_terminal_head_reaches_the_entropy_bound(fitted):
    exact, x = ExactGuide(RINGS[:2]), torch.cat(draws(RINGS[:2], 10_000, seed=7))
    log_p = exact.terminal(x)
    excess = (log_p.exp() * (log_p - fitted.terminal(x).double())).sum(-1).mean()  # KL(exact, learned), in nats
    assert 0 <= excess < 0.02


@pytest.mark.parametrize(
    ("labels", "odds"), [((0, 1), None), ((1, 1), None), ((0, 1, 1), None), ((0, 1), (0.15, 0.85)), ((1, 0, 1), (0.7, 0.3))]
)
def test_the_learned_joint_is_close_to_the_exact_one_at_every_noise_level(fitted, labels, odds):
    exact = ExactGuide(RINGS[:2])
    x = torch.cat(draws(RINGS[:2], 1000, seed=8))
    for s in LEVELS:
        z = x + s.float() * randn(*x.shape, seed=9)
        learned = fitted.log_h(z, s.expand(len(z)), labels=labels, odds=odds).exp()
        # 200 steps leave a mean error of 0.02 to 0.04; a head that knew only the mean of h would be off by 0.2 at low noise.
        assert (learned - exact.log_h(z.double(), s, labels=labels, odds=odds).exp()).abs().mean() < 0.07, float(s)
        assert (fitted.marginal(z, s.expand(len(z))).exp() - exact.marginal(z.double(), s).exp()).abs().mean() < 0.07, float(s)


def test_the_terminal_head_does_not_take_odds_but_its_use_does(fitted):
    x = DATA[0][:50]
    torch.testing.assert_close(
        fitted.log_h_terminal(x, labels=(0, 1, 1), odds=(0.2, 0.8)), 2 * with_odds(fitted.terminal(x), (0.2, 0.8))[:, 1]
    )
    assert torch.equal(fitted.log_h_terminal(x, labels=(0,)), torch.zeros(50))


def test_the_training_curve_is_in_the_result(fitted):
    steps = [row["step"] for row in fitted.history]
    assert steps == sorted(set(steps)) and steps[-1] == 200 and 30 <= len(steps) <= 60
    parts = {f"{prefix}{name}" for prefix in ("", "held_out_") for name in ("terminal", "marginal", "joint")}
    assert all(set(row) - {"kept"} == {"step", *parts} for row in fitted.history)
    assert fitted.history[-1]["held_out_joint"] < fitted.history[0]["held_out_joint"]


def test_a_fitted_classifier_is_in_evaluation_mode_and_needs_no_gradient(fitted):
    assert not fitted.training and not any(parameter.requires_grad for parameter in fitted.parameters())


def test_five_models_and_four_observations_take_the_same_path_as_two_and_two():
    mixtures = [GaussianMixture([[i - 2.0, 0.0]], 0.3) for i in range(5)]
    models = [exact_model(mixture, name=f"p{i}") for i, mixture in enumerate(mixtures)]
    classifier = quick(models, 4, odds=True, data=draws(mixtures, 100), steps=20)
    z, s = randn(6, 2), torch.full((6,), 0.7, dtype=torch.float64)
    total = sum(
        classifier.log_h(z, s, labels=(2, *rest), odds=[1, 2, 3, 4, 5]).exp() for rest in itertools.product(range(5), repeat=3)
    )
    torch.testing.assert_close(total, torch.ones(6), rtol=1e-5, atol=0)


# Training states ------------------------------------------------------------------------------------------------------------------------


def test_training_states_are_the_samples_re_noised_over_all_levels_that_sampling_visits():
    batch = DiffusionStore([P, Q], data=draws(RINGS[:2], 1000)).draw(Draw(2000, generator()))
    z, s = batch.states
    low, high = noise_range([P, Q])
    assert s.min() < 1.01 * low and s.max() > 0.95 * high and (s >= 0.999 * low).all() and (s <= 1.001 * high).all()
    assert torch.equal(batch.y, torch.arange(2).repeat_interleave(2000)) and torch.equal(batch.owner, torch.arange(4000))
    noise = (z - batch.x) / s.float()[:, None]
    # Standard normal noise: Dvoretzky, Kiefer and Wolfowitz's bound at one in a million.
    flat = noise.flatten().sort().values.double()
    cdf = torch.special.ndtr(flat)
    steps = torch.arange(1, len(flat) + 1) / len(flat)
    assert (cdf - steps).abs().max() < math.sqrt(math.log(2e6) / (2 * len(flat))) + 1 / len(flat)
    # Stratified: every tenth of the way has a tenth of the states, of each model.
    for y in (0, 1):
        counts = torch.histc(s[batch.y == y].log().float(), 4)
        assert (counts > 0).all()


def test_held_out_samples_are_never_trained_on():
    data = [torch.arange(40.0).reshape(20, 2) + 100 * i for i in range(2)]
    store = DiffusionStore([P, Q], data=data)
    seen = {tuple(row) for part in store.pool.training for row in part.tolist()}
    held = {tuple(row) for part in store.pool.held_out for row in part.tolist()}
    assert held and not seen & held and len(seen | held) == 40
    for held_out, allowed in ((False, seen), (True, held)):
        assert {tuple(row) for row in store.draw(Draw(200, generator(), held_out=held_out)).x.tolist()} <= allowed


def test_samples_of_the_base_models_are_drawn_once_when_there_is_no_data(monkeypatch):
    calls = []
    sample = sculpt.Diffusion.sample
    monkeypatch.setattr(
        sculpt.Diffusion,
        "sample",
        lambda self, n, **options: calls.append((str(self), n, options["progress"])) or sample(self, n, **options),
    )
    classifier = quick(data=None, samples=200, sample_steps=8)
    assert calls == [("p", 200, False), ("q", 200, False)] and classifier.history


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (4, 1, 2), (1, 28, 28)])
def test_the_image_backbone_takes_any_size_and_gives_a_state_and_a_finished_sample_features(shape):
    network = ImageNetwork(shape, channels=(8, 16), width=24).eval()
    x = randn(3, *shape)
    assert network(x).shape == network(x, torch.tensor([0.1, 1.0, 50.0])).shape == (3, 24)
    torch.testing.assert_close(network(x, torch.tensor(2.0))[:1], network(x[:1], torch.tensor(2.0)), rtol=1e-4, atol=1e-5)
    assert network(1e6 * x, torch.tensor(1e6)).isfinite().all()


# Which models it knows -------------------------------------------------------------------------------------------------------------------


def test_the_order_of_the_models_is_irrelevant():
    classifier = Classifier(small(), [Q.key, R.key, P.key], 3, odds=True)
    for labels, odds in (((0, 1, 2), None), ((2, 0, 0), (0.5, 0.2, 0.3)), ((1, 1), (0.5, 0.2, 0.3))):
        for order in itertools.permutations(range(3)):
            models = [MODELS[i] for i in order]
            written = Posterior(3, [order.index(i) for i in labels], None if odds is None else [odds[i] for i in order])
            aligned, listed = classifier.align(written, models)
            assert [str(model) for model in listed] == ["q", "r", "p"]
            assert aligned.labels == tuple({0: 2, 1: 0, 2: 1}[i] for i in labels)
            if odds is not None:
                torch.testing.assert_close(torch.tensor(aligned.odds), torch.tensor([0.2, 0.3, 0.5]))


def test_the_same_composition_written_in_another_order_gives_the_same_samples():
    exact = ExactGuide(RINGS[:2], keys=(P.key, Q.key))
    one = sculpt.posterior([P, Q], (0, 1), [0.3, 0.7]).sample(20, exact, steps=8, generator=generator(), progress=False)
    other = sculpt.posterior([Q, P], (1, 0), [0.7, 0.3]).sample(20, exact, steps=8, generator=generator(), progress=False)
    assert torch.equal(one.x, other.x) and one.log_z == other.log_z


def test_a_classifier_refuses_models_and_labels_that_it_was_not_made_for():
    classifier = Classifier(small(), [P.key, Q.key], 2).eval()
    for composition, message in (
        (P & R, r"fitted for other base models: r \(key .*run sculpt.fit"),
        (P & Q & R, "knows 2 base models, the composition has 3"),
        (
            sculpt.posterior([P, Q], (0, 1, 1)),
            r"labels \(0, 1, 1\): this classifier was trained for 2 observations .*observations=3",
        ),
        (sculpt.product([P, Q], [1, 1]), "A classifier steers posteriors"),
        (P | Q, "A classifier steers posteriors"),
        (sculpt.power_mean([P, Q], -1), "A classifier steers posteriors"),
    ):
        with pytest.raises(ValueError, match=message):
            composition.sample(4, classifier)
    with pytest.raises(ValueError, match="need a classifier that takes them"):
        sculpt.harmonic_mean(P, Q, 0.9).sample(4, classifier, progress=False)


def test_a_classifier_for_more_observations_serves_fewer():
    classifier = Classifier(small(), [P.key, Q.key], 4).eval().requires_grad_(False)
    assert (P & Q).sample(3, classifier, steps=4, progress=False).x.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quick([P]), "got 1. Pass two or more"),
        (lambda: quick([P, P]), "the same base model"),
        (lambda: quick([P, exact_model(RINGS[0], name="p")]), "the same base model"),
        (lambda: quick(observations=1), "observations has to be at least 2, got 1"),
        (lambda: quick(steps=0), "steps has to be at least 1, got 0"),
        (lambda: quick(batch_size=0), "batch_size has to be at least 1, got 0"),
        (lambda: quick(data=DATA[:1]), "1 sets of samples for 2 base models"),
        (lambda: quick(data=[DATA[0], randn(100, 3)]), r"data for q has samples of shape \(3,\), the model makes \(2,\)"),
        (lambda: quick(data=[DATA[0], DATA[1] / 0]), "data for q has entries that are not finite"),
        (lambda: quick(data=[DATA[0], DATA[1][:5]]), r"at least 10 samples of each base model, got \[400, 5\]"),
        (lambda: Classifier(small(), ["a"], 2), "two or more different"),
        (lambda: Classifier(small(), ["a", "a"], 2), "two or more different"),
        (lambda: Classifier(small(), ["a", "b"], 1), "at least two labels"),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_time_is_spent(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_loss_that_is_no_number_stops_the_training():
    class Broken(nn.Module):
        width = 4

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 4)

        def forward(self, z, s=None):
            return self.linear(z) * float("nan")

    with pytest.raises(FloatingPointError, match="loss is nan at step 0"):
        quick(network=Broken())


# Backbones ----------------------------------------------------------------------------------------------------------------------------------


class Own(nn.Module):
    """A user's network, with dropout and a batch norm, which both behave differently in training."""

    width = 12

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 12), nn.BatchNorm1d(12), nn.SiLU(), nn.Dropout(0.5))

    def forward(self, z, s=None):
        s = torch.zeros(()) if s is None else s
        return self.layers(torch.cat([z / 80, s.float().expand(len(z))[:, None]], -1))


def test_a_backbone_of_the_users_own_is_fitted_saved_and_read_back(tmp_path):
    torch.manual_seed(0)
    classifier = quick(network=Own())
    z, s = randn(5, 2), torch.full((5,), 0.5, dtype=torch.float64)
    assert not classifier.training
    assert torch.equal(classifier.log_h(z, s, labels=(0, 1)), classifier.log_h(z, s, labels=(0, 1)))  # no dropout
    classifier.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="backbone of its user's own .*network="):
        Classifier.from_pretrained(tmp_path)
    again = Classifier.from_pretrained(tmp_path, Own())
    assert torch.equal(again.log_h(z, s, labels=(0, 1)), classifier.log_h(z, s, labels=(0, 1)))
    with pytest.raises(ValueError, match="do not fit"):
        Classifier.from_pretrained(tmp_path, small(width=12))


def test_the_users_own_network_is_left_as_it_was_passed():
    torch.manual_seed(0)
    network = Own()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    one, two = quick(network=network), quick(network=network)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert same_weights(one, two)


def test_bfloat16_autocast_trains_on_a_cpu_too():
    classifier = quick(descent=Descent(mixed_precision=True))
    assert all(math.isfinite(row["held_out_joint"]) for row in classifier.history)
    assert all(parameter.dtype == torch.float32 for parameter in classifier.parameters())


# Saving -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odds", [False, True])
def test_saving_and_loading_gives_back_the_classifier_bit_by_bit(tmp_path, odds):
    classifier = quick([P, Q, R], 3, odds)
    classifier.save_pretrained(tmp_path)
    for again in (Classifier.from_pretrained(tmp_path), sculpt.load(tmp_path)):
        assert same_weights(classifier, again) and again.history == classifier.history and again.keys == classifier.keys
        assert (again.observations, again.odds, again.names) == (3, odds, ("p", "q", "r")) and not again.training
        z, s = randn(5, 2), torch.full((5,), 0.5, dtype=torch.float64)
        v = (0.2, 0.3, 0.5) if odds else None
        assert torch.equal(again.log_h(z, s, labels=(0, 1, 2), odds=v), classifier.log_h(z, s, labels=(0, 1, 2), odds=v))
        assert torch.equal(again.terminal(z), classifier.terminal(z))


def test_an_image_classifier_is_saved_with_its_backbone(tmp_path):
    torch.manual_seed(0)
    classifier = Classifier(ImageNetwork((1, 8, 8), 0.1, 0.7, channels=(8, 16), width=24), ["a", "b"], 2).eval()
    classifier.save_pretrained(tmp_path)
    x = randn(2, 1, 8, 8)
    assert torch.equal(Classifier.from_pretrained(tmp_path).terminal(x), classifier.terminal(x))


def damage(folder, how):
    weights, config = folder / "model.safetensors", folder / "config.json"
    if how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "truncated config":
        config.write_text(config.read_text()[:-50])
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        config.unlink()
    elif how == "pickle only":
        weights.rename(folder / "pytorch_model.bin")
    elif how == "other kind":
        config.write_text(json.dumps({**json.loads(config.read_text()), "kind": "gflownet"}))
    elif how == "newer format":
        config.write_text(json.dumps({**json.loads(config.read_text()), "format": 99}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated weights", "truncated or damaged"),
        ("truncated config", "not readable JSON"),
        ("no weights", "model.safetensors is missing"),
        ("no config", "config.json is missing"),
        ("pickle only", "model.safetensors is missing"),
        ("other kind", "holds a gflownet, expected a classifier"),
        ("newer format", "format 99, this sculpt reads format 1"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_what_is_wrong(tmp_path, how, message):
    Classifier(small(), ["a", "b"], 2).save_pretrained(tmp_path)
    damage(tmp_path, how)
    with pytest.raises(ValueError, match=message):
        Classifier.from_pretrained(tmp_path)


def test_the_weights_of_another_classifier_are_refused(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        Classifier(small(seed), ["a", "b"], 2).save_pretrained(tmp_path / name)
    (tmp_path / "a" / "model.safetensors").write_bytes((tmp_path / "b" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="mixed up"):
        Classifier.from_pretrained(tmp_path / "a")


def test_a_checkpoint_calls_nothing_but_networks_of_sculpt(tmp_path):
    Classifier(small(), ["a", "b"], 2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("os.system", "sculpt.files.read_json", "sculpt.formula.Mixture", "sculpt.files.nothing"):
        config["network"]["class"] = name
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="network"):
            Classifier.from_pretrained(tmp_path)


# Training that is repeated, stopped and continued ---------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_classifier_and_another_another():
    one, two, three = quick(network=None), quick(network=None), quick(network=None, seed=1)
    assert same_weights(one, two) and one.history == two.history and not same_weights(one, three)


def test_training_leaves_the_users_random_state_alone():
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    quick(steps=2, network=None)
    assert torch.equal(torch.rand(3), expected)


class Clock:
    """Every look at it is a minute later, so that every evaluation is saved."""

    now = 0.0

    def monotonic(self):
        self.now += 60
        return self.now

    process_time = monotonic


def kill(monkeypatch, when):
    """A training dies before the step for which this is so."""
    update = sculpt.training.Training._update

    def killed(self, gradients):
        if when(self):
            raise KeyboardInterrupt
        return update(self, gradients)

    monkeypatch.setattr(sculpt.training.Training, "_update", killed)


@pytest.mark.parametrize(("killed_at", "odds", "own"), [(1, False, False), (5, True, False), (11, False, True)])
def test_a_killed_run_that_is_called_again_ends_where_the_uninterrupted_one_does(tmp_path, monkeypatch, killed_at, odds, own):
    monkeypatch.setattr(sculpt.training, "time", Clock())
    torch.manual_seed(0)
    network = Own() if own else small()  # one with dropout and running means
    options = {"odds": odds, "data": None, "samples": 100, "sample_steps": 4, "network": network, "path": odds}
    whole = quick(**options)
    drawn, steps = [], []
    sample = sculpt.Diffusion.sample
    monkeypatch.setattr(sculpt.Diffusion, "sample", lambda self, n, **o: drawn.append(str(self)) or sample(self, n, **o))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill(patch, lambda training: training.step == killed_at)
        quick(checkpoint=tmp_path, **options)
    kill(monkeypatch, lambda training: steps.append(training.step))
    resumed = quick(checkpoint=tmp_path, **options)
    assert drawn == ["p", "q"]  # the base models' samples are not drawn again
    assert steps == list(range(killed_at, 12))  # with a state saved at every step, none is repeated
    assert same_weights(resumed, whole) and resumed.history == whole.history
    assert same_weights(Classifier.from_pretrained(tmp_path, Own() if own else None), whole)
    steps.clear()
    assert same_weights(quick(checkpoint=tmp_path, **options), whole) and not steps  # finished is finished


FEW = {
    "data": [randn(120, 2, seed=i) + i / 2 for i in range(2)],
    "held_out": 0.5,
    "network": None,
    "batch_size": 32,
    "descent": Descent(patience=None),
}
"""Few samples, of models that overlap: a head of the default size can know all of them by heart."""


def test_few_samples_are_not_learned_by_heart(monkeypatch):
    def held_out():
        losses = [row["held_out_terminal"] for row in quick(steps=400, **FEW).history]
        return losses[-1] - min(losses)

    assert held_out() < 0.03
    look = _Judge.look

    def looked(self, row):
        said = look(self, row)
        self.settled = False  # labels go on teaching
        return said

    monkeypatch.setattr(_Judge, "look", looked)
    assert held_out() > 0.2


def settled(training):
    """Whether the teacher is not the average any more."""
    terminal = [row["held_out_terminal"] for row in training.curve]
    return training.step > 80 and terminal[-1] > min(terminal) + 0.01 * math.log(2)


KEPT = {
    "candidates": ({"steps": 80, "path": True}, lambda training: training.step == 41),  # made anew at every second step
    "teacher": (FEW | {"steps": 120, "descent": Descent(0.02, patience=None)}, settled),
    "best weights": (FEW | {"steps": 120, "descent": Descent(0.02)}, lambda training: training.step == 61),
}


@pytest.mark.parametrize("what", KEPT)
def test_what_is_kept_for_several_steps_is_the_same_after_a_kill(tmp_path, monkeypatch, what):
    monkeypatch.setattr(sculpt.training, "time", Clock())
    options, time_to_die = KEPT[what]
    whole = quick(**options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill(patch, time_to_die)
        quick(checkpoint=tmp_path, **options)
    again = quick(checkpoint=tmp_path, **options)
    assert same_weights(again, whole) and again.history == whole.history


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"steps": 24}, "steps is 2 there and 24 here"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"descent": Descent(1e-3)}, "learning_rate is 0.002 there and 0.001 here"),
        ({"observations": 3}, "classifier is"),
        ({"odds": True}, "log_odds_range is 0.0 there and 3.5 here"),
        ({"batch_size": 17}, "batch_size is 16 there and 17 here"),
        ({"models": (P, R)}, "classifier is"),
        ({"odds": 1.0}, "log_odds_range is"),
    ],
)
def test_a_checkpoint_is_not_continued_with_other_arguments(tmp_path, other, said):
    quick(checkpoint=tmp_path, steps=2)
    with pytest.raises(ValueError, match=f"holds another training: .*{said}.*another folder"):
        quick(**{"checkpoint": tmp_path, "steps": 2, **other})


def test_a_checkpoint_is_not_continued_with_another_network_of_ones_own(tmp_path):
    quick(checkpoint=tmp_path, network=Own())
    wider = Own()
    wider.layers, wider.width = nn.Sequential(nn.Linear(3, 14), nn.BatchNorm1d(14)), 14
    with pytest.raises(ValueError, match="not fit the network of this training: .* is .*, expected "):
        quick(checkpoint=tmp_path, network=wider)


def test_a_damaged_state_of_training_is_refused(tmp_path):
    quick(checkpoint=tmp_path)
    state = tmp_path / "training" / "state.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="truncated"):
        quick(checkpoint=tmp_path)
    state.write_bytes((tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="not the state of a training"):
        quick(checkpoint=tmp_path)


def test_a_damaged_cache_of_samples_is_refused(tmp_path):
    options = {"data": None, "samples": 50, "sample_steps": 2, "checkpoint": tmp_path}
    quick(**options)
    (tmp_path / "training" / "state.safetensors").unlink()
    cache = next((tmp_path / "training").glob("samples-*.safetensors"))
    cache.write_bytes(cache.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        quick(**options)


def test_files_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    first = Classifier(small(0), ["a", "b"], 2)
    first.save_pretrained(tmp_path)
    import sculpt.files

    def full(source, target):
        raise OSError("No space left on device")

    monkeypatch.setattr(sculpt.files.os, "rename", full)
    with pytest.raises(OSError, match="No space"):
        Classifier(small(1), ["a", "b"], 2).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert same_weights(Classifier.from_pretrained(tmp_path), first)


def test_training_stops_early_when_the_held_out_loss_does_not_improve():
    stopped = quick(descent=Descent(0.0, patience=3), steps=200)
    # Nothing moves, so once the ramp is over (15 % of the steps) every evaluation is one without improvement.
    assert 30 <= stopped.history[-1]["step"] <= 60
    assert quick(descent=Descent(0.0, patience=1000), steps=60).history[-1]["step"] == 60


def test_the_result_has_the_best_held_out_weights_and_not_the_last(monkeypatch):
    record, weights = sculpt.classifier.fit._Fit.record, []

    def recorded(self, row):
        weights.append({name: value.clone() for name, value in self.average.state_dict().items()})
        record(self, row)

    monkeypatch.setattr(sculpt.classifier.fit._Fit, "record", recorded)
    # A learning rate far too large, on few samples: the held-out loss gets worse.
    options = FEW | {"data": [part[:30] for part in FEW["data"]], "steps": 200}
    classifier = quick(**options | {"descent": Descent(0.02, patience=100)})
    totals = [sum(row[f"held_out_{name}"] for name in ("terminal", "marginal", "joint")) for row in classifier.history]
    # Judgement begins with the last evaluation within 15 % of the steps: the targets still move before.
    first = max(i for i, row in enumerate(classifier.history) if row["step"] < 30)
    best = min(range(first, len(totals)), key=totals.__getitem__)
    assert totals[best] < totals[-1] - 0.05, "the run was too good for this test"
    assert all(torch.equal(weights[best][name], value) for name, value in classifier.state_dict().items())
    assert [i for i, row in enumerate(classifier.history) if "kept" in row] == [best]
    last = quick(**options | {"descent": Descent(0.02, patience=None)})  # asked for, the last are returned
    assert all(torch.equal(weights[-1][name], value) for name, value in last.state_dict().items())
    assert [row["step"] for row in last.history if "kept" in row] == [200]


def test_options_of_the_descent_are_told_from_those_of_the_store():
    with pytest.raises(TypeError, match=r"descent=sculpt.Descent\(learning_rate=0.1, patience=2\)"):
        quick(learning_rate=0.1, patience=2)


# Models that offer finished samples only ----------------------------------------------------------------------------------------------------


class OneShot(sculpt.BaseModel):
    """A generator that gives samples and nothing on the way to them."""

    key = device = None  # said in __init__

    def __init__(self, name, mixture):
        self.name, self.key, self.mixture, self.shape, self.device = (
            name,
            f"one-shot-{name}",
            mixture,
            (2,),
            torch.device("cpu"),
        )

    def stream(self, n, road, settings):
        x = self.mixture.draw(n, settings.generator).float()
        yield sculpt.chain.Progress("drawing", 0, None, n, n, None, self.result(x, None, sculpt.Diagnostics("one shot")))

    def check_composable(self, other):
        assert isinstance(other, OneShot)


class Plain(nn.Module):
    width = 64

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())

    def forward(self, x):
        return self.layers(x)


def test_a_terminal_head_alone_is_fitted_to_models_that_offer_finished_samples_only():
    one, two = (OneShot(name, mixture) for name, mixture in zip("ab", RINGS, strict=False))
    with pytest.raises(ValueError, match=r"no default classifier network for samples of a\. Pass network=.*\(b, 2\)"):
        sculpt.fit([one, two], samples=100, progress=False)
    torch.manual_seed(0)
    classifier = sculpt.fit([one, two], network=Plain(), samples=10_000, steps=400, progress=False)
    assert {"terminal", "held_out_terminal"} <= set(classifier.history[-1]) and "joint" not in classifier.history[-1]
    exact, x = ExactGuide(RINGS[:2]), torch.cat(draws(RINGS[:2], 5_000, seed=7))
    log_p = exact.terminal(x)
    assert 0 <= (log_p.exp() * (log_p - classifier.terminal(x).double())).sum(-1).mean() < 0.02
    # It is the referee that rejection needs.
    samples = (one & two).sample(2000, sculpt.Rejection(classifier), generator=generator(), progress=False).x
    exact_draws = (one & two).sample(2000, sculpt.Rejection(exact), generator=generator(1), progress=False).x
    assert (samples.mean(0) - exact_draws.mean(0)).abs().max() < 0.1


def test_a_killed_fit_of_a_terminal_head_alone_goes_on_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(sculpt.training, "time", Clock())
    models = [OneShot(name, mixture) for name, mixture in zip("ab", RINGS, strict=False)]
    torch.manual_seed(0)
    options = {"models": models, "data": None, "samples": 200, "network": Plain(), "observations": 3, "odds": True}
    whole = quick(**options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill(patch, lambda training: training.step == 7)
        quick(checkpoint=tmp_path, **options)
    assert same_weights(quick(checkpoint=tmp_path, **options), whole)
