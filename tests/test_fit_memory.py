"""What a fit takes of memory: told before it is taken, bounded for any label sets, lengths and actions, and exact where it is cut into parts."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers_models import exact_model, three_rings
from gflownet_models import ENVIRONMENTS, arbitrary, network_policy
from gfn.gym import HyperGrid
from torch import nn

import sculpt
from sculpt.actions import trajectories
from sculpt.actions.networks import GridNetwork
from sculpt.actions.trajectories import TrajectoryStore
from sculpt.classifier.heads import Classifier, SetHead
from sculpt.classifier.plan import STEP, Plan, kept
from sculpt.classifier.store import Draw
from sculpt.diffusion.states import DiffusionStore
from sculpt.gflownet.model import GFlowNet

PRETRAINED = Path(__file__).parents[1] / "pretrained"


def subsets(items, m):
    """m policies that write subsets of so many items, one item after the other: an action for each item, and the exit."""
    env = HyperGrid(ndim=items, height=2, validate_modes=False)
    return [GFlowNet(env, network_policy(env, seed, scale=0.3), name=f"p{seed}") for seed in range(m)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# What is told ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "children"), [(2, 2, 1), (3, 3, 7), (8, 4, 1), (5, 6, 2)])
def test_a_plan_knows_the_head_that_it_is_of(m, n, children):
    head, plan = SetHead(16, m, n, children=children), Plan(m, n, 16, children=children)
    assert plan.weights == head.out.weight.nbytes + head.out.bias.nbytes
    assert plan.row == head(torch.zeros(1, 16))[0, 0].nbytes
    orders = sum(m ** (n - 1 - len(labels)) for labels in head.smaller)
    assert plan.smaller == pytest.approx(4 * m * (len(head.smaller) + orders / 2), abs=4 * m * len(head.smaller))


class Many(sculpt.ActionModel):
    """One of many models, none of which is ever asked for a sample."""

    shape, n_actions, device = (1,), 4, torch.device("cpu")

    def __init__(self, name):
        self.name = self.key = name

    def start(self, n):
        raise AssertionError("a sample was drawn")

    log_pf = step = start


def test_label_sets_that_cannot_fit_are_refused_before_samples_are_drawn():
    models = [Many(f"p{i}") for i in range(400)]
    said = r"4 observations of 400 models would take [\d,.]+ GB of memory, and may take 3 GB: 4,298,720,000 outputs.*Fit observations=2 or fewer"
    with pytest.raises(ValueError, match=said):
        sculpt.fit(models, 4)
    with pytest.raises(ValueError, match="more than 1,000,000 GB"):
        sculpt.fit(models[:3], 10**9)


def test_a_million_outputs_are_refused_unless_there_is_memory_for_them():
    plan = Plan(8, 4, 256, children=1042)
    said = r"take 19.5 GB .* may take 3 GB: 960 outputs for each of 1042 children are 9.3 GB of weights.*Fit observations=2 .*children=False"
    with pytest.raises(ValueError, match=said):
        plan.check(3.0)
    assert plan.check(20.0) is plan


def test_a_head_over_children_that_cannot_fit_is_refused_and_the_way_out_fits():
    models = subsets(30, 3)
    options = {"network": GridNetwork(30, 2, width=64), "steps": 1, "samples": 30, "batch_size": 1, "progress": False}
    with pytest.raises(
        ValueError, match=r"for each of 31 children .* or leave out the head over children .*Descent\(memory="
    ) as error:
        sculpt.fit(models, 4, children=True, descent=sculpt.Descent(memory=0.002), **options)
    assert "Fit observations=2 or fewer models" in str(error.value)
    assert sculpt.fit(models, 4, children=False, descent=sculpt.Descent(memory=0.02), **options).n_children == 1


def test_a_batch_that_cannot_fit_is_refused_and_the_default_is_one_that_does():
    mixtures = three_rings()
    models = [exact_model(mixture, name=name) for mixture, name in zip(mixtures, "pqr", strict=True)]
    options = {"data": [mixture.draw(50, seeded()).float() for mixture in mixtures], "progress": False}
    with pytest.raises(
        ValueError, match=r"GB for a step of batch_size=1000000\. Fit observations=.* or pass a smaller batch_size"
    ):
        sculpt.fit(models, 20, batch_size=1_000_000, **options)
    for path, n in ((False, 9), (True, 7)):
        store = DiffusionStore(models, path=path, **options)
        plan = store.plan(Plan(8, n, 256), store.default_network())
        assert 1 <= plan.batch_size < store.batch_size and 0.5 * STEP < plan.step <= STEP


def test_a_network_says_what_it_keeps_for_the_way_back():
    network = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 8))
    before = torch.random.get_rng_state()
    # What comes out of the ReLU, and the features; states and weights are there anyway.
    assert kept(network, torch.zeros(64, 10)) == 4 * (32 + 8)
    assert torch.equal(torch.random.get_rng_state(), before) and network.training


# The head over children is chosen by its cost --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grid/pair", "grid/circles", "molecules/seh-sa", "molecules/seh-sa-qed"])
def test_the_head_of_a_pretrained_classifier_is_the_one_that_would_be_chosen_again(name):
    config = json.loads((PRETRAINED / name / "config.json").read_text())
    how = {"beta": 32} if name.startswith("molecules") else {}
    models = [sculpt.load((PRETRAINED / name).parent / model.split("[")[0], **how) for model in config["names"]]
    store = TrajectoryStore(models)
    network = store.default_network()
    plan = store.plan(Plan(len(models), config["observations"], network.width, config["odds"]), network)
    assert plan.children == config["children"] and plan.batch_size == 256


def test_children_are_visited_where_a_head_over_them_would_be_larger_than_the_network():
    def chosen(m, n, items=99):
        store = TrajectoryStore(subsets(items, m))
        return store.plan(Plan(m, n, 256), GridNetwork(items, 2)).children

    assert (
        chosen(2, 2) == 100 and chosen(3, 3) == 100
    )  # a pass of the network for each child is far more than a column for each
    assert chosen(4, 5) == 1  # 280 outputs of a child are as much as its features
    assert chosen(2, 2, items=6) == 1  # few children


# A batch in parts is the batch -----------------------------------------------------------------------------------------------------------


def losses_and_gradients(store, classifier, teacher, draw):
    classifier.zero_grad()
    losses = store.losses(classifier, teacher, draw())
    sum(losses.values()).backward()
    with torch.no_grad():
        seen = store.losses(classifier, teacher, draw())
    return losses, seen, [parameter.grad.clone() for parameter in classifier.parameters()]


@pytest.mark.parametrize("children", [False, True])
@pytest.mark.parametrize(("odds", "composed"), [(False, False), (True, False), (True, True)])
def test_a_batch_in_parts_has_the_losses_and_the_gradient_of_the_whole(monkeypatch, children, odds, composed):
    models = arbitrary(ENVIRONMENTS["sets"](), 3)
    torch.manual_seed(0)

    def network():
        return nn.Sequential(nn.Flatten(), nn.Linear(5, 16), nn.SiLU(), nn.Dropout(0.0))

    backbones = [network() for _ in range(2)]
    for backbone in backbones:
        backbone.forward = lambda states, own=backbone: nn.Sequential.forward(own, states.float())
        backbone.width = 16
    keys = [model.key for model in models]
    classifier, teacher = (Classifier(b, keys, 3, odds, children=6 if children else 1) for b in backbones)
    store = TrajectoryStore(models, samples=64, composed=composed, children=children)

    def draw():
        return Draw(8, seeded(1), 1, log_odds_range=3.5)

    def guided(draw, teacher):  # the same every time
        return store.trajectories(Draw(6, seeded(2), 1))

    monkeypatch.setattr(store, "_guided", guided)
    whole = losses_and_gradients(store, classifier, teacher, draw)
    counts = []
    made = trajectories.made_again
    monkeypatch.setattr(trajectories, "made_again", lambda *a, **o: counts.append(1) or made(*a, **o))
    monkeypatch.setattr(trajectories, "STEP", 20_000)
    parts = losses_and_gradients(store, classifier, teacher, draw)
    assert len(counts) > 4
    for a, b in zip(whole[:2], parts[:2], strict=True):
        for name in ("terminal", "marginal", "joint"):
            torch.testing.assert_close(b[name], a[name], rtol=1e-5, atol=1e-7)
    for a, b in zip(whole[2], parts[2], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6 * float(a.abs().max()))


def test_a_fit_in_parts_learns_what_the_whole_does(monkeypatch):
    models = arbitrary(ENVIRONMENTS["grid-2d"](), 2)
    options = {"steps": 8, "batch_size": 8, "samples": 50, "network": GridNetwork(2, 6, width=32), "progress": False}
    whole = sculpt.fit(models, 3, **options)
    monkeypatch.setattr(trajectories, "STEP", 60_000)
    parts = sculpt.fit(models, 3, **options)
    for a, b in zip(whole.history, parts.history, strict=True):
        assert all(math.isclose(a[name], b[name], rel_tol=1e-3) for name in a if name != "kept")


# What is kept ----------------------------------------------------------------------------------------------------------------------------


def test_trajectories_are_kept_in_bounded_memory(monkeypatch):
    models = subsets(20, 2)
    monkeypatch.setattr(trajectories, "CACHE_BYTES", 2**18)
    store = TrajectoryStore(models, samples=1000)
    for held_out in (False, True):
        store.trajectories(Draw(16, seeded(), 0, held_out))
    kept = [value.nbytes for _, parts in store.fillings.values() for part in parts for value in vars(part).values()]
    assert 0.6 * 2**18 < sum(kept) < 1.2 * 2**18
    assert 20 < store.samples < 200 and TrajectoryStore(models, samples=20).samples == 20
    # Fewer trajectories are drawn more often: each is used once all the same.
    fillings = []
    for step in range(4 * store.samples // 16):
        store.trajectories(Draw(16, seeded(), step))
        fillings.append(store.fillings[False][0])
    assert len(set(fillings)) in (4, 5)


# What is taken ---------------------------------------------------------------------------------------------------------------------------

STEPS = """
import json, sys
import torch
from test_fit_memory import DiffusionStore, GridNetwork, TrajectoryStore, Classifier, Draw, Plan, exact_model, seeded, subsets
from oracles import GaussianMixture
from sculpt.diffusion.backbones import VectorNetwork

