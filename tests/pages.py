"""The code on pages, run as it is written: the README and the guides of the site."""

import os
import re
import textwrap
from functools import partial
from pathlib import Path

import sculpt

ROOT = Path(__file__).parent.parent
GUIDES = [*sorted((ROOT / ".docs").glob("*.md")), *sorted((ROOT / ".docs/guides").glob("*"))]


def blocks(path: Path) -> list[str]:
    """The Python blocks of a page in Markdown or reStructuredText."""
    text = path.read_text()
    if path.suffix == ".rst":
        found = re.findall(r"^\.\. code-block:: python\n\n((?:    .*\n|\n)+)", text, re.MULTILINE)
        return [textwrap.dedent(block) for block in found]
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def at_hand(folder: Path, monkeypatch) -> None:
    """Make what pages speak of: tiny random networks for a reader's checkpoints, a short training and a small library."""
    from checkpoints import save_pipeline

    for seed, name in enumerate(("cats", "outdoors")):
        save_pipeline(folder / name, seed, in_channels=3, out_channels=3)
    os.symlink(ROOT / "pretrained", folder / "pretrained")
    monkeypatch.chdir(folder)
    short = {"steps": 3, "batch_size": 4, "samples": 20, "sample_steps": 3, "progress": False}
    monkeypatch.setitem(vars(sculpt), "fit", partial(sculpt.fit, **short))
    generate, distill = sculpt.generate, sculpt.distill
    monkeypatch.setitem(
        vars(sculpt), "generate", lambda model, n, *rest, **options: generate(model, n // 50_000, *rest, **options)
    )
    brief = {"steps": 20, "samples": 64, "draws": 64, "progress": False}
    monkeypatch.setitem(vars(sculpt), "distill", lambda composition, **options: distill(composition, **(options | brief)))


def run(path: Path) -> dict:
    """Run the blocks of a page from top to bottom, in a module of its own: classes in it are looked up by name."""
    scope: dict = {"__name__": path.stem}
    for block in blocks(path):
        exec(compile(block, path.name, "exec"), scope)
    return scope
