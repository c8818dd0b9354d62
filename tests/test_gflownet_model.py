"""The adapter: what it asks of environments and estimators, and its checkpoints."""

import json
import multiprocessing

import pytest
import torch
from gflownet_models import ENVIRONMENTS, Stairs, arbitrary, network_policy, uniform_backward
from gfn.estimators import ConditionalDiscretePolicyEstimator, DiscretePolicyEstimator
from gfn.gym import HyperGrid
from gfn.preprocessors import IdentityPreprocessor, KHotPreprocessor
from gfn.utils.modules import MLP
from torch import nn

import sculpt
from sculpt.actions.networks import GridNetwork
from sculpt.gflownet import exact
from sculpt.gflownet.environments import describe, fingerprint
from sculpt.gflownet.estimators import LogProbPolicy, NetworkPolicy
from sculpt.gflownet.model import GFlowNet


def grid(height=6, ndim=2):
    return HyperGrid(ndim=ndim, height=height, validate_modes=False)


def torchgfn_policy(env, seed=0, is_backward=False):
    torch.manual_seed(seed)
    preprocessor = KHotPreprocessor(env.height, env.ndim)
    module = MLP(preprocessor.output_dim, env.n_actions - is_backward, hidden_dim=16)
    preprocessor.target_dtype = torch.get_default_dtype()
    return DiscretePolicyEstimator(module, env.n_actions, preprocessor=preprocessor, is_backward=is_backward)


# The chain


def test_log_probabilities_are_those_of_torchgfn():
    env = grid()
    states = env.states_from_tensor(exact.dag(env).states)
    forward, backward = torchgfn_policy(env), torchgfn_policy(env, 1, is_backward=True)
    model = GFlowNet(env, forward, backward)
    for log_p, estimator in ((model.log_pf(states.tensor), forward), (model.log_pb(states.tensor)[1:], backward)):
        own = states if estimator is forward else states[1:]
        theirs = estimator.to_probability_distribution(own, estimator(own)).probs
        torch.testing.assert_close(log_p.exp(), theirs.double(), atol=1e-6, rtol=0)
    assert (model.log_pb(states.tensor)[0] == -torch.inf).all()  # nothing leads to the initial state


def test_without_a_backward_estimator_the_parents_are_equally_likely():
    env = grid()
    model = GFlowNet(env, torchgfn_policy(env))
    uniform = GFlowNet(env, torchgfn_policy(env), uniform_backward(env))
    states = torch.tensor([[0, 0], [0, 3], [2, 2]])
    expected = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(model.log_pb(states).exp(), expected)
    assert model.backward_key == uniform.backward_key and model.key == uniform.key


def test_what_a_network_says_about_masked_actions_does_not_matter():
    class Careless(nn.Module):
        def forward(self, states):
            out = torch.zeros(len(states), 3)
            out[:, :2][states == 5] = torch.nan
            return out

    model = GFlowNet(grid(), NetworkPolicy(Careless(), 3))
    torch.testing.assert_close(model.log_pf(torch.tensor([[5, 2]])).exp(), torch.tensor([[0.0, 0.5, 0.5]], dtype=torch.float64))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_numbers_are_named_with_their_model_and_state(bad):
    class Broken(nn.Module):
        def forward(self, states):
            return torch.zeros(len(states), 3).masked_fill((states[:, :1] == 2), bad)

    model = GFlowNet(grid(), NetworkPolicy(Broken(), 3), name="broken")
    with pytest.raises(ValueError, match=r"broken: no distribution over actions in state \[2, .*logits are not numbers"):
        model.sample(200, generator=torch.Generator().manual_seed(0))


def test_a_state_without_actions_is_named():
    class DeadEnd(Stairs):
        def make_states_class(self):
            parent = super().make_states_class()

            class States(parent):
                def _compute_forward_masks(self):
                    return super()._compute_forward_masks() & (self.tensor != 6)

            return States

    model = GFlowNet(DeadEnd(), NetworkPolicy(GridNetwork(1, 9, 4, width=4), 4), name="climber")
    with pytest.raises(
        ValueError, match=r"climber: no distribution over actions in state \[6\]: the environment allows no action"
    ):
        model.sample(200, generator=torch.Generator().manual_seed(0))


