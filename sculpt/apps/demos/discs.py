"""``sculpt demo discs``: three discs as diffusion models, composed on every road, beside the exact answer.

The models are Gaussian mixtures in the plane, whose denoisers are known in closed form at every noise level, behind three
different diffusers schedulers. So every number that the demo prints is an error against the truth.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sculpt import plots
from sculpt.apps.demos.common import Clock, luck, markdown
from sculpt.apps.demos.page import Part, Shown, meanings, publish
from sculpt.classifier.fit import fit
from sculpt.classifier.heads import Classifier
from sculpt.composition import Composition
from sculpt.diffusion.clock import like
from sculpt.diffusion.diffusers.adapter import Diffusion
from sculpt.diffusion.diffusers.schedules import schedule_of
from sculpt.files import replace_file
from sculpt.model import BaseModel
from sculpt.roads import Guided, Rejection, Road, Tracked

__all__ = ["Disc", "Exact", "Network", "discs", "log_densities", "run"]

HALF_WIDTH, CELLS, FINE = 2.2, 28, 8
"""The picture's half side, the cells on which errors are counted, and the midpoints per cell side of the exact answer."""
MORE = """
from sculpt.apps.demos.discs import discs

p, q, r = discs()
samples = (r - (p | q)).sample(3000)         # formulas nest
print(samples.diagnostics)
samples.save("r-minus-p-or-q.png")
"""


class Disc(nn.Module):
    r"""A soft disc, :math:`p(x) = \tfrac1K \sum_k \mathcal N(x; \mu_k, \tau^2)`; noised to variance v it has :math:`\tau^2 + v`."""

    means: Tensor

    def __init__(self, centre: tuple[float, float], radius: float = 1.1, tau: float = 0.17, points: int = 80):
        super().__init__()
        # A sunflower's: every point has the same share of the area.
        k = torch.arange(points, dtype=torch.float64) + 0.5
        r, angle = radius * (k / len(k)).sqrt(), k * math.pi * (3 - math.sqrt(5))
        means = torch.stack([r * angle.cos(), r * angle.sin()], dim=-1) + torch.tensor(centre, dtype=torch.float64)
        self.register_buffer("means", means)
        self.variance = tau**2

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x)"""
        square = torch.cdist(x.double(), self.means) ** 2
        return (-square / (2 * self.variance)).logsumexp(-1) - math.log(2 * math.pi * self.variance * len(self.means))

    def denoise(self, z: Tensor, s: Tensor) -> Tensor:
        r""":math:`D = z + v \nabla \log q(z)`: z moved towards the mean of the points, weighted by how likely they made z."""
        v = float(s) ** 2
        logits = (z @ self.means.T - self.means.square().sum(-1) / 2) / (self.variance + v)
        mean = logits.float().softmax(-1).to(z) @ self.means
        return z + v / (self.variance + v) * (mean - z)


class Network(nn.Module):
    """What a perfectly trained network would answer to (x, t), in its scheduler's own coordinates and prediction type."""

    def __init__(self, disc: Disc, scheduler: Any):
        super().__init__()
        self.disc, self.schedule = disc, schedule_of(scheduler)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        s = self.schedule.sigma(t).flatten()[0]
        z = x.double() / like(self.schedule.scale(s), x.double())
        return self.schedule.output(z, s, self.disc.denoise(z, s)).to(x.dtype)


def discs() -> list[Diffusion]:
    """Three overlapping discs, as models of three schedules: linear ε, cosine v, flow matching."""
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    schedulers = [
        DDPMScheduler(clip_sample=False),
        DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False),
        FlowMatchEulerDiscreteScheduler(),
    ]
    centres = [(-0.62, 0.36), (0.62, 0.36), (0.0, -0.72)]
    parts = zip("pqr", centres, schedulers, strict=True)
    return [Diffusion(Network(Disc(centre), scheduler), scheduler, (2,), name=name) for name, centre, scheduler in parts]


class Exact:
    """The target of a composition of discs on a grid: cell masses, log Z, and the error of samples against it."""

    def __init__(self, composition: BaseModel):
        fine = CELLS * FINE
        axis = (torch.arange(fine, dtype=torch.float64) + 0.5) / fine * 2 * HALF_WIDTH - HALF_WIDTH
        cell = 2 * math.log(2 * HALF_WIDTH / fine)
        log_p, self.log_z = self._normalised(composition, torch.cartesian_prod(axis, axis), cell)
        self.density = log_p.exp().view(fine, fine)
        self.masses = (log_p + cell).exp().view(CELLS, FINE, CELLS, FINE).sum((1, 3)).flatten()

    def _normalised(self, model: BaseModel, x: Tensor, cell: float) -> tuple[Tensor, float]:
        if not isinstance(model, Composition):
            return model.model.disc.log_prob(x), 0.0  # type: ignore[attr-defined]
        ell = torch.stack([self._normalised(part, x, cell)[0] for part in model.models], dim=-1)
        value = model.formula.value(ell)
        log_z = float(value.logsumexp(0)) + cell
        return value - log_z, log_z

    def error(self, x: Tensor) -> float:
        """Total variation of the samples' histogram from the target; what falls outside counts as wrong."""
        cells = ((x.double() + HALF_WIDTH) / (2 * HALF_WIDTH) * CELLS).floor().long()
        cells = cells[((cells >= 0) & (cells < CELLS)).all(-1)]
        shares = torch.bincount(cells[:, 0] * CELLS + cells[:, 1], minlength=CELLS**2) / len(x)
        return 0.5 * float((shares - self.masses).abs().sum() + 1 - shares.sum())

    def floor(self, n: int, repeats: int = 20) -> float:
        """The error that n draws of an exact sampler have themselves."""
        return luck(self.masses, n, repeats)


