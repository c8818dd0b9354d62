"""Fitting a classifier to GFlowNets."""

import pytest
import torch
from gflownet_models import ENVIRONMENTS, Stairs, arbitrary, guide, perfect

import sculpt
from sculpt.actions.networks import GridNetwork
from sculpt.actions.recordings import Trajectories, record
from sculpt.actions.trajectories import TrajectoryStore
from sculpt.classifier.fit import Descent
from sculpt.classifier.store import Draw
from sculpt.formula import Posterior, label_sets
from sculpt.gflownet import exact
from sculpt.training import Training


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

    def batch(step, held_out=False, size=16):
        return TrajectoryStore(models, samples=64).trajectories(Draw(size, seeded(step), step, held_out))

    assert torch.equal(batch(5).states, batch(5).states) and not torch.equal(batch(5).x, batch(6).x)
    store = TrajectoryStore(models, samples=64, reuse=2.0)
    for step in (3, 8, 3):
        fresh = TrajectoryStore(models, samples=64, reuse=2.0).trajectories(Draw(16, seeded(step), step))
        assert torch.equal(store.trajectories(Draw(16, seeded(step), step)).x, fresh.x)
    assert not torch.equal(batch(5).x, batch(5, held_out=True).x)


def test_trajectories_are_renewed_by_the_step_and_not_by_the_generator():
    store = TrajectoryStore(perfect(ENVIRONMENTS["grid-2d"](), 2), samples=64, reuse=2.0)
    fillings = []
    for step in range(24):
        store.trajectories(Draw(16, seeded(7), step))
        fillings.append(store.fillings[False][0])
    assert len(set(fillings)) in (3, 4) and fillings == sorted(fillings)  # 64 trajectories serve 8 steps of 16, each used twice


def test_the_balance_of_trajectories_is_what_a_correction_would_weigh():
    models = arbitrary(ENVIRONMENTS["grid-2d"](), 2)
    torch.manual_seed(0)
    classifier = sculpt.Classifier(GridNetwork(2, 6, width=16), [p.key for p in models]).eval()
    store = TrajectoryStore(models, samples=64)
    part = store.trajectories(Draw(1, seeded(1), 1))
    loss = store.losses(classifier, classifier, Draw(1, seeded(1), 1))["joint"]
    log_w = {}
    for i, (anchor, label) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        policy = guide(Posterior(2, (anchor, label)), models, classifier).guidance
        log_p, log_h = policy.scores(part.states)
        step = torch.logsumexp(log_p + log_h, -1) - log_h.gather(1, part.actions[:, None])[:, 0]
        total = (
            torch.zeros(2, dtype=torch.float64).index_add(0, part.owner, step)
            + policy.log_h_end(part.x)
            - policy.log_h(models[0].start(1))
        )
        f = policy.log_h_end(part.x).exp()
        w = part.p[:, anchor] * (0.7 * f / f.mean() + 0.3)
        log_w[i] = (w * torch.nn.functional.huber_loss(total, torch.zeros_like(total), reduction="none")).mean()
    assert float(loss.detach()) == pytest.approx(float(sum(log_w.values()).detach()) / 4, rel=1e-4)


# What comes out


def test_a_fitted_classifier_samples_every_label_set():
    models = arbitrary(ENVIRONMENTS["grid-2d"](), 3)
    options = {"steps": 400, "batch_size": 64, "descent": Descent(5e-3), "samples": 2000, "progress": False}
    classifier = sculpt.fit(models, observations=3, **options)
    found = errors(models, classifier, [Posterior(3, labels) for n in (2, 3) for labels in label_sets(3, n)])
    assert max(found) < 0.06 and sum(found) / len(found) < 0.03


@pytest.mark.parametrize("children", [False, True])
def test_a_fitted_classifier_takes_odds_with_and_without_a_head_over_children(children, tmp_path):
    models = perfect(ENVIRONMENTS["grid-2d"](), 2)
    options = {"steps": 400, "batch_size": 64, "descent": Descent(5e-3), "samples": 2000, "progress": False}
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

    torch.manual_seed(0)
    options = {"steps": 300, "batch_size": 64, "descent": Descent(5e-3), "samples": 2000, "progress": False}
    classifier = sculpt.fit(models, network=Own(), **options)
    assert max(errors(models, classifier, [Posterior(2, labels) for labels in label_sets(2, 2)])) < 0.06


@pytest.mark.parametrize("composed", [False, True])
def test_a_killed_fit_goes_on_with_the_trajectories_that_its_classifiers_have_guided(tmp_path, monkeypatch, composed):
    models = perfect(ENVIRONMENTS["grid-2d"](), 2)
    options = {"odds": True, "steps": 120, "batch_size": 8, "samples": 60, "composed": composed, "progress": False}
    whole, update = sculpt.fit(models, **options), Training._update

    def killed(self, gradients):
        if self.step == 77:  # guided trajectories were drawn four times by then
            raise KeyboardInterrupt
        return update(self, gradients)

    monkeypatch.setattr("sculpt.classifier.fit.Training.save", lambda self, every, save=Training.save: save(self))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Training, "_update", killed)
        sculpt.fit(models, checkpoint=tmp_path, **options)
    resumed = sculpt.fit(models, checkpoint=tmp_path, **options)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert resumed.history == whole.history


def test_a_store_gives_back_the_guided_trajectories_that_it_was_saved_with():
    models = perfect(ENVIRONMENTS["grid-2d"](), 2)
    torch.manual_seed(0)
    classifier = sculpt.Classifier(GridNetwork(2, 6, width=16), [p.key for p in models]).eval()
    one, two = (TrajectoryStore(models, samples=64, composed=True) for _ in range(2))
    for step in (0, 40, 80):
        one.losses(classifier, classifier, Draw(4, seeded(step), step))
    two.load_state_dict(one.state_dict())
    assert len(two.guided) == len(one.guided) == 9 and two.renewed == one.renewed
    for a, b in zip(one.guided, two.guided, strict=True):
        assert all(torch.equal(value, vars(b)[name]) for name, value in vars(a).items())
