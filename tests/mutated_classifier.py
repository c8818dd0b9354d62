"""Classifiers to spoil (see mutations.py), on every backbone that a file may name."""

from functools import partial

import torch
from checkpoints import tiny_unet
from diffusers import DDPMScheduler
from mutated_gflownet import PRETRAINED, VOCABULARY

import sculpt
from sculpt.actions.networks import GridNetwork
from sculpt.apps.cli.fit import curve
from sculpt.classifier.heads import Classifier
from sculpt.diffusion.backbones import ImageNetwork, VectorNetwork
from sculpt.diffusion.diffusers.encoder import UNetEncoder
from sculpt.diffusion.diffusers.field import NetworkField
from sculpt.diffusion.field import VectorField
from sculpt.molecules.network import FragmentFeatures

SHIPPED = [PRETRAINED / name for name in ("digits/pair", "digits/triple", "grid/circles", "grid/pair", "molecules/seh-sa")]
KEYS = ["a" * 64, "b" * 64, "c" * 64]


def encoder():
    model = sculpt.Diffusion(tiny_unet(), DDPMScheduler(), name="unet")
    return UNetEncoder.of(model, width=8)


NETWORKS = {
    "grid": lambda: GridNetwork(2, 4, width=8, depth=1, encoding="one-hot"),
    "vector": lambda: VectorNetwork(2, 0.1, 0.9, 0.05, width=8, depth=2),
    "image": lambda: ImageNetwork((1, 8, 8), 0.1, 0.7, channels=(8, 16), width=8),
    "encoder": encoder,
    "fragments": lambda: FragmentFeatures(VOCABULARY, slots=3, width=8, depth=1, heads=2),
}


FIELDS = {
    "vector": lambda m, odds: VectorField(m, odds, 2, 0.1, 0.9, 0.05, width=8, depth=2),
    "image": lambda m, odds: NetworkField.of(sculpt.Diffusion(tiny_unet(), DDPMScheduler(), name="unet"), m, odds, 0.7),
}


def write(folder, name, m, n, odds, children=1, field=False):
    torch.manual_seed(0)
    moved = FIELDS[name](m, odds) if field else None
    classifier = Classifier(NETWORKS[name](), KEYS[:m], n, odds, children=children, names=["p", "q", "r"][:m], field=moved)
    rows = [{"step": 10 * i, "terminal": 0.5, "held_out_terminal": 0.6 / i, "held_out_joint": 0.1} for i in (1, 2, 3)]
    classifier.history = [*rows[:2], rows[2] | {"kept": True}]
    classifier.save_pretrained(folder)


FOLDERS = {
    "grid": partial(write, name="grid", m=2, n=2, odds=True),
    "vector": partial(write, name="vector", m=3, n=3, odds=False),
    "image": partial(write, name="image", m=2, n=3, odds=True),
    "encoder": partial(write, name="encoder", m=2, n=2, odds=False),
    "vector with a field": partial(write, name="vector", m=2, n=3, odds=True, field=True),
    "image with a field": partial(write, name="image", m=3, n=2, odds=False, field=True),
    "fragments": partial(write, name="fragments", m=2, n=2, odds=True, children=20),
}


def load(folder):
    return sculpt.load(folder)


def use(classifier):
    assert all(isinstance(name, str) and name.encode() for name in (*classifier.names, *classifier.keys))
    assert len(classifier.names) == len(classifier.keys) == classifier.m and str(classifier)
    assert curve(classifier.history).encode()
    state = _state(classifier.network)
    if state is not None:
        with torch.no_grad():
            classifier.marginal(*state), classifier.terminal(state[0]), classifier.joint(*state)
        classifier.log_h(*state, labels=range(2))
        if classifier.field is not None and min(state[0].shape[1:]) > 1:
            classifier.field(*state, labels=(0, 1))


def _state(network):
    """A state that the network is for, by its own description; ``None`` where that is large."""
    config = network.config
    if isinstance(network, GridNetwork):
        return (torch.zeros(1, config["ndim"], dtype=torch.long),)
    if isinstance(network, FragmentFeatures):
        return (torch.zeros(1, 2 * config["slots"], dtype=torch.long),)
    if isinstance(network, VectorNetwork):
        return torch.zeros(1, config["d"]), torch.ones(())
    shape = config["shape"] if isinstance(network, ImageNetwork) else (config["unet"]["in_channels"], 8, 8)
    return (torch.zeros(1, *shape), torch.ones(())) if max(shape) < 100 else None
