"""GFlowNets to spoil (see mutations.py): grids by every encoding, torchgfn's other environments' policies by tables, and fragment trees."""

from functools import partial
from pathlib import Path

import torch
from gflownet_models import ENVIRONMENTS
from gfn.gym import HyperGrid

import sculpt
from sculpt.actions.networks import GridNetwork
from sculpt.gflownet.estimators import NetworkPolicy
from sculpt.gflownet.model import GFlowNet
from sculpt.molecules.network import FragmentNetwork
from sculpt.molecules.trees import FragmentTrees

PRETRAINED = Path(sculpt.__file__).parents[1] / "pretrained"
SHIPPED = [*(PRETRAINED / "grid" / name for name in ("circle1", "diag_sigmoid")), PRETRAINED / "molecules" / "sa"]
VOCABULARY = [["C", [0, 0]], ["CC", [0, 1]], ["CN", [0, 1]], ["c1ccccc1", [0, 3]], ["C=O", [0]]]


def grid(folder, encoding, with_backward=False):
    torch.manual_seed(0)
    env = HyperGrid(ndim=2, height=4, validate_modes=False)
    make = partial(GridNetwork, 2, 4, width=8, encoding=encoding)
    backward = NetworkPolicy(make(2), 3, is_backward=True) if with_backward else None
    GFlowNet(env, NetworkPolicy(make(3), 3), backward, name="mine").save_pretrained(folder)


def gym(folder, name):
    """The network does not care what the numbers of a state mean."""
    torch.manual_seed(0)
    env = ENVIRONMENTS[name]()
    network = GridNetwork(env.state_shape[0], 3, env.n_actions, width=4, depth=1)
    GFlowNet(env, NetworkPolicy(network, env.n_actions)).save_pretrained(folder)


def trees(folder):
    torch.manual_seed(0)
    env = FragmentTrees(VOCABULARY, slots=3)
    network = FragmentNetwork(VOCABULARY, slots=3, width=8, depth=1, heads=2)
    GFlowNet(env, NetworkPolicy(network, env.n_actions), condition={"beta": 1.0}, name="trees").save_pretrained(folder)


FOLDERS = {
    "one-hot": partial(grid, encoding="one-hot"),
    "both": partial(grid, encoding="thermometer", with_backward=True),
    "table": partial(grid, encoding="table"),
    **{name: partial(gym, name=name) for name in ("grid-3d", "bits", "sets", "tree", "ebm")},
    "trees": trees,
}


def load(folder):
    try:
        return sculpt.load(folder)
    except ValueError as error:
        if "conditional on ['beta'], got values for nothing" not in str(error):
            raise
        return sculpt.load(folder, beta=1.0)


def use(model):
    assert isinstance(model.name, str) and model.name.encode() and str(model) and repr(model) and len(model.key) == 64
    assert len(model.sample(3, generator=torch.Generator().manual_seed(0))) == 3
    str(model & GFlowNet(model.env, model.policy, condition=model.condition, key="another", name="b"))