def said(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def taken(store, network, m, n, odds, size):
    plan = store.plan(Plan(m, n, network.width, odds), network, size)
    keys = [str(i) for i in range(m)]
    classifier, teacher = (Classifier(network, keys, n, odds, children=plan.children) for _ in range(2))
    store.refresh(teacher, seeded())
    for step in (1, 1):
        open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
        before = said("VmRSS")
        sum(store.losses(classifier, teacher, Draw(size, seeded(), step)).values()).backward()
    print(json.dumps([plan.step, said("VmHWM") - before]))

for items, m, n, size, options, odds in (
    (30, 4, 4, 32, {"children": True}, False), (30, 2, 2, 48, {"children": False}, True),
    (20, 3, 4, 24, {"composed": True, "children": True}, True),
):
    store = TrajectoryStore(subsets(items, m), samples=48, **options)
    taken(store, GridNetwork(items, 2, encoding="one-hot"), m, n, odds, size)
models = [exact_model(GaussianMixture([[i - 2.0, 0.0]], 0.3), name=str(i)) for i in range(8)]
store = DiffusionStore(models, data=[torch.randn(100, 2) for _ in range(8)], path=True)
taken(store, VectorNetwork(2, width=32), 8, 6, False, 64)
"""


def python(program, *arguments):
    """What a program of its own prints; glibc gives back at once what it frees."""
    tests = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tests), str(tests.parent)])
    run = subprocess.run([sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc, which Linux has")
def test_a_step_takes_what_its_plan_says():
    for told, taken in map(json.loads, python(STEPS).splitlines()):
        assert told / 4 < taken < 1.2 * told


FIT = """
import json, resource, sys, tempfile
import sculpt
from test_fit_memory import subsets
with tempfile.TemporaryDirectory() as folder:
    classifier = sculpt.fit(subsets(99, 8), 4, checkpoint=folder, progress=False, **({"steps": 2} | json.loads(sys.argv[1])))
print(json.dumps([classifier.n_children, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "children"), [({}, 1), ({"children": True}, 100), ({"batch_size": 16, "samples": 300, "steps": 1}, 1)]
)
def test_a_hundred_actions_eight_models_and_four_observations_fit_into_four_gigabytes(options, children):
    found, gigabytes = json.loads(python(FIT, json.dumps(options)))
    assert found == children and gigabytes < 4
