"""Small environments and base models for the tests, with everything known about them."""

import inspect
import math

import torch
from gfn.env import DiscreteEnv
from gfn.estimators import DiscretePolicyEstimator
from gfn.gym import BitSequence, DiscreteEBM, HyperGrid, PerfectBinaryTree, SetAddition
from gfn.preprocessors import IdentityPreprocessor
from gfn.states import DiscreteStates

from sculpt.actions.networks import GridNetwork
from sculpt.chain import Selection, Settings, run
from sculpt.gflownet import exact
from sculpt.gflownet.estimators import NetworkPolicy
from sculpt.gflownet.model import GFlowNet
from sculpt.progress import watch


class Stairs(DiscreteEnv):
    """A custom environment by its rules only: climb 8 stairs one, two or three at a time, and stop from the third on.

    Paths of different lengths meet, and it cannot walk backwards.
    """

    arguments = {}

    def __init__(self, device="cpu"):
        super().__init__(4, torch.zeros(1, dtype=torch.long, device=device), (1,), sf=torch.full((1,), -1))

    def make_states_class(self):
        env = self

        class States(DiscreteStates):
            state_shape, s0, sf, n_actions = (1,), env.s0, env.sf, 4
            make_random_states = env.make_random_states

            def _compute_forward_masks(self):
                steps = torch.arange(1, 4, device=self.tensor.device)
                return torch.cat([self.tensor + steps <= 8, self.tensor >= 3], dim=-1)

            def _compute_backward_masks(self):
                return self.tensor >= torch.arange(1, 4, device=self.tensor.device)

        return States

    def step(self, states, actions):
        return self.States(states.tensor + actions.tensor + 1)

    def backward_step(self, states, actions):
        raise NotImplementedError


ENVIRONMENTS = {
    "grid-2d": lambda: HyperGrid(ndim=2, height=6, validate_modes=False),
    "grid-3d": lambda: HyperGrid(ndim=3, height=5, validate_modes=False),
    "bits": lambda: BitSequence(word_size=2, seq_size=8, n_modes=2),
    "sets": lambda: SetAddition(n_items=5, max_items=3, reward_fn=None),
    "sets-of-3": lambda: SetAddition(n_items=5, max_items=3, reward_fn=None, fixed_length=True),
    "tree": lambda: PerfectBinaryTree(reward_fn=None, depth=4),
    "ebm": lambda: DiscreteEBM(ndim=4),
    "stairs": Stairs,
}


def perfect(env, m, seed=0, backwards=None):
    """m base models with random rewards and exact flows."""
    generator = torch.Generator().manual_seed(seed)
    size = len(exact.dag(env).states)
    rewards = [1.5 * torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(m)]
    return [exact.solve(env, R, (backwards or [None] * m)[i], name=f"p{i}") for i, R in enumerate(rewards)]


def arbitrary(env, m, seed=0):
    """m base models with random policies: their flows balance for no common backward policy."""
    generator = torch.Generator().manual_seed(seed)
    graph = exact.dag(env)
    models = []
    for i in range(m):
        logits = torch.randn(graph.allowed.shape, generator=generator, dtype=torch.float64)
        log_P = torch.log_softmax(logits.masked_fill(~graph.allowed, -math.inf), dim=-1)
        models.append(GFlowNet(env, exact.TablePolicy(graph, log_P), name=f"p{i}"))
    return models


def network_policy(env, seed=0, is_backward=False, encoding="one-hot", scale=1.0):
    """A grid network with random weights."""
    torch.manual_seed(seed)
    outputs = env.n_actions - is_backward
    network = GridNetwork(env.ndim, env.height, outputs, width=16, encoding=encoding)
    for weight in list(network.parameters())[-2:]:
        torch.nn.init.normal_(weight, std=scale if weight.ndim == 1 else scale / 4)
    return NetworkPolicy(network, env.n_actions, is_backward=is_backward)


def uniform_backward(env):
    """torchgfn's own uniform backward policy."""
    return DiscretePolicyEstimator.uniform(env.n_actions, IdentityPreprocessor(output_dim=None))


def furthest(S, n, delta=1e-6):
    """How far in L1 the histogram of n exact draws over S outcomes is, except with probability delta (Weissman et al. 2003)."""
    return math.sqrt(2 * (S * math.log(2) + math.log(1 / delta)) / n)


def guide(posterior, models, classifier, form="anchored"):
    """A posterior with its classifier; the models are in the classifier's order."""
    return models[posterior.labels[0]].guided(posterior, models, classifier, form)


def correct(guided, n, by="head", *, batch_size=None, generator=None, **selection):
    """n samples of a guided composition, corrected by the terminal ``"head"`` or by the models' ``"densities"``."""
    return drawn(guided, guided.corrected(Settings(batch_size=batch_size), by == "densities"), n, generator, selection)


def track(formula, models, n, *, batch_size=None, generator=None, **selection):
    """n samples of any formula of these models' densities."""
    return drawn(models[0], models[0].tracked(formula, models, Settings(batch_size=batch_size)), n, generator, selection)


def drawn(model, chain, n, generator, selection):
    return watch(run(chain, n, str(model), Settings(generator=generator), model.result, Selection(**selection)), show=False)


def unchecked(cls, *arguments, **options):
    """An object as users make it, whom no type checker stops."""
    return inspect.unwrap(cls.__init__)(object.__new__(cls), *arguments, **options)
