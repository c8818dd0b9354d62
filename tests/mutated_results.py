"""Files of results to spoil (see mutations.py): of points with and without weights, of several runs, of images, of molecules, of nothing."""

import copy
import math

import torch

import sculpt.diffusion.diffusers.encoder  # noqa: F401, a file may name a class of it, and what is imported is not counted
from sculpt.diagnostics import Diagnostics
from sculpt.molecules import Molecules
from sculpt.samples import Samples, pixels

SHIPPED = []
SMILES = ["CCO", "c1ccccc1", "CC(=O)O", "C", "CCO"]


def run(seed, n=5, particles=8, **said):
    ess = {"ess": [8.0, 5.25, float(particles)], "families": 4.5, "ancestors": 6, "log_z": -0.25, "log_z_error": 0.125}
    return Diagnostics("tracked densities", "p & q", steps=3, particles=particles, seed=seed, **(ess | said))


def points(seed=0, weighted=True):
    generator = torch.Generator().manual_seed(seed)
    log_w = torch.log_softmax(torch.randn(5, generator=generator), 0) if weighted else None
    return Samples(torch.randn(5, 2, generator=generator), log_w, run(seed, notes=["a note", "and another one"]))


def images():
    said = Diagnostics("rejection", "p ⊗ q", log_z=-math.inf, acceptance=0.5, referee="the terminal head", seed=2**64 - 1)
    return Samples(torch.rand(4, 1, 4, 4, dtype=torch.float16), None, said, decoder=pixels)


def molecules():
    made = Molecules(torch.arange(15).reshape(5, 3), torch.zeros(5), run(3, doubt="many dimensions."))
    made._keep({"smiles": SMILES})
    return made


MAKERS = {
    "weighted": points,
    "joined": lambda: Samples.cat([points(0), points(1), Samples.cat([points(2, False), points(3)])]),
    "images": images,
    "latents": lambda: Samples(torch.zeros(3, 2, 2, 2, dtype=torch.bfloat16), decoder=lambda x: x),
    "grid": lambda: Samples(torch.zeros(4, 2, dtype=torch.long), None, Diagnostics("exact", "a | b")),
    "nothing": lambda: points()[:0],
    "molecules": molecules,
}
FOLDERS = {name: lambda folder, make=make: make().save(folder / "kept.safetensors") for name, make in MAKERS.items()}


def load(folder):
    return Samples.load(folder / "kept.safetensors")


def use(samples):
    assert repr(samples) and str(samples.diagnostics) and str(samples.verdict)
    n = len(samples)
    assert len(Samples.cat([samples, samples[: n // 2]])) == n + n // 2 and len(copy.deepcopy(samples)) == n
    if samples.x.numel() < 1000:
        samples.rows()
        if len(repr(samples)) % 8 == 0:  # a picture takes longer than all the rest
            assert "<" in samples._repr_html_()
