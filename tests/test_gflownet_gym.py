"""Every environment of torchgfn with an estimator that fits it: composed within sampling noise of the exact answer, or refused with the reason."""

import math

import gfn.gym
import pytest
import torch
from gflownet_models import unchecked
from gfn.estimators import ConditionalDiscretePolicyEstimator, DiscretePolicyEstimator, RecurrentDiscretePolicyEstimator
from gfn.gflownet import TBGFlowNet
from gfn.preprocessors import IdentityPreprocessor, KHotPreprocessor
from gfn.samplers import Sampler
from gfn.utils.modules import MLP, RecurrentDiscreteSequenceModel, Tabular, TransformerDiscreteSequenceModel
from torch import nn

import sculpt
from sculpt.actions.networks import StateNetwork
from sculpt.formula import Posterior
from sculpt.gflownet import exact
from sculpt.gflownet.estimators import NetworkPolicy
from sculpt.gflownet.model import GFlowNet

N = 4000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def louder(module, by=3.0):
    """Random networks say about the same everywhere; louder ones differ."""
    for value in module.parameters():
        value.data *= by
    return module


class Numbers(nn.Module):
    """An MLP on the raw state."""

    def __init__(self, env, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(math.prod(env.state_shape), 32), nn.Tanh(), nn.Linear(32, env.n_actions))

    def forward(self, states):
        return 2 * self.layers(states.flatten(1).float())


def raw(env, seed):
    return NetworkPolicy(Numbers(env, seed), env.n_actions)


def khot(env, seed):
    torch.manual_seed(seed)
    pre = KHotPreprocessor(env.height, env.ndim)
    return DiscretePolicyEstimator(louder(MLP(pre.output_dim, env.n_actions, hidden_dim=16)), env.n_actions, pre)


def recurrent(kind):
    def make(env, seed):
        torch.manual_seed(seed)
        if kind == "transformer":
            module = TransformerDiscreteSequenceModel(env.n_actions, 16, 2, 32, 1, 64)
        else:
            module = RecurrentDiscreteSequenceModel(env.n_actions, 16, 16, rnn_type=kind)
        return RecurrentDiscretePolicyEstimator(louder(module, 2.0), env.n_actions)

    return make


# Every state has one parent in these, so any policy has a density.
TREES = {
    "BitSequence": (lambda: gfn.gym.BitSequence(word_size=2, seq_size=8, n_modes=2), [raw, recurrent("lstm"), recurrent("gru"), recurrent("transformer")]),
    "PerfectBinaryTree": (lambda: gfn.gym.PerfectBinaryTree(reward_fn=None, depth=4), [raw]),
    "ChipDesign": (lambda: gfn.gym.ChipDesign(device="cpu"), [raw]),
}  # fmt: skip
# In these several paths meet: flows have to balance.
DAGS = {
    "HyperGrid": (lambda: gfn.gym.HyperGrid(ndim=2, height=5, validate_modes=False), [raw, khot]),
    "SetAddition": (lambda: gfn.gym.SetAddition(n_items=5, max_items=3, reward_fn=None), [raw]),
    "DiscreteEBM": (lambda: gfn.gym.DiscreteEBM(ndim=3), [raw]),
    "NonAutoregressiveBitSequence": (lambda: gfn.gym.NonAutoregressiveBitSequence(word_size=1, seq_size=6, n_modes=2), [raw]),
}  # fmt: skip
TREE_CASES = [(name, i) for name, (_, makers) in TREES.items() for i in range(len(makers))]


def ratio(x, model, target):
    """L1 over that of as many exact draws; of one run this scatters where outcomes are few."""
    floor = [
        exact.l1(
            torch.bincount(torch.multinomial(target, len(x), True, generator=seeded(i)), minlength=len(target)) / len(x), target
        )
        for i in range(10)
    ]
    return exact.l1(exact.histogram(model, x), target) / max(sum(floor) / 10, 1e-9)


def alone(model, p):
    """Of base samples, the mean of a few runs."""
    return sum(ratio(model.sample(N, generator=seeded(k)).x, model, p) for k in range(6)) / 6


