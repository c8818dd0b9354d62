"""The trainings of the molecule policies and of the proxy's student: what they converge to, and that a killed one goes on bit for bit."""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch

import sculpt
from sculpt.files import replace_file
from sculpt.gflownet import exact
from sculpt.gflownet.estimators import NetworkPolicy
from sculpt.gflownet.model import GFlowNet
from sculpt.molecules import SEH, FragmentNetwork, FragmentTrees
from sculpt.molecules.seh import STUDENT


def load(name):
    path = Path(__file__).parents[1] / "pretrained" / "molecules" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"molecules_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def take(recipe, steps):
    for _ in itertools.islice(recipe.training.run(recipe.loss, recipe.steps), steps):
        pass
    return recipe


def bits(recipe, **further):
    """Everything that a training goes on from."""
    parts = {"network": recipe.training.network, "average": recipe.training.average, **further}
    state = {f"{part}/{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}
    moments = recipe.training.optimizer.state_dict()["state"]
    return state | {f"{i}/{name}": value for i, part in moments.items() for name, value in part.items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.fixture
def recipe(monkeypatch):
    module = load("recipe")
    monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(module, "REPLAY", 8)
    monkeypatch.setattr(module, "FIRST", 32)
    return module


def test_a_killed_training_goes_on_bit_for_bit(recipe, tmp_path):
    through, first = take(recipe.Recipe("sa", 6, tmp_path / "a"), 6), take(recipe.Recipe("sa", 6, tmp_path / "b"), 3)
    first.training.save()
    again = recipe.Recipe("sa", 6, tmp_path / "b")
    assert again.training.step == 3 and int(again.buffer.count) == 32 + 3 * 4
    take(again, 3)
    assert same(*(bits(run, log_Z=run.log_Z, buffer=run.buffer) for run in (through, again)))


def test_the_training_of_another_reward_is_refused(recipe, tmp_path):
    recipe.Recipe("sa", 6, tmp_path).training.save()
    with pytest.raises(ValueError, match="holds another training: name is 'sa' there and 'qed' here"):
        recipe.Recipe("qed", 6, tmp_path)


def test_its_checkpoint_loads_at_any_exponent_and_writes_molecules(recipe, tmp_path):
    made = take(recipe.Recipe("qed", 1, tmp_path / "state"), 1)
    made.finish(tmp_path / "qed", 64)
    assert "balance spread" in (tmp_path / "qed" / "README.md").read_text()
    p, q = (sculpt.load(tmp_path / "qed", beta=beta) for beta in (32, 96))
    assert p.key != q.key
    road, generator = sculpt.Tracked(particles=64), torch.Generator().manual_seed(0)
    samples = (p & q).sample(16, road, generator=generator)
    assert len(samples.decode()) == 16


SMILES = ["C" * n + end for n in range(1, 25) for end in ("", "O", "N", "Cl")]


@pytest.fixture
def student(monkeypatch, tmp_path):
    """Its recipe with molecules of a table, and itself in the place of the proxy."""
    module = load("student")
    monkeypatch.setattr(module, "BATCH", 4)
    replace_file(tmp_path / "alkanes.csv", "".join(f"{s},{len(s) / 4:.5f}\n" for s in SMILES).encode())
    teacher = SEH(STUDENT)
    pad = torch.nn.functional.pad
    states = teacher.network.states
    monkeypatch.setattr(teacher.network, "states", lambda *graph: (pad(h, (0, 64 - h.shape[1])) for h in states(*graph)))
    return module, module.Molecules(tmp_path, teacher), teacher


def test_a_killed_training_of_the_student_goes_on_bit_for_bit(student, tmp_path):
    module, molecules, _ = student
    through = take(module.Recipe(molecules, 6, tmp_path / "a"), 6)
    first = take(module.Recipe(molecules, 6, tmp_path / "b"), 3)
    first.training.save()
    again = module.Recipe(molecules, 6, tmp_path / "b")
    assert again.training.step == 3
    assert same(bits(through), bits(take(again, 3)))


def test_the_student_is_saved_with_a_card_and_is_a_reward(student, tmp_path, monkeypatch):
    module, molecules, teacher = student
    monkeypatch.setattr(module, "STUDENT", tmp_path / "student")
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.delenv("SCULPT_DATA", raising=False)
    recipe = take(module.Recipe(molecules, 2, tmp_path / "state"), 2)
    module.finish(recipe, teacher)
    card = (tmp_path / "student" / "README.md").read_text()
    assert "| alkanes |" in card and "2 steps of 4 molecules" in card
    values, again = recipe.predict(torch.arange(3)), SEH(tmp_path / "student").proxy(molecules.smiles[:3])
    torch.testing.assert_close(values, again)


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
