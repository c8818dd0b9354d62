"""Fitting a classifier to GFlowNets."""

import pytest
import torch
from gflownet_models import ENVIRONMENTS, Stairs, arbitrary, perfect

import sculpt
from sculpt.formula import Posterior, label_sets
from sculpt.gflownet import exact
from sculpt.gflownet.network import GridNetwork
from sculpt.gflownet.policy import guide
from sculpt.gflownet.replay import GFlowNetReplay, Trajectories, record


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def errors(models, classifier, posteriors):
    ps = [exact.terminal_distribution(p) for p in models]
    guided = [exact.terminal_distribution(guide(f, models, classifier)) for f in posteriors]
    return [exact.l1(q, exact.target(f, ps)) for q, f in zip(guided, posteriors, strict=True)]


# What training sees


def test_recorded_trajectories_follow_their_actions_and_end_in_their_samples():
    models = arbitrary(Stairs(), 2)
    parts = [record(model, models, 50, seeded(i)) for i, model in enumerate(models)]
    both = Trajectories.join([part.select(torch.randint(50, (30,), generator=seeded(2))) for part in parts])
    assert len(both.x) == 60 and torch.equal(both.states[both.last], both.x) and (both.actions[both.last] == 3).all()
    assert torch.equal(both.owner[both.last], torch.arange(60))
    inner = both.actions < 3
    following = models[0].step(both.states[inner], both.actions[inner])
    assert torch.equal(following, both.states[1:][inner[:-1]]) and torch.equal(
        both.owner[1:][inner[:-1]], both.owner[:-1][inner[:-1]]
    )


def test_with_balanced_flows_a_trajectory_knows_its_label_as_well_as_its_states_do():
    models = perfect(ENVIRONMENTS["sets"](), 3)
    classifier = exact.ExactClassifier(models)
    part = record(models[1], models, 200, seeded())
    torch.testing.assert_close(part.p.double().log(), classifier.terminal(part.x), atol=1e-5, rtol=0)
    torch.testing.assert_close(part.so_far.double().log(), classifier.marginal(part.states), atol=1e-5, rtol=0)


def test_the_labels_that_trajectories_give_away_are_right_on_average():
    models = arbitrary(ENVIRONMENTS["grid-2d"](), 2)
    parts = [record(model, models, 20_000, seeded(i)) for i, model in enumerate(models)]
    # Each model's trajectories, seen as coming from either: E p(y = i | τ) is one half.
    assert abs(float(torch.cat([part.p for part in parts]).mean(0)[0]) - 0.5) < 5 / (2 * 40_000**0.5)


def test_a_step_sees_the_same_batch_again_and_held_out_data_is_other_data():
    models = perfect(ENVIRONMENTS["grid-2d"](), 2)

    def batch(seed, held_out=False, size=16):
        return GFlowNetReplay(models, samples=64).trajectories(size, seeded(seed), held_out)

    assert torch.equal(batch(5).states, batch(5).states) and not torch.equal(batch(5).x, batch(6).x)
    replay = GFlowNetReplay(models, samples=64, reuse=2.0)
    for seed in (3, 8, 3):
        assert torch.equal(
            replay.trajectories(16, seeded(seed), False).x,
            GFlowNetReplay(models, samples=64, reuse=2.0).trajectories(16, seeded(seed), False).x,
        )
    assert not torch.equal(batch(5).x, batch(5, held_out=True).x)


def test_the_balance_of_trajectories_is_what_a_correction_would_weigh():
    models = arbitrary(ENVIRONMENTS["grid-2d"](), 2)
    torch.manual_seed(0)
    classifier = sculpt.Classifier(GridNetwork(2, 6, width=16), [p.key for p in models]).eval()
    replay = GFlowNetReplay(models, samples=64)
    policy = guide(Posterior(2, (0, 1)), models, classifier).policy
    part = replay.trajectories(1, seeded(1), False)
    loss = replay.losses(classifier, classifier, 1, seeded(1), 0.0, torch.device("cpu"))["joint"]
    log_w = {}
    for i, (anchor, label) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        policy = guide(Posterior(2, (anchor, label)), models, classifier).policy
        log_p, log_h = policy.scores(part.states)
        step = torch.logsumexp(log_p + log_h, -1) - log_h.gather(1, part.actions[:, None])[:, 0]
        total = (
            torch.zeros(2, dtype=torch.float64).index_add(0, part.owner, step)
            + policy.log_h_end(part.x)
            - policy.log_h(models[0].env.s0[None])
        )
        f = policy.log_h_end(part.x).exp()
        w = part.p[:, anchor] * (0.7 * f / f.mean() + 0.3)
        log_w[i] = (w * torch.nn.functional.huber_loss(total, torch.zeros_like(total), reduction="none")).mean()
    assert float(loss.detach()) == pytest.approx(float(sum(log_w.values()).detach()) / 4, rel=1e-4)


# What comes out


def test_a_fitted_classifier_samples_every_label_set():
    models = arbitrary(ENVIRONMENTS["grid-2d"](), 3)
    classifier = sculpt.fit(models, observations=3, steps=400, batch_size=64, learning_rate=5e-3, samples=2000, progress=False)
    found = errors(models, classifier, [Posterior(3, labels) for n in (2, 3) for labels in label_sets(3, n)])
    assert max(found) < 0.06 and sum(found) / len(found) < 0.03


@pytest.mark.parametrize("children", [False, True])
def test_a_fitted_classifier_takes_odds_with_and_without_a_head_over_children(children, tmp_path):
    models = perfect(ENVIRONMENTS["grid-2d"](), 2)
    options = {"steps": 400, "batch_size": 64, "learning_rate": 5e-3, "samples": 2000, "progress": False}
    classifier = sculpt.fit(models, odds=True, children=children, **options)
    assert classifier.n_children == (3 if children else 1)
    posteriors = [Posterior(2, labels, (a, 1 - a)) for labels in label_sets(2, 2) for a in (0.05, 0.5, 0.95)]
    assert max(errors(models, classifier, posteriors)) < 0.08
    classifier.save_pretrained(tmp_path)
    again = sculpt.load(tmp_path)
    p, q = models
    samples = [(q - p).sample(50, c, generator=seeded()).x for c in (classifier, again)]
    assert torch.equal(*samples)


def test_a_network_of_ones_own_serves_any_environment():
    models = arbitrary(ENVIRONMENTS["ebm"](), 2)

    class Own(torch.nn.Module):
        width = 32

        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(
                torch.nn.Linear(12, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32), torch.nn.ReLU()
            )

        def forward(self, states):
            return self.layers(torch.nn.functional.one_hot(states + 1, 3).flatten(1).float())

    with pytest.raises(ValueError, match=r"No default classifier network for DiscreteEBM\(ndim=4\). Pass network="):
        sculpt.fit(models, steps=1, progress=False)
    torch.manual_seed(0)
    classifier = sculpt.fit(models, network=Own(), steps=300, batch_size=64, learning_rate=5e-3, samples=2000, progress=False)
    assert max(errors(models, classifier, [Posterior(2, labels) for labels in label_sets(2, 2)])) < 0.06
