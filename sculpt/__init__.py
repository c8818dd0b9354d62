"""sculpt: compose pretrained diffusion models, GFlowNets and other samplers when you sample from them.

.. code-block:: python

    import sculpt

    p, q = sculpt.load("pretrained/grid/circle1"), sculpt.load("pretrained/grid/circle2")
    samples = (p & q).sample(1000)                   # likely under both, without any training; p | q: either; p - q: p and not q
    print(samples.diagnostics)                       # the last line says how far to trust them

    classifier = sculpt.fit([p, q])                  # once for a set of models; it guides all of their compositions
    samples = (p - q).sample(1000, classifier)
    samples.save("only-p.safetensors")

What follows lists every class with all of its methods. These are the names to begin with, and ``help(sculpt.fit)`` and the like tell of each:

=================================  ==========================================================================
load, Diffusion, GFlowNet, Tokens  base models: a checkpoint, any pipeline of diffusers, a policy, a language model
Tracked, Guided, Rejection         roads: how a composition is sampled, without a classifier, with one, or exactly
fit, overlap                       the classifier; how much base models have in common
Factor                             a reward or a constraint that multiplies a model
distill                            a composition as a checkpoint of its own
=================================  ==========================================================================

Guides by task are in ``.docs/guides`` of the repository; ``make docs`` there builds the site.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

from sculpt.contents import VERSION as __version__

# Public name -> the module that has it. The stub is the table of contents; what it names is imported when it is first used.
_CONTENTS = {
    alias.name: node.module
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
__all__ = [*_CONTENTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _CONTENTS:
        raise AttributeError(f"sculpt has no {name!r}; its public names are {', '.join(_CONTENTS)}.")
    module = importlib.import_module(_CONTENTS[name])
    return getattr(module, name, None) or importlib.import_module(f"{module.__name__}.{name}")


def __dir__() -> list[str]:
    return sorted(__all__)
