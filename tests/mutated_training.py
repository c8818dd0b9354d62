"""States of trainings to spoil (see mutations.py): of a classifier, with the samples that it has drawn, and of a loop with more to keep."""

from functools import partial

import torch
from diffusers_models import exact_model, three_rings
from torch import nn

import sculpt
from sculpt.diffusion.backbones import VectorNetwork
from sculpt.training import Training, cosine, read_state

SHIPPED = []
P, Q = (exact_model(mixture, name=name) for mixture, name in zip(three_rings()[:2], "pq", strict=True))
STEPS = 6
OPTIMIZERS = {"momentum_buffer": torch.optim.SGD, "exp_avg": torch.optim.AdamW}


class Seen:
    """What is no module and grows: the number of each step so far."""

    def __init__(self):
        self.steps = []

    def state_dict(self):
        return {"steps": torch.tensor(self.steps)}

    def load_state_dict(self, state):
        self.steps = [int(step) for step in state["steps"]]


class Loop:
    """A small network with running means, a number beside it, and samples that it replays."""

    def __init__(self, folder, optimizer=torch.optim.AdamW):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.SiLU(), nn.Linear(4, 1))
        self.shift, self.buffer, self.seen = nn.ParameterList([torch.zeros(())]), nn.BatchNorm1d(3, affine=False), Seen()
        groups = [{"params": network.parameters(), "lr": 1e-2}, {"params": self.shift.parameters(), "lr": 0.1}]
        options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
        identity = {"name": "loop", "steps": STEPS, "sizes": [3, 4], "more": {"rate": 1e-2}}
        self.training = Training(
            network, optimizer(groups, lr=0.1, **options), folder, identity=identity, rate=cosine(STEPS, 3)
        )
        self.training.resume(shift=self.shift, buffer=self.buffer, seen=self.seen)

    def loss(self, seed):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
        self.seen.steps.append(self.training.step)
        value = (self.training.network(self.buffer(x))[:, 0] + self.shift[0] - x.sum(-1)).square().mean()
        return value, {"mean": value.detach()}

    def run(self, steps=STEPS):
        for row in self.training.run(self.loss, steps):
            self.training.curve.append({"step": self.training.step, "loss": row["loss"], "kept": True})


def loop(folder, optimizer):
    made = Loop(folder, optimizer)
    made.run(2)
    made.training.save()


def fitted(folder):
    options = {"samples": 12, "sample_steps": 2, "batch_size": 4, "steps": 2, "progress": False}
    return sculpt.fit(
        [P, Q], network=VectorNetwork(2, width=4), checkpoint=folder, descent=sculpt.Descent(patience=None), **options
    )


FOLDERS = {
    "AdamW": partial(loop, optimizer=torch.optim.AdamW),
    "SGD": partial(loop, optimizer=torch.optim.SGD),
    "Adafactor": partial(loop, optimizer=torch.optim.Adafactor),
    "fit": fitted,
}


def load(folder):
    if (folder / "training").exists():
        return fitted(folder)
    names = {name for part in read_state(folder)[1].values() for name in part}
    optimizer = next((known for name, known in OPTIMIZERS.items() if name in names), torch.optim.Adafactor)
    return Loop(folder, optimizer)


def use(loaded):
    if isinstance(loaded, Loop):
        loaded.run()
        assert len(str(loaded.training.curve)) > 10
    else:
        x = (P & Q).sample(4, sculpt.Guided(loaded), steps=2, progress=False).x
        assert x.isfinite().all() and loaded.history
