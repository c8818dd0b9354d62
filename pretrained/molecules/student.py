r"""A small student of the sEH proxy, for where the public one cannot be had: ``python pretrained/molecules/student.py``.

It is the proxy's own architecture, narrower, from random weights, trained on what the published proxy says of generated molecules:
its value, and, to begin with, its states h of the atoms after some rounds, which the student's predict linearly (a hint that is dropped
in the end). The molecules come from an untrained policy, from the policies beside this file as far as they are there, at exponents
:math:`\beta \sim U[0, 96]`, from the published 72 fragments if ``$SCULPT_DATA`` has them, and from ``--trees``. A killed run goes on where it
stopped.
"""

import argparse
import csv
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rdkit import Chem
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[1]))

import recipes
from recipes import table

import sculpt
from sculpt.files import replace_file, replacing, save_folder
from sculpt.molecules import SEH, FragmentNetwork, FragmentTrees, Vocabulary
from sculpt.molecules.network import BETA_MAX
from sculpt.molecules.proxy import Proxy, graph
from sculpt.molecules.seh import STUDENT
from sculpt.training import Row, Training, cosine
from sculpt.weights import read_tensors

HERE = Path(__file__).parent
WIDTH, ROUNDS, EDGES = 48, 12, 16  # the proxy has 64, 12 and 128
BATCH, RATE, DELTA = 32, 3e-3, 0.3
HINTS = (4, 8, 12)  # rounds after which the student should know what the proxy knows of each atom
RANDOM, DRAWN = 12_000, 12_000  # trees of an untrained policy, and of each trained one
HELD_OUT = 20  # one molecule in so many


# Molecules with their values


def sources(trees: dict[str, Path]) -> Iterator[tuple[str, FragmentTrees, Callable[[], Tensor]]]:
    """Kinds of molecules: a name, an environment and its trees."""
    own = FragmentTrees()
    yield "random", own, lambda: drawn(FragmentNetwork(own.vocabulary).sample, RANDOM, 0.0)
    published = Path(os.environ.get("SCULPT_DATA", "missing")) / "molecules" / "fragments_72.json"
    if published.is_file():
        env = FragmentTrees(Vocabulary.read(published), hetero_bonds=True)
        network = FragmentNetwork(env.vocabulary, hetero_bonds=True)
        yield "random, 72 fragments", env, lambda: drawn(network.sample, RANDOM, 0.0)
    for name in ("seh", "sa", "qed"):
        if (HERE / name / "config.json").is_file():
            model = sculpt.load(HERE / name, beta=0)
            yield f"{name} policy", model.env, lambda network=model.policy.module: drawn(network.sample, DRAWN, BETA_MAX)
    for name, path in trees.items():
        yield name, own, lambda path=path: read_tensors(path)["x"].long()