def test_dropout_is_off_while_sampling_and_stays_as_it_was():
    env = grid()
    policy = NetworkPolicy(nn.Sequential(GridNetwork(2, 6, 3, width=8), nn.Dropout(0.5)), 3)
    model = GFlowNet(env, policy)
    states = exact.dag(env).states
    assert torch.equal(model.log_pf(states), model.log_pf(states)) and policy.training and policy.module[1].training


def test_estimators_of_the_wrong_side_are_refused():
    env = grid()
    with pytest.raises(
        ValueError,
        match="policy has to be a forward estimator over the 3 actions of HyperGrid, got a backward estimator over 2",
    ):
        GFlowNet(env, torchgfn_policy(env, is_backward=True))
    with pytest.raises(ValueError, match="backward has to be a backward estimator over the 2 actions"):
        GFlowNet(env, torchgfn_policy(env), torchgfn_policy(env))
    with pytest.raises(TypeError, match="discrete environments|Type-check error"):
        GFlowNet("grid", torchgfn_policy(env))


# Which models compose


def test_models_of_different_environments_are_refused_with_both_sides_named():
    p, q = (GFlowNet(env, torchgfn_policy(env), name=name) for name, env in (("small", grid(6)), ("large", grid(8))))
    with pytest.raises(
        ValueError, match=r"small and large.*HyperGrid\(ndim=2, height=6\) on one side, HyperGrid\(ndim=2, height=8\) on"
    ):
        p & q
    stairs = arbitrary(Stairs(), 1)[0]
    with pytest.raises(ValueError, match=r"HyperGrid\(ndim=2, height=6\) on one side, Stairs\(\) on the other"):
        p & stairs


def test_another_order_of_actions_or_another_mask_is_noticed():
    class Reordered(Stairs):
        def step(self, states, actions):
            return self.States(states.tensor + 3 - actions.tensor)

        def make_states_class(self):
            parent = super().make_states_class()

            class States(parent):
                def _compute_forward_masks(self):
                    mask = super()._compute_forward_masks()
                    return mask[..., [2, 1, 0, 3]]

                def _compute_backward_masks(self):
                    return super()._compute_backward_masks()[..., [2, 1, 0]]

            return States

    class Eager(Stairs):
        def make_states_class(self):
            parent = super().make_states_class()

            class States(parent):
                def _compute_forward_masks(self):
                    mask = super()._compute_forward_masks()
                    mask[..., 3] = self.tensor[..., 0] >= 2
                    return mask

            return States

    Reordered.__qualname__ = Eager.__qualname__ = Stairs.__qualname__
    Reordered.__module__ = Eager.__module__ = Stairs.__module__
    p = arbitrary(Stairs(), 1)[0]
    for other in (Reordered(), Eager()):
        with pytest.raises(ValueError, match="rules .masks, order of the actions, or initial state"):
            p & arbitrary(other, 1)[0]


def test_a_reward_is_no_part_of_the_rules():
    class Rewarded(HyperGrid):
        def reward(self, states):
            return states.tensor.sum(-1).float()

    p, q = (GFlowNet(env, torchgfn_policy(env, i)) for i, env in enumerate((grid(), Rewarded(2, 6, validate_modes=False))))
    assert str(p & q)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_equal_environments_have_equal_fingerprints_and_no_others(name):
    prints = {other: fingerprint(make()) for other, make in ENVIRONMENTS.items()}
    assert fingerprint(ENVIRONMENTS[name]()) == prints[name] and len(set(prints.values())) == len(prints)


def test_the_key_follows_weights_backward_policy_and_condition():
    env = grid()
    policy = torchgfn_policy(env)
    key = GFlowNet(env, policy).key
    assert key == GFlowNet(grid(), torchgfn_policy(env)).key
    assert key != GFlowNet(env, policy, torchgfn_policy(env, is_backward=True)).key
    assert key != GFlowNet(grid(8), torchgfn_policy(grid(8))).key
    assert GFlowNet(env, policy, key="mine").key == "mine"
    with torch.no_grad():
        next(policy.parameters()).add_(1.0)
    assert key != GFlowNet(env, policy).key


