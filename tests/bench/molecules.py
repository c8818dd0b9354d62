"""Molecules: agreement, speed and quality, beside the published: ``make bench-molecules``. One thread, CPU time."""

from __future__ import annotations

import csv
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rdkit import Chem

import sculpt
from sculpt.molecules import QED, SA, SEH, FragmentTrees
from sculpt.molecules.rewards import Reward

ROOT = Path(__file__).parents[2]
PRETRAINED = ROOT / "pretrained" / "molecules"
DATA = Path(os.environ.get("SCULPT_DATA", "missing")) / "molecules"


def row(name: str, value: str, target: str, published: str = "") -> None:
    print(f"| {name} | {value} | {target} | {published} |", flush=True)


def heading(text: str) -> None:
    print(f"\n{text}\n\n| | measured | target | published |\n|---|---|---|---|", flush=True)


def rate(function: Callable[[], object], n: int, repeats: int = 5) -> float:
    """Per CPU second, the best of a few runs: others may be using the machine."""
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return n / min(times)


def rewards() -> None:
    with (DATA / "reference.csv").open() as file:
        rows = list(csv.DictReader(file))
    smiles = [r["smiles"] for r in rows]
    seh, sa, qed = SEH(), SA(), QED()

    def off(values: torch.Tensor, column: str) -> str:
        return f"{(values - torch.tensor([float(r[column]) for r in rows])).abs().max():.1e}"

    heading("Rewards, 150 reference molecules")
    row("sEH proxy", off(seh.proxy(smiles), "seh_peer"), "1e-4")
    row("sEH proxy, as trained", off(SEH(root="trained").proxy(smiles), "seh_transposed_root"), "1e-4")
    row("SA, QED", f"{off(sa(smiles), 'sa_reward')}, {off(qed(smiles), 'qed')}", "1e-5")
    batch = (2 * smiles)[:256]
    row("sEH from SMILES, batch 256", f"{rate(lambda: seh(batch), 256):,.0f} /s", "1,100 /s", "80 /s")
    molecules = [Chem.MolFromSmiles(s) for s in batch]
    row("sEH from molecules", f"{rate(lambda: seh(molecules), 256):,.0f} /s", "1,100 /s", "80 /s")


def full_length(env: FragmentTrees, n: int) -> torch.Tensor:
    """Random trees that filled all their slots."""
    generator, kept = torch.Generator().manual_seed(0), []
    while sum(map(len, kept)) < n:
        s = env.s0.expand(2048, -1).clone()
        for _ in range(env.slots):
            mask = env.states_from_tensor(s).forward_masks[:, :-1]
            s, mask = s[mask.any(-1)], mask[mask.any(-1)]
            a = torch.multinomial(mask.double(), 1, generator=generator)
            s = env.step(env.states_from_tensor(s), env.actions_from_tensor(a)).tensor
        kept.append(s)
    return torch.cat(kept)[:n]


def environment() -> None:
    heading("Environment")
    trees("sculpt's vocabulary", FragmentTrees())
    trees("the peers' 72 fragments", FragmentTrees(str(DATA / "fragments_72.json"), hetero_bonds=True))


def trees(name: str, env: FragmentTrees) -> None:
    x = full_length(env, 500)
    states = env.states_from_tensor(x)
    row(f"{name}: actions", f"{env.n_actions:,}", "")
    row("9-fragment trees assembled", f"{rate(lambda: env.molecules(x), 500):,.0f} /s", "", "10,700 /s at all lengths")
    row("to canonical SMILES", f"{rate(lambda: env.decode(x), 500):,.0f} /s", "")
    row("counted and hashed", f"{rate(lambda: env.trees(x), 500):,.0f} /s", "")
    row("masks", f"{rate(lambda: states.clone().forward_masks, 500):,.0f} /s", "")


def policies() -> None:
    heading("Policies")
    for name, reward, high in (("seh", SEH, 0.5), ("sa", SA, 0.6), ("qed", QED, 0.25)):
        if (PRETRAINED / name / "config.json").exists():
            policy(name, reward(), high)
        else:
            row(f"p_{name}", "not trained yet", "")


def policy(name: str, reward: Reward, high: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for beta in (96.0, 32.0):
        model = sculpt.load(PRETRAINED / name, beta=beta)
        network = model.policy.module
        x = network.sample(torch.full((5000,), beta), generator)
        R = reward(model.env.molecules(x))
        length = float((x[:, ::2] > 0).sum(-1).float().mean())
        row(f"p_{name}, β = {beta:g}: at least {high}", f"{100 * R.ge(high).float().mean():.1f} %", "95 %" * (beta == 32))
        row("mean reward, fragments", f"{R.mean():.3f}, {length:.1f}", "")
    batch = torch.full((512,), 32.0)
    row("drawn, 512 at a time", f"{rate(lambda: network.sample(batch, generator), 512):,.0f} /s", "700 /s", "62–72 /s")
    through = rate(lambda: model.sample(512, generator=generator), 512, 2)
    row("the same through GFlowNet.sample", f"{through:,.0f} /s", "700 /s", "62–72 /s")


def training() -> None:
    spec = importlib.util.spec_from_file_location("recipe", PRETRAINED / "recipe.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    recipe.BATCH = 64
    heading("Training, 64 new trees a step (the recipe takes 32) and 96 replayed, network and reward included")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("seh", "sa", "qed"):
            run = recipe.Training(name, 1000, Path(folder) / name)
            row(name, f"{rate(run.train_step, 1, 10):.1f} steps/s", "2 steps/s on two threads", "0.48")


if __name__ == "__main__":
    torch.set_num_threads(1)
    parts = {"rewards": rewards, "environment": environment, "policies": policies, "training": training}
    for part in sys.argv[1:] or parts:
        parts[part]()
