"""What holds for every test: one thread each, no network, no state left behind."""

import os
import sys

# Before torch is imported. Must not import sculpt here: the type checker of the tests hooks into its import.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import jaxtyping
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def unchecked():
    """Without the tests' type checker, which would answer first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def rewards_of_its_own():
    """Scores are kept for the process: a test without the proxy's weights would leave their stand-in to the next ones."""
    yield
    if scores := sys.modules.get("sculpt.molecules.scores"):
        scores._reward.cache_clear()
