"""The checkpoints of ``pretrained/grid`` do what their cards say, and their training survives a kill."""

import hashlib
import importlib.util
import itertools
import re
from pathlib import Path

import pytest
import torch

import sculpt
from sculpt.formula import Posterior, label_sets
from sculpt.gflownet import exact

GRID = Path(__file__).parents[1] / "pretrained" / "grid"
POLICIES = ("symmetric_shubert", "diag_sigmoid", "circle1", "circle2", "circle3")


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("grid_recipe", GRID / "recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", POLICIES)
def test_a_base_policy_samples_its_reward(name, recipe):
    model = sculpt.load(GRID / name)
    reward = recipe.log_reward(name, exact.dag(model).states).softmax(0)
    assert model.name == name and exact.l1(exact.terminal_distribution(model), reward) < 0.005


@pytest.mark.parametrize("name", [*POLICIES, "pair", "circles"])
def test_the_card_names_the_weights(name):
    sha = re.search(r"sha256 ([0-9a-f]{64})", (GRID / name / "README.md").read_text()).group(1)
    assert hashlib.sha256((GRID / name / "model.safetensors").read_bytes()).hexdigest() == sha


def test_rewards_are_the_papers(recipe):
    ends = torch.tensor([[0, 0], [31, 31], [31, 0], [15, 16]])
    # sigma(-10), sigma(10), sigma(0) and about sigma(0)
    expected = torch.tensor([4.54e-5 + 1e-5, 1.0, 0.5, 0.5], dtype=torch.float64).log()
    torch.testing.assert_close(recipe.log_reward("diag_sigmoid", ends), expected, atol=2e-3, rtol=0)
    shubert = recipe.log_reward("symmetric_shubert", exact.dag(sculpt.load(GRID / "circle1")).states).view(32, 32)
    torch.testing.assert_close(shubert, shubert.flip(0).T)
    outside = [recipe.log_reward(f"circle{i}", ends[:3]).exp() for i in (1, 2, 3)]
    torch.testing.assert_close(torch.stack(outside), torch.full((3, 3), 0.1, dtype=torch.float64))


@pytest.mark.parametrize("name", ["pair", "circles"])
def test_one_classifier_serves_every_composition(name, recipe):
    settings = recipe.SETS[name]
    models = [sculpt.load(GRID / model) for model in settings["models"]]
    classifier = sculpt.load(GRID / name)
    p = [exact.terminal_distribution(model) for model in models]
    odds = [(a, 1 - a) for a in (0.05, 0.5, 0.95)] if classifier.odds else [None]
    errors = []
    for labels in label_sets(len(models), classifier.observations):
        for v in odds:
            guided = sculpt.posterior(models, labels, v).guided(classifier)
            errors.append(exact.l1(exact.terminal_distribution(guided), exact.target(Posterior(len(models), labels, v), p)))
    assert max(errors) < 0.04 and sum(errors) / len(errors) < 0.02


def test_a_killed_training_goes_on_bit_for_bit(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "BATCH", 32)

    def take(made, steps):
        for _ in itertools.islice(made.training.run(made.loss, made.steps), steps):
            pass
        return made

    through, first = take(recipe.Recipe("circle1", 6), 6), take(recipe.Recipe("circle1", 6, tmp_path), 3)
    first.training.save()
    again = recipe.Recipe("circle1", 6, tmp_path)
    assert again.training.step == 3
    take(again, 3)
    assert torch.equal(through.log_Z[0], again.log_Z[0]) and again.log_Z[0] != 0
    for part in ("network", "average"):
        one, two = (getattr(made.training, part).state_dict() for made in (through, again))
        assert all(torch.equal(value, two[name]) for name, value in one.items())
    with pytest.raises(ValueError, match="name is 'circle1' there and 'circle2' here"):
        recipe.Recipe("circle2", 6, tmp_path)


def test_a_finished_training_leaves_a_checkpoint_with_its_card_and_no_state(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "BATCH", 32)
    model = recipe.train("circle3", 2, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["circle3"]
    again, card = sculpt.load(tmp_path / "circle3"), (tmp_path / "circle3" / "README.md").read_text()
    assert again.key == model.key and "2 steps of 32 trajectories" in card
    shipped = (GRID / "circle3" / "README.md").read_text()
    assert [line.split("|")[1] for line in card.splitlines() if "|" in line] == [
        line.split("|")[1] for line in shipped.splitlines() if "|" in line
    ]