def check(p, q, bound=1.3):
    """Base models, and their compositions by tracked densities and rejection."""
    distributions = [exact.terminal_distribution(model) for model in (p, q)]
    assert alone(p, distributions[0]) < bound
    for composition in (p & q, p - q):
        target = exact.target(composition.formula, distributions)
        for road in (sculpt.Tracked(particles=3 * N), sculpt.Rejection()):
            runs = [composition.sample(N, road, generator=seeded(k), progress=False).x for k in range(4)]
            assert sum(ratio(x, p, target) for x in runs) / 4 < bound, (composition, road)


@pytest.mark.parametrize(
    ("name", "which"), [pytest.param(*case, marks=[pytest.mark.slow] * (case == ("BitSequence", 3))) for case in TREE_CASES]
)
def test_any_estimator_composes_where_states_have_one_parent(name, which):
    env = TREES[name][0]()
    p, q = (GFlowNet(env, TREES[name][1][which](env, seed), name=f"p{seed}") for seed in (1, 2))
    check(p, q)


@pytest.mark.parametrize("name", DAGS)
def test_balanced_flows_compose_where_paths_meet_and_any_policy_is_sampled_as_it_is(name):
    env = DAGS[name][0]()
    graph = exact.dag(env)
    rewards = [1.5 * torch.randn(len(graph.states), generator=seeded(k), dtype=torch.float64) for k in range(2)]
    check(*(exact.solve(env, R, name=f"p{k}") for k, R in enumerate(rewards)))
    for make in DAGS[name][1]:
        model = GFlowNet(env, make(env, 3), name="p")
        assert alone(model, exact.terminal_distribution(model)) < 1.3


def test_a_conditional_estimator_is_one_base_model_for_each_condition():
    env = gfn.gym.ConditionalHyperGrid(ndim=2, height=4, validate_modes=False)
    torch.manual_seed(0)
    parts = (Tabular(16, 8), MLP(1, 8, hidden_dim=8), louder(MLP(16, env.n_actions, hidden_dim=16), 2.0))
    from gfn.preprocessors import EnumPreprocessor

    policy = ConditionalDiscretePolicyEstimator(
        *parts, env.n_actions, preprocessor=EnumPreprocessor(lambda s: s.tensor[..., 0] * 4 + s.tensor[..., 1])
    )
    p, q = (GFlowNet(env, policy, condition={"c": c}, name=f"c={c}") for c in (0.0, 2.0))
    a, b = (exact.terminal_distribution(model) for model in (p, q))
    assert exact.l1(a, b) > 0.05 and p.key != q.key
    assert alone(q, b) < 1.3


@pytest.mark.parametrize("kind", ["lstm", "gru", "transformer"])
def test_a_recurrent_policy_is_what_torchgfns_sampler_samples(kind):
    env = TREES["BitSequence"][0]()
    policy = recurrent(kind)(env, 1)
    model = GFlowNet(env, policy, name="p")
    p = exact.terminal_distribution(model)
    torch.manual_seed(0)
    theirs = Sampler(policy).sample_trajectories(env, n=N).terminating_states.tensor
    assert ratio(theirs, model, p) < 1.3
    chain, states = model.chain(sculpt.chain.Settings()), model.start(32)
    state, _ = chain.start(32, None)
    for t in range(3):  # what is carried along says what going the whole way again says
        reading = sculpt.actions.reading.read([model], state.states, state.memory)
        assert torch.allclose(reading.log_p[0][reading.rows], model.log_pf(state.states), atol=1e-5)
        state, _ = chain.step(state, torch.zeros(len(state)), seeded(t))
    assert len(states) == 32


def test_a_recurrent_policy_is_refused_where_several_ways_lead_to_a_state():
    env = DAGS["SetAddition"][0]()
    with pytest.raises(ValueError, match="several ways lead to one: what it says is no function of the state"):
        GFlowNet(env, recurrent("gru")(env, 0))