def test_the_key_follows_the_environments_rules_and_arguments():
    class Eager(Stairs):
        known_as = "gflownet_models:Stairs"

        def make_states_class(self):
            class States(super().make_states_class()):
                def _compute_forward_masks(self):
                    return super()._compute_forward_masks() | (self.tensor == 2) & (torch.arange(4) == 3)

            return States

    class Named(Stairs):
        known_as, arguments = "gflownet_models:Stairs", {"name": "other"}

    class Moved(Stairs):
        known_as = "gflownet_models:Stairs"

    network = NetworkPolicy(GridNetwork(1, 9, 4, width=4), 4)
    key, eager, named, moved = (GFlowNet(env(), network).key for env in (Stairs, Eager, Named, Moved))
    assert len({key, eager, named}) == 3 and key == moved


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_step_leaves_the_states_that_it_was_given(name):
    (model,) = arbitrary(ENVIRONMENTS[name](), 1)
    graph = exact.dag(model)
    states, before = graph.states[graph.source].clone(), graph.states[graph.source]
    after = model.step(states, graph.action)
    assert torch.equal(states, before) and torch.equal(graph.index(after), graph.target)


# Checkpoints


class ConditionalGrid(nn.Module):
    """Logits that depend on an exponent beta."""

    def __init__(self, height=6):
        super().__init__()
        self.base = GridNetwork(2, height, 3, width=8)
        self.beta = nn.Linear(1, 3)

    def forward(self, states, conditions):
        return self.base(states) + self.beta(conditions)


@pytest.mark.parametrize("encoding", ["one-hot", "thermometer", "table"])
@pytest.mark.parametrize("with_backward", [False, True])
def test_what_is_saved_comes_back(tmp_path, encoding, with_backward):
    env = grid()
    backward = network_policy(env, 1, is_backward=True) if with_backward else None
    model = GFlowNet(env, network_policy(env, encoding=encoding), backward, name="mine")
    model.save_pretrained(tmp_path / "mine")
    again = sculpt.load(tmp_path / "mine")
    states = exact.dag(env).states
    assert torch.equal(again.log_pf(states), model.log_pf(states)) and torch.equal(again.log_pb(states), model.log_pb(states))
    assert (again.key, again.name, str(again.device)) == (model.key, "mine", "cpu")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["config.json", "model.safetensors"]
    assert not any(p.requires_grad for p in again.policy.parameters()) and not again.policy.training
    model.save_pretrained(tmp_path / "mine")  # over itself


@pytest.mark.parametrize("name", [name for name in ENVIRONMENTS if name != "stairs"])
def test_torchgfns_environments_are_rebuilt_by_name(tmp_path, name):
    env = ENVIRONMENTS[name]()
    width = env.state_shape[0]

    class Flat(nn.Linear):
        def forward(self, states):
            return super().forward(states.float())

    model = GFlowNet(env, NetworkPolicy(Flat(width, env.n_actions), env.n_actions))
    model.save_pretrained(tmp_path)
    again = GFlowNet.from_pretrained(tmp_path, policy=NetworkPolicy(Flat(width, env.n_actions), env.n_actions))
    assert again.rules == model.rules and describe(again.env) == describe(env) and again.key == model.key


def test_an_estimator_of_ones_own_is_read_into_what_is_passed(tmp_path):
    env = grid()
    model = GFlowNet(env, torchgfn_policy(env, 3), torchgfn_policy(env, 4, is_backward=True))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights of an estimator of your own.*pass policy=estimator"):
        sculpt.load(tmp_path)
    again = GFlowNet.from_pretrained(tmp_path, policy=torchgfn_policy(env), backward=torchgfn_policy(env, is_backward=True))
    assert again.key == model.key
    with pytest.raises(ValueError, match="do not fit the policy network"):
        GFlowNet.from_pretrained(tmp_path, policy=torchgfn_policy(grid(7)), backward=torchgfn_policy(env, is_backward=True))


def test_an_environment_of_ones_own_is_passed(tmp_path):
    model = GFlowNet(Stairs(), NetworkPolicy(GridNetwork(1, 9, 4, width=8), 4))
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="gflownet_models:Stairs is not a DiscreteEnv of gfn.gym or sculpt. Pass your own with env="
    ):
        sculpt.load(tmp_path)
    assert GFlowNet.from_pretrained(tmp_path, env=Stairs()).key == model.key


def test_a_nameless_environment_cannot_be_saved_but_composes(tmp_path):
    class Nameless(Stairs):
        arguments = None

    p, q = arbitrary(Nameless(), 2)
    assert len((p & q).sample(5, generator=torch.Generator().manual_seed(0))) == 5
    model = GFlowNet(Nameless(), NetworkPolicy(GridNetwork(1, 9, 4, width=8), 4))
    with pytest.raises(ValueError, match="Nameless cannot be written by name.*property `arguments`"):
        model.save_pretrained(tmp_path)