def drawn(sample: Callable, n: int, highest: float, chunk: int = 512) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    parts = [sample(highest * torch.rand(chunk, generator=generator), generator) for _ in range(-(-n // chunk))]
    return torch.cat(parts)[:n]


def write_molecules(folder: Path, trees: dict[str, Path], teacher: SEH) -> None:
    """A table for each kind: canonical SMILES, and the proxy's value of it."""
    for name, env, draw in sources(trees):
        path = folder / f"{name}.csv"
        if path.is_file():
            continue
        torch.manual_seed(0)
        smiles = list(dict.fromkeys(env.decode(draw())))
        rows = zip(smiles, teacher.proxy(smiles).tolist(), strict=True)
        replace_file(path, "".join(f"{s},{y:.5f}\n" for s, y in rows).encode())
        print(f"{name}: {len(smiles):,} molecules", flush=True)


class Molecules:
    """The tables as graphs, each molecule once. One in twenty is held out, by the hash of its SMILES."""

    @torch.no_grad()
    def __init__(self, folder: Path, teacher: SEH):
        self.kinds = sorted(path.stem for path in folder.glob("*.csv"))
        rows = {}
        for k, name in enumerate(self.kinds):
            with (folder / f"{name}.csv").open() as file:
                for smiles, y in csv.reader(file):
                    rows.setdefault(smiles, (k, float(y)))
        self.smiles = list(rows)
        self.kind = torch.tensor([k for k, _ in rows.values()])
        self.y = torch.tensor([y for _, y in rows.values()])
        self.held = torch.tensor([hashlib.sha256(s.encode()).digest()[0] % HELD_OUT == 0 for s in rows])
        self.graphs, proxy = [], teacher.network
        for at in range(0, len(rows), 512):
            x, source, target, bond, owner = graph([Chem.MolFromSmiles(s) for s in self.smiles[at : at + 512]])
            atoms, edges = torch.bincount(owner), torch.bincount(owner[source])
            first = (atoms.cumsum(0) - atoms).repeat_interleave(edges)
            columns = [c.short().split(edges.tolist()) for c in (source - first, target - first, bond)]
            states = [h for r, h in enumerate(proxy.states(x, source, target, bond), 1) if r in HINTS]
            inner = torch.cat(states, -1).half().split(atoms.tolist())
            self.graphs += zip(x.to(torch.uint8).split(atoms.tolist()), *columns, inner, strict=True)
        some = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:1000]
        sample = torch.cat([self.graphs[i][-1] for i in some.tolist()]).float()
        self.mean, self.std = sample.mean(0), sample.std(0).clamp(min=0.01)

    def batch(self, at: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Inputs of the network, values, and the proxy's states in units of their spread."""
        x, source, target, bond, states = zip(*[self.graphs[i] for i in at.tolist()], strict=True)
        atoms, edges = (torch.tensor([len(part) for part in parts]) for parts in (x, bond))
        first = (atoms.cumsum(0) - atoms).repeat_interleave(edges)
        source, target, bond = (torch.cat(parts).long() for parts in (source, target, bond))
        owner = torch.arange(len(at)).repeat_interleave(atoms)
        inputs = (torch.cat(x).float(), source + first, target + first, bond, owner)
        return inputs, self.y[at], (torch.cat(states).float() - self.mean) / self.std


# Training


def initial(y: Tensor) -> dict[str, Tensor]:
    """Random weights, an output of the right mean."""
    d = WIDTH

    def normal(*shape: int, std: float | None = None) -> Tensor:
        return torch.randn(shape) * (shape[-1] ** -0.5 if std is None else std)

    return {
        "atom_in.weight": normal(d, 71, std=0.5),
        "atom_in.bias": torch.zeros(d),
        "conv.root": normal(d, d),
        "conv.bias": torch.zeros(d),
        "edge_net.0.weight": normal(EDGES, 4, std=1.0),
        "edge_net.0.bias": torch.zeros(EDGES),
        "edge_net.1.weight": normal(d * d, EDGES, std=(2 / EDGES / d) ** 0.5),
        "edge_net.1.bias": torch.zeros(d * d),
        "gru.weight_ih": normal(3 * d, d),
        "gru.weight_hh": normal(3 * d, d),
        "gru.bias_ih": torch.zeros(3 * d),
        "gru.bias_hh": torch.zeros(3 * d),
        "readout.weight_ih": normal(4 * d, 2 * d),
        "readout.weight_hh": normal(4 * d, d),
        "readout.bias_ih": torch.zeros(4 * d),
        "readout.bias_hh": torch.zeros(4 * d),
        "out.weight": normal(1, 2 * d),
        "out.bias": y.mean()[None],
    }


class Student(nn.Module):
    """The weights, and linear maps from its states to what the proxy knows of each atom."""

    def __init__(self, y: Tensor):
        super().__init__()
        # No dots in the names of parameters.
        self.weights = nn.ParameterDict({name.replace(".", "/"): w for name, w in initial(y).items()})
        self.hints = nn.ParameterDict({str(r): 0.1 * torch.randn(64, WIDTH) for r in HINTS})

    def arrays(self) -> dict[str, Tensor]:
        return {name.replace("/", "."): w for name, w in self.weights.items()}

    def proxy(self) -> Proxy:
        return Proxy(self.arrays(), "trained", ROUNDS)


class Recipe:
    """How the student is trained."""

    name = "student"

    def __init__(self, molecules: Molecules, steps: int, folder: Path):
        torch.manual_seed(0)
        self.molecules, self.steps = molecules, steps
        self.rows = (~molecules.held).nonzero()[:, 0]
        student = Student(molecules.y[self.rows])
        optimizer = torch.optim.Adam(student.parameters(), lr=RATE, betas=(0.9, 0.99))
        rate, identity = cosine(steps, 200, 0.005), {"name": self.name, "steps": steps, "molecules": len(molecules.y)}
        self.training = Training(student, optimizer, folder, identity=identity, rate=rate, clip=0.5, decay=0.998)
        self.training.resume()

    def loss(self, seed: int) -> tuple[Tensor, Row]:
        student, step = self.training.network, self.training.step
        epoch, i = divmod(step, len(self.rows) // BATCH)
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(epoch))
        (*graph, owner), y, states = self.molecules.batch(self.rows[order[i * BATCH : (i + 1) * BATCH]])
        proxy = student.proxy()
        inner = list(proxy.states(*graph))
        # Linear beyond a third of a unit: at the large values the proxy is rough, and the small ones have ranks too.
        value = F.huber_loss(proxy.read(inner[-1], owner), y, delta=DELTA)
        guess = torch.cat([inner[int(r) - 1] @ to.T for r, to in student.hints.items()], -1)
        return value + (1 - step / self.steps) * F.mse_loss(guess, states), {"value": value.detach()}

    @torch.no_grad()
    def predict(self, rows: Tensor) -> Tensor:
        proxy = self.training.average.proxy()
        return torch.cat([proxy(*self.molecules.batch(part)[0]) for part in rows.split(512)])

    def evaluate(self) -> Row:
        """How it ranks the molecules held out."""
        return {name: row["spearman"] for name, row in self.qualities().items()}

    def qualities(self) -> dict[str, dict[str, float]]:
        """On the molecules held out: how it ranks them, and how far it is off."""
        rows = self.molecules.held.nonzero()[:, 0]
        got, y, kind = self.predict(rows), self.molecules.y[rows], self.molecules.kind[rows]
        chosen = {"all": torch.ones_like(kind, dtype=torch.bool)}
        chosen |= {name: kind == k for k, name in enumerate(self.molecules.kinds)}
        return {name: quality(got[on], y[on]) for name, on in chosen.items()}


def quality(got: Tensor, y: Tensor) -> dict[str, float]:
    reward = [(v.clamp(1e-4, 100) / 8) for v in (got, y)]
    return {
        "molecules": len(y),
        "spearman": round(
            float(torch.corrcoef(torch.stack([got.argsort().argsort(), y.argsort().argsort()]).double())[0, 1]), 4
        ),
        "mae": round(float((got - y).abs().mean()), 3),
        "reward_mae": round(float((reward[0] - reward[1]).abs().mean()), 4),
        "spread": round(float(y.std()), 2),
    }


# The checkpoint


def finish(recipe: Recipe, teacher: SEH) -> None:
    """The averaged weights and their card."""
    qualities = recipe.qualities()
    weights, everything = recipe.training.average.arrays(), qualities["all"]
    config = {"kind": "seh_student", "rounds": ROUNDS, "parameters": sum(w.numel() for w in weights.values())}
    with replacing(STUDENT) as new:
        save_folder(new, config | {"spearman": everything["spearman"], "reward_mae": everything["reward_mae"]}, weights)
        qualities |= unseen(SEH(new), teacher, set(recipe.molecules.smiles))
        (new / "README.md").write_text(card(new, recipe, config, qualities))


def unseen(student: SEH, teacher: SEH, known: set[str]) -> dict[str, dict[str, float]]:
    """On molecules of other origin."""
    qualities = {}
    for name in ("seh", "sa", "qed"):
        if (HERE / name / "config.json").is_file():
            for beta in (32, 96):
                model = sculpt.load(HERE / name, beta=beta)
                x = model.policy.module.sample(torch.full((1024,), float(beta)), torch.Generator().manual_seed(1))
                smiles = sorted(set(model.env.decode(x)) - known)
                qualities[f"new: {name} policy, β = {beta}"] = quality(student.proxy(smiles), teacher.proxy(smiles))
    reference = Path(os.environ.get("SCULPT_DATA", "missing")) / "molecules" / "reference.csv"
    if reference.is_file():
        with reference.open() as file:
            smiles = [row["smiles"] for row in csv.DictReader(file)]
        qualities["drugs and other small molecules, no trees"] = quality(student.proxy(smiles), teacher.proxy(smiles))
    return qualities


def card(folder: Path, recipe: Recipe, config: dict, qualities: dict[str, dict[str, float]]) -> str:
    spread = "mean error of the proxy's value, of a spread of"
    rows = [
        (
            name,
            f"{row['molecules']:,}",
            f"{row['spearman']:.3f}",
            f"{row['mae']:.2f} of {row['spread']:.2f}",
            f"{row['reward_mae']:.3f}",
        )
        for name, row in qualities.items()
    ]
    number, kinds, steps = int((~recipe.molecules.held).sum()), ", ".join(recipe.molecules.kinds), recipe.steps
    data = (
        f"{number:,} generated molecules ({kinds}), with what the published proxy (MIT licence) says of them; "
        "kinds that are neither random nor a policy beside this folder were given by `--trees`"
    )
    command = f"`python pretrained/molecules/student.py --steps {steps}`: {steps:,} steps of {BATCH} molecules"
    return recipes.card(
        folder,
        "A small network that imitates the sEH proxy of Bengio et al. (2021). `sculpt.molecules.SEH()` takes it, with a warning, where the\n"
        "public weights are neither here nor downloadable. Its values are **not** the published reward: report results with the real proxy.",
        """
seh = sculpt.molecules.SEH(sculpt.molecules.seh.STUDENT)  # even where the proxy could be had
""",
        {
            "data": data,
            "network": f"the proxy's, {WIDTH} wide instead of 64: {config['parameters']:,} parameters, from random weights",
            "recipe": f"{command}, Adam {RATE:g} with cosine decay, averaged weights",
            "cost": f"{recipe.training.seconds / 60:.0f} CPU minutes on one thread, and about 4 for the molecules and what the proxy says of them",
        },
        measured=f"""Molecules that it was not trained on: {100 / HELD_OUT:.0f} % of each kind, held out by the hash of their SMILES, then others.
Where all rewards are nearly alike (a small spread) ranks tell less: such molecules are better compared by the real proxy.

{table(("molecules", "number", "Spearman", spread, "mean error of the reward"), rows)}""",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=9_000)
    parser.add_argument("--state", type=Path, default=Path("train_state/molecules/seh_student"))
    parser.add_argument(
        "--trees", action="append", default=[], metavar="NAME=FILE", help="safetensors with more trees, as rows of x"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    teacher = SEH()
    if teacher.path == STUDENT:
        raise SystemExit("The public proxy is not here and cannot be downloaded, and a student of a student is of no use.")
    options.state.mkdir(parents=True, exist_ok=True)
    trees = {name: Path(path) for name, path in (item.split("=", 1) for item in options.trees)}
    write_molecules(options.state, trees, teacher)
    recipe = Recipe(Molecules(options.state, teacher), options.steps, options.state)
    recipes.train(recipe, report=500, check=500)
    finish(recipe, teacher)