@pytest.mark.parametrize("name", ["SetAddition", "ChipDesign", "PerfectBinaryTree"])
def test_a_classifier_of_any_vector_has_a_default_backbone_that_is_saved(name, tmp_path):
    env = (TREES | DAGS)[name][0]()
    R = [1.5 * torch.randn(len(exact.dag(env).states), generator=seeded(k), dtype=torch.float64) for k in range(2)]
    p, q = (exact.solve(env, own, name=f"p{k}") for k, own in enumerate(R))
    classifier = sculpt.fit([p, q], steps=100, samples=1000, batch_size=32, progress=False)
    assert isinstance(classifier.network, StateNetwork)
    target = exact.target(Posterior(2, (0, 1)), [exact.terminal_distribution(model) for model in (p, q)])
    road = sculpt.Guided(classifier, correct="densities", particles=4 * N)
    runs = [(p & q).sample(N, road, generator=seeded(k), progress=False).x for k in range(4)]
    assert sum(ratio(x, p, target) for x in runs) / 4 < 1.3
    classifier.save_pretrained(tmp_path)
    again = sculpt.load(tmp_path)
    states = exact.dag(env).states
    assert torch.equal(again.terminal(states), classifier.terminal(states))


def test_a_backbone_reads_real_numbers_too():
    network = StateNetwork(2, -1.5, 2.0, whole=False, width=16)
    assert network(torch.randn(5, 2)).shape == (5, 16) and not network.one_hot
    with pytest.raises(ValueError, match="reads states of 2 numbers, got 3"):
        network(torch.randn(5, 3))


def evaluator(states):
    return torch.ones(len(states))


REFUSED = {
    "GraphBuilding": (lambda: gfn.gym.GraphBuilding(2, 1, evaluator, max_nodes=3), "is discrete, but its states are graphs"),
    "GraphBuildingOnEdges": (lambda: gfn.gym.GraphBuildingOnEdges(3, evaluator, True, 'cpu'), "is discrete, but its states are graphs"),
    "Box": (lambda: gfn.gym.Box(), "continuous actions: a composed policy weighs all children"),
    "BoxCartesian": (lambda: gfn.gym.BoxCartesian(), "continuous actions"),
    "BoxPolar": (lambda: gfn.gym.BoxPolar(), "continuous actions"),
    "Line": (lambda: gfn.gym.Line(mus=[0.0], sigmas=[1.0], init_value=0.0), "continuous actions"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_compose_is_refused_with_the_reason(name):
    env, words = REFUSED[name]
    with pytest.raises(TypeError, match=words):
        unchecked(GFlowNet, env(), None)


def test_an_environment_whose_own_step_fails_is_refused_when_it_is_wrapped():
    env = gfn.gym.BitSequencePlus(word_size=1, seq_size=8, n_modes=2)
    with pytest.raises(ValueError, match="BitSequencePlus cannot walk from its own initial state: RuntimeError: Boolean value"):
        GFlowNet(env, raw(env, 0))


def test_no_environment_of_torchgfn_is_left_out():
    assert set(gfn.gym.__all__) == {*TREES, *DAGS, *REFUSED, "ConditionalHyperGrid", "BitSequencePlus"}


def test_what_is_no_estimator_is_named_with_what_to_pass():
    env = DAGS["HyperGrid"][0]()
    estimator = khot(env, 0)
    loss = TBGFlowNet(pf=estimator, pb=DiscretePolicyEstimator.uniform(env.n_actions, IdentityPreprocessor(output_dim=None)))
    for policy, words in (
        (loss, r"got a TBGFlowNet. Its estimator is .pf: pass that"),
        (nn.Linear(2, 3), "got a Linear. Wrap a network of raw states"),
        (lambda states: states, "got a function. Wrap a network"),
        (DiscretePolicyEstimator, "got the class DiscretePolicyEstimator"),
        (None, "got None"),
    ):
        with pytest.raises(TypeError, match=words):
            unchecked(GFlowNet, env, policy)
    with pytest.raises(TypeError, match=r"backward is an estimator of torchgfn .* got a TBGFlowNet. Its estimator is .pb"):
        unchecked(GFlowNet, env, estimator, loss)
    with pytest.raises(TypeError, match="composes discrete environments .* got a Linear"):
        unchecked(GFlowNet, nn.Linear(1, 1), estimator)
