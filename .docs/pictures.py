"""Draw the pictures of the README and of the guides: ``python .docs/pictures.py``, a minute or two on one core.

``molecules`` is what two policies and their composition write, 1,000 molecules each, over the two rewards; ``prompts`` are two prompts of one
pipeline and both together; ``digits`` are three image models and six compositions of them; ``roads`` is one composition in the plane, exactly and by two roads. Names as arguments draw some of them.
"""

import io
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps

import sculpt
from sculpt import plots
from sculpt.apps.demos.discs import HALF_WIDTH, Exact, discs, log_densities

HERE = Path(__file__).parent
PRETRAINED = HERE.parent / "pretrained"


def drawn(model: sculpt.BaseModel, n: int, road: Any = None, **how: Any) -> sculpt.Samples:
    return model.sample(n, road, generator=torch.Generator().manual_seed(0), progress=False, **how)


def molecules() -> Figure:
    """A panel for each, with words that can be read at half the size."""
    seh, sa = (sculpt.load(PRETRAINED / "molecules" / name, beta=32) for name in ("seh", "sa"))
    models = {"seh: binds": seh, "sa: easy to make": sa, "seh & sa: both": seh & sa}
    figure = plots.molecule_density({name: drawn(model, 1000) for name, model in models.items()})
    figure.set_size_inches(8.4, 3.6)
    for axes in figure.axes:
        axes.set_title(axes.get_title(), fontsize=14, fontweight="bold", color=plots.INK, pad=24)
        axes.texts[0].set(fontsize=12, color=plots.INK)
        axes.tick_params(labelsize=10)
    figure.supxlabel("sEH reward: predicted binding", fontsize=12)
    figure.supylabel("SA reward: ease of synthesis", fontsize=12)
    return figure


def prompts() -> Figure:
    circle = sculpt.load(PRETRAINED / "shapes" / "model", prompt="a red circle", guidance_scale=1.0)
    square = circle.with_condition(prompt="a blue square")
    models = {'"a red circle"': circle, '"a blue square"': square}
    panels = {name: drawn(model, 12, steps=32) for name, model in models.items()}
    panels["circle & square"] = drawn(circle & square, 12, sculpt.Tracked(particles=48), steps=32)
    return larger(plots.image_panels(panels, 3, across=4))


def digits() -> Figure:
    models = [sculpt.load(PRETRAINED / "digits" / name) for name in ("cyan", "zero-one", "zero-two")]
    road = sculpt.Guided(sculpt.load(PRETRAINED / "digits" / "triple"), correct=True, particles=64)
    panels: dict[str, Any] = {str(model): drawn(model, 16, steps=24) for model in models}
    labels = {"cyan & zero-one": (1, 0), "zero-one & zero-two": (1, 2), "all three": (1, 0, 2)}
    labels |= {f"{name}, not the others": (i, i, i) for i, name in enumerate(panels)}
    captions = {name: f"labels {observed}" for name, observed in labels.items()}
    for name, observed in labels.items():
        panels[name] = plots.distinct(drawn(sculpt.posterior(models, observed), 32, road, steps=24), 16)
    return larger(plots.image_panels(panels, 3, across=8, captions=captions))


def roads() -> Figure:
    p, q, _ = discs()
    both = p & q
    panels = {
        "exact": Exact(both).density,
        "tracked densities": drawn(both, 3000, sculpt.Tracked(particles=6000), steps=128).x,
        "rejection": drawn(both, 3000, sculpt.Rejection(log_densities(both)), steps=32).x,
    }
    outlines = {"p": Exact(p).density, "q": Exact(q).density}
    return larger(plots.compare2d([{"title": "p & q", **panels}], HALF_WIDTH, list(panels), outlines=outlines))


def larger(figure: Figure) -> Figure:
    for axes in figure.axes:
        axes.title.set_fontsize(13)
    return figure


def main(*names: str) -> None:
    for draw in (molecules, prompts, digits, roads):
        if draw.__name__ in names or not names:
            picture = Image.open(io.BytesIO(plots.png(draw()))).convert("RGB")
            edges = ImageOps.invert(picture).getbbox()  # the room for captions that are not there
            ImageOps.expand(picture.crop(edges), 6, "white").quantize(96).save(
                HERE / "_static" / f"{draw.__name__}.png", optimize=True
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
