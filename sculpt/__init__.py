"""sculpt: compose pretrained diffusion models and GFlowNets when you sample from them."""

import importlib

__version__ = "0.1.0"

# The table of contents: public name -> the module that has it, imported when it is first used.
_CONTENTS = {
    # base models
    "load": "hub",
    "Diffusion": "diffusion.model",
    "EnergyModel": "diffusion.model",
    "GFlowNet": "gflownet.model",
    # compositions
    "mixture": "composition",
    "harmonic_mean": "composition",
    "contrast": "composition",
    "posterior": "composition",
    "product": "composition",
    "power_mean": "composition",
    "reject": "rejection",
    # MCMC at every noise level, for tracked densities
    "ULA": "diffusion.mcmc",
    "MALA": "diffusion.mcmc",
    "HMC": "diffusion.mcmc",
    # the classifier
    "fit": "training",
    "Classifier": "classifier",
    # looking at them
    "overlap": "diagnostics",
    "explore": "explorer",
    "Samples": "particles",
}
_MODULES = ("exact",)

__all__ = [*_CONTENTS, *_MODULES]


def __getattr__(name: str):
    if name in _CONTENTS:
        return getattr(importlib.import_module(f"sculpt.{_CONTENTS[name]}"), name)
    if name == "exact":
        return importlib.import_module("sculpt.gflownet.exact")
    raise AttributeError(f"sculpt has no {name!r}; its public names are {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
