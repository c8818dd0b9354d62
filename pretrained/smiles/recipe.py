r"""The SMILES models: ``python pretrained/smiles/recipe.py {prior,scores,seh,sa,qed} [--minutes m | --steps n] [--more] [--device cuda] [--card n]``.

``prior`` is a language model of MOSES. ``scores`` computes the rewards of MOSES, for the policies to learn from. A policy starts as the
prior, whose ``<begin>`` it reads as ``<seh:β>`` for every exponent, and learns by trajectory balance relative to the prior,

.. math:: \bigl(\log Z(\beta) + \log p(x|\beta) - \log \text{prior}(x) - \beta \log R(x)\bigr)^2

so it samples strings x in proportion to prior(x) R(x)^β, up to a share of e^{-10}. Half of each batch are its own new strings, an
eighth of them drawn at a higher temperature; the others are older ones and strings of MOSES, the better ones more often the larger the
exponent is, because a string is worth learning from under any exponent. ``--more`` trains a saved policy further. A killed run goes on
where it stopped, bit for bit on a CPU.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path += [str(folder) for folder in Path(__file__).parents[:2]]

import cards
import pace
import recipes
import scores
from moses import quality, strings
from network import SIZE, draw, likelihood, log_p, network, optimizer, save
from policy import Policy
from scores import Workers
from tokens import BEGIN, BETAS, PAD, prompts

from sculpt.files import replacing
from sculpt.training import Row, Training, cosine, read_state

HERE = Path(__file__).parent
HELD_OUT = 43
"""Of so many strings of MOSES' test set the likelihood of one is watched: neighbours are alike."""


class Prior:
    """How the language model is trained: every string of MOSES once an epoch."""

    name = "prior"
    rate, warm_up = 1.5e-3, 200

    def __init__(self, options: argparse.Namespace):
        self.pace, self.epoch = pace.Pace(options.minutes, options.steps), (-1, torch.zeros(0))
        self.device, self.batch = torch.device(options.device), options.batch or 1024
        x = strings("train")
        self.lengths, self.x = (x != PAD).sum(1), x.to(self.device)
        self.held = strings("test")[::HELD_OUT].to(self.device)
        net, fall = network().to(self.device), lambda step: cosine(self.pace.steps, self.warm_up, 0.01)(step)
        identity = {"name": self.name, "batch": self.batch, "steps": options.steps, "network": SIZE}
        self.training = Training(
            net,
            optimizer(net, self.rate, 0.1, self.rate),
            options.state / self.name,
            identity=identity,
            rate=fall,
            clip=1.0,
            bfloat16=self.device.type == "cuda",
        )
        self.training.resume(pace=self.pace)

    def rows(self) -> Tensor:
        """Of this step's batch, by length."""
        epoch, i = divmod(self.training.step, len(self.x) // self.batch)
        if self.epoch[0] != epoch:
            self.epoch = epoch, torch.randperm(len(self.x), generator=torch.Generator().manual_seed(epoch))
        rows = self.epoch[1][i * self.batch : (i + 1) * self.batch]
        return rows[self.lengths[rows].argsort()]

    def loss(self, seed: int) -> tuple[Tensor, Row]:
        rows, log = self.rows(), 0.0
        # A CPU would waste its time on padding; a GPU on many small calls.
        for part in rows.chunk(4 if self.device.type == "cpu" else 1):
            x = self.x[part.to(self.device), : int(self.lengths[part].max())].long()
            log = log + log_p(self.training.network, torch.full_like(x[:, 0], BEGIN), x).sum()
        return -log / self.lengths[rows].sum(), {"nats": -log.detach() / len(rows)}

    @torch.no_grad()
    def evaluate(self) -> Row:
        """Of the averaged network: what it makes of strings that it has not seen, and what its own strings are."""
        net = self.training.average
        return {
            "held_out": -float(likelihood(net, BEGIN, self.held).mean()),
            **quality(draw(net, [BEGIN], 2000 if self.device.type == "cuda" else 500, 1)[0]),
        }


def finish(name: str, state: Path, device: str) -> None:
    """The averaged weights as they were saved last. A policy's ``generate`` begins with the exponent 16 unless it is told another one."""
    note, parts = read_state(state / name)
    net, identity, levels = network(), note["identity"], prompts(name)
    net.load_state_dict(parts["average"])
    run = {"name": name, "steps": note["step"], "seconds": round(note["seconds"]), "batch": identity["batch"], "device": device}
    if name != "prior":
        log_Z = dict(zip(map(str, BETAS), parts["log_Z"]["values"].tolist(), strict=True))
        run |= {"molecules": identity["molecules"], "log_Z": log_Z}
    past = recipes.read_runs(HERE / name)[: identity.get("past", 0)] if (HERE / name).is_dir() else []
    with replacing(HERE / name) as new:
        save(net, new, levels[BETAS.index(16) if name != "prior" else 0])
        recipes.write_runs(new, [*past, run | {"curve": note["curve"]}])


def write_card(options: argparse.Namespace) -> None:
    folder = HERE / options.name
    if options.name == "prior":
        text = cards.prior(folder, options.card, strings("test")[:: HELD_OUT // 2])
    else:
        text = cards.policy(folder, options.card, options.workers)
    (folder / "README.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=("prior", "scores", *scores.REWARDS))
    parser.add_argument("--minutes", type=float, help="by the clock; the speed of the first steps says how many there are")
    parser.add_argument("--steps", type=int, help="instead")
    parser.add_argument("--more", action="store_true", help="begin as the saved policy")
    parser.add_argument("--batch", type=int, help="strings a step; by default 1,024")
    parser.add_argument("--state", type=Path, default=Path("train_state/smiles"), help="where a killed run continues from")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that compute rewards")
    parser.add_argument("--rows", type=int, default=500_000, help="molecules of MOSES that are scored")
    parser.add_argument("--stop", action="store_true", help="write the model as its last saved state has it")
    parser.add_argument("--card", type=int, metavar="N", help="write the card of the finished model, from N samples")
    options = parser.parse_args()
    if options.minutes is None and options.steps is None:
        options.minutes = 30.0
    torch.set_num_threads(1)
    if options.name == "scores":
        return scores.score(strings("train"), options.state / "scores", options.rows, options.minutes or 1e9, options.workers)
    if options.card is not None:
        return write_card(options)
    if options.name == "prior" and not options.stop:
        pace.train(Prior(options), recipes.say)
    elif not options.stop:
        with Workers(options.name, count=options.workers) as workers:
            past = recipes.read_runs(HERE / options.name) if options.more else ()
            pace.train(Policy(options.name, options, workers, past), recipes.say)
    finish(options.name, options.state, torch.device(options.device).type)


if __name__ == "__main__":
    main()