def log_densities(composition: Composition) -> Callable[[Tensor], Tensor]:
    """The leaves' exact log-densities, for rejection.

    Args:
        composition: of discs.
    """
    return lambda x: torch.stack([leaf.model.disc.log_prob(x) for leaf in composition.leaves], dim=-1)  # type: ignore[attr-defined]


def run(
    folder: str | Path = "demo", *, n: int = 2000, fit_steps: int = 400, samples: int = 6000, seed: int = 0
) -> list[dict[str, Any]]:
    """Sample three compositions on every road, write a picture, a table and the page, and return the table's rows.

    Args:
        folder: where they go.
        n: samples of each composition on each road.
        fit_steps: training steps of the classifier of two discs.
        samples: how many of each model the classifier is fitted to.
        seed: of training and sampling.
    """
    folder, clock = Path(folder), Clock()
    p, q, r = models = discs()
    print(
        "Three discs p, q, r stand for pretrained diffusion models. Their denoisers are exact, each behind another diffusers\n"
        "scheduler (linear ε, cosine v, flow matching), so whatever comes out can be compared with the exact answer.\n"
    )
    clock.say("fitting a classifier of p, q")
    classifier = fit([p, q], steps=fit_steps, samples=samples, sample_steps=32, batch_size=128, seed=seed)
    # A classifier of three models takes minutes: the other roads need none.
    cases: list[tuple[Composition, Classifier | None]] = [(p & q, classifier), (p - q, classifier), (p & q & r, None)]
    rows, panels = [], []
    for composition, own in cases:
        clock.say(f"sampling {composition} on every road")
        table, panel = _roads(composition, own, Exact(composition), n, seed)
        rows += table
        panels.append(panel)
    _write(folder, models, panels, rows, n, clock)
    return rows


def _roads(
    composition: Composition, classifier: Classifier | None, exact: Exact, n: int, seed: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    roads: dict[str, Road] = {"tracked": Tracked(), "rejection": Rejection(log_densities(composition))}
    if classifier is not None:
        roads |= {"guided": Guided(classifier), "corrected": Guided(classifier, correct=True, particles=2 * n)}
    floor = exact.floor(n)
    rows: list[dict[str, Any]] = []
    panel: dict[str, Any] = {"title": str(composition), "exact": exact.density, "captions": {"exact": f"floor {floor:.3f}"}}
    for name, road in roads.items():
        began = time.monotonic()
        result = composition.sample(n, road, generator=torch.Generator().manual_seed(seed))
        error = exact.error(result.x)
        panel[name] = result.x
        panel["captions"][name] = f"error {error:.3f} = {error / floor:.2f} × floor"
        row = {"composition": str(composition), "road": name, "error": error, "floor": floor}
        row |= {"log_z": result.log_z, "exact_log_z": exact.log_z, "verdict": result.verdict.level}
        rows.append(row | {"seconds": time.monotonic() - began})
    return rows, panel


def _write(
    folder: Path, models: list[Diffusion], panels: list[dict[str, Any]], rows: list[dict[str, Any]], n: int, clock: Clock
) -> None:
    figure = plots.compare2d(
        panels,
        HALF_WIDTH,
        ["exact", "tracked", "rejection", "guided", "corrected"],
        outlines={str(model): Exact(model).density for model in models},
        title=f"{n:,} samples of each composition, beside the exact target",
    )
    plots.save(figure, folder / "discs-beside-the-exact-answer.png")
    cells = _table(rows)
    replace_file(folder / "discs.md", (markdown(cells) + "\n").encode())
    shown = Shown(
        "discs-beside-the-exact-answer.png",
        f"{n:,} samples of each formula, beside the exact answer",
        "Left, the exact target; then what each road draws. Dashed: the edges of the discs p, q and r.",
        "Three rows of heat maps of overlapping discs: "
        + "; ".join(f"{r['composition']} {r['road']}: error {r['error']:.3f}" for r in rows),
    )
    note = (
        f"Error: total variation from the exact target on {CELLS} × {CELLS} cells. Floor: the error of {n:,} draws of an exact sampler; "
        "a ratio near 1 is as good as it gets. log Z: the target's normaliser, estimated and exact."
    )
    done = (
        "Three diffusion models in the plane whose networks are exact, each behind another diffusers scheduler. Tracked densities and "
        "rejection need no training; the classifier of p and q was fitted here."
    )
    headline = "Where the answer is known: every road beside it"
    page = publish(folder, Part("discs", headline, done, [shown], cells, note, MORE), clock)
    print(f"\n{markdown(cells)}\n\n{note}")
    print("\n".join(f"{level}: {meaning}." for level, meaning in meanings(cells)))
    print(f"In {folder}/: {shown.file}, discs.md, {page.name}. It took {clock.seconds:.0f} s, {clock.cpu:.0f} s of one core.")


def _table(rows: list[dict[str, Any]]) -> list[list[str]]:
    cells = [["composition", "road", "error", "floor", "ratio", "log Z", "exact", "verdict", "seconds"]]
    for row in rows:
        numbers = [f"{row['error']:.3f}", f"{row['floor']:.3f}", f"{row['error'] / row['floor']:.2f}"]
        log_z = ["" if row["log_z"] is None else f"{row['log_z']:.3f}", f"{row['exact_log_z']:.3f}"]
        cells.append([row["composition"], row["road"], *numbers, *log_z, row["verdict"], f"{row['seconds']:.1f}"])
    return cells