def test_a_condition_is_fixed_at_load_and_part_of_the_key(tmp_path):
    env = grid()
    policy = NetworkPolicy(ConditionalGrid(), 3)
    GFlowNet(env, policy, condition={"beta": 8.0}, name="seh").save_pretrained(tmp_path)
    low, high = (GFlowNet.from_pretrained(tmp_path, policy=NetworkPolicy(ConditionalGrid(), 3), beta=beta) for beta in (8, 32))
    assert low.key == GFlowNet(env, policy, condition={"beta": 8.0}).key != high.key
    assert (low.name, high.name) == ("seh[beta=8]", "seh[beta=32]")
    assert not torch.equal(low.log_pf(env.s0[None]), high.log_pf(env.s0[None]))
    with pytest.raises(ValueError, match=r"conditional on \['beta'\], got values for nothing. Call load\(.*, beta=…\)"):
        sculpt.load(tmp_path)
    with pytest.raises(ValueError, match=r"conditional on \['beta'\], got values for \['alpha', 'beta'\]"):
        sculpt.load(tmp_path, alpha=1, beta=2)


def test_torchgfns_conditional_estimators_are_conditioned():
    env = grid()
    state, condition, final = nn.Linear(2, 4), nn.Linear(1, 4), nn.Linear(8, 3)
    preprocessor = IdentityPreprocessor(output_dim=2, target_dtype=torch.float32)
    policy = ConditionalDiscretePolicyEstimator(state, condition, final, 3, preprocessor)
    low, high = (GFlowNet(env, policy, condition={"beta": beta}) for beta in (1.0, 5.0))
    assert not torch.equal(low.log_pf(env.s0[None]), high.log_pf(env.s0[None])) and low.key != high.key


@pytest.fixture
def folder(tmp_path):
    env = grid()
    GFlowNet(env, network_policy(env), name="mine").save_pretrained(tmp_path)
    return tmp_path


def change(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    config.update(values)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_truncated_checkpoint_is_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated"):
        GFlowNet.from_pretrained(folder)
    (folder / "config.json").write_text('{"kind": "gfl')
    with pytest.raises(ValueError, match="not readable JSON"):
        GFlowNet.from_pretrained(folder)


def test_another_kind_of_checkpoint_is_refused(folder):
    change(folder, kind="classifier")
    with pytest.raises(ValueError, match="holds a classifier, expected a gflownet"):
        GFlowNet.from_pretrained(folder)


def test_a_checkpoint_of_another_version_of_its_environment_is_refused_naming_both(folder):
    environment = json.loads((folder / "config.json").read_text())["environment"]
    change(folder, environment=environment | {"rules": "0123456789abcdef", "torchgfn": "1.0"})
    with pytest.raises(
        ValueError,
        match=r"made for gfn.gym:HyperGrid .*rules 0123456789abcdef, torchgfn 1.0.; here HyperGrid\(ndim=2, height=6\) has other",
    ):
        sculpt.load(folder)


@pytest.mark.parametrize("path", ["os:system", "gfn.gym:Nothing", "sculpt.hub:load", "gfn.gym:Box", "builtins:eval"])
def test_a_config_cannot_name_code_to_run(folder, path):
    environment = json.loads((folder / "config.json").read_text())["environment"]
    change(folder, environment=environment | {"name": path, "arguments": {"command": "touch /tmp/owned"}})
    with pytest.raises(ValueError, match="Pass your own with env=|version that made the checkpoint, or pass env="):
        sculpt.load(folder)
    change(folder, environment=environment, policy={"class": path, "arguments": {}})
    with pytest.raises(ValueError, match="policy="):
        sculpt.load(folder)


def test_loading_leaves_the_start_method_of_processes_alone(folder):
    before = multiprocessing.get_start_method(allow_none=True)
    sculpt.load(folder)
    assert multiprocessing.get_start_method(allow_none=True) == before


def test_a_policy_that_is_computed_is_not_saved_as_a_network(tmp_path):
    (p,) = arbitrary(grid(), 1)
    with pytest.raises(ValueError, match="p0 is computed, it has no network to save"):
        p.save_pretrained(tmp_path)
    assert issubclass(exact.TablePolicy, LogProbPolicy)
