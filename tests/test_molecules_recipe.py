"""The training of the molecule policies: what it converges to, and that a killed one goes on as if nothing had been."""

import importlib.util
from pathlib import Path

import pytest
import torch

import sculpt
from sculpt.gflownet import exact
from sculpt.gflownet.model import GFlowNet
from sculpt.gflownet.network import NetworkPolicy
from sculpt.molecules import FragmentNetwork, FragmentTrees


@pytest.fixture
def recipe(monkeypatch):
    path = Path(__file__).parents[1] / "pretrained" / "molecules" / "recipe.py"
    spec = importlib.util.spec_from_file_location("molecules_recipe", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(module, "REPLAY", 8)
    monkeypatch.setattr(module, "FIRST", 32)
    return module


def test_a_killed_training_goes_on_bit_for_bit(recipe, tmp_path):
    through, first = recipe.Training("sa", 6, tmp_path / "a"), recipe.Training("sa", 6, tmp_path / "b")
    for _ in range(6):
        through.train_step()
    for _ in range(3):
        first.train_step()
    first.save()
    again = recipe.Training("sa", 6, tmp_path / "b")
    assert again.step == 3
    for _ in range(3):
        again.train_step()
    expected, got = through.tensors(), again.tensors()
    assert expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in expected)


def test_its_checkpoint_loads_at_any_exponent_and_writes_molecules(recipe, tmp_path):
    training = recipe.Training("qed", 1, tmp_path / "state")
    training.train_step()
    training.finish(tmp_path / "qed", 64)
    assert "balance spread" in (tmp_path / "qed" / "README.md").read_text()
    p, q = (sculpt.load(tmp_path / "qed", beta=beta) for beta in (32, 96))
    assert p.key != q.key
    samples = (p & q).sample(16, particles=64, generator=torch.Generator().manual_seed(0))
    assert len(p.decode(samples.x)) == 16


@pytest.mark.slow
def test_trajectory_balance_on_three_fragments_reaches_the_reward_at_every_exponent(recipe):
    """The same loss as the recipe's, where the answer can be counted."""
    torch.manual_seed(0)
    env = FragmentTrees([["C", [0, 0]], ["N", [0, 0, 0]], ["c1ccccc1", [0, 1, 3, 4]]], slots=3)
    graph = exact.dag(env)
    ends = graph.allowed[:, -1]
    x = graph.states[ends]
    log_R = (torch.rand(2**10)[env.trees(x) % 2**10] * 0.03 + 0.97).log()
    log_w = env.writings(x).log().float()
    network, log_Z = FragmentNetwork(env.vocabulary, env.slots, width=64, depth=2), recipe.LogZ()
    optimizer = torch.optim.Adam([{"params": network.parameters(), "lr": 2e-3}, {"params": log_Z.parameters(), "lr": 0.1}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    for _ in range(1000):
        beta = 96 * torch.rand(64)
        rows = torch.randint(len(x), (64,))
        residual = log_Z(beta) + network.log_p(x[rows], beta) - beta * log_R[rows] + log_w[rows]
        loss = torch.nn.functional.huber_loss(residual, torch.zeros_like(residual), delta=10.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    # What is left grows with the exponent, as what has to be learnt does: the largest target is 3 nats from flat.
    for beta, bound in ((0.0, 0.12), (32.0, 0.12), (96.0, 0.3)):
        model = GFlowNet(env, NetworkPolicy(network.eval(), env.n_actions), condition={"beta": beta})
        p = exact.terminal_distribution(model)[ends]
        target = torch.softmax(beta * log_R - log_w, 0)
        assert exact.l1(p, target.to(p)) < bound < 0.6 * exact.l1(torch.full_like(p, 1 / len(p)), target.to(p))
