"""The reward of predicted binding to soluble epoxide hydrolase, and the public weights of its network."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import urllib.request
import warnings
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from rdkit import Chem
from safetensors.torch import save
from torch import Tensor

from sculpt.entries import read_json
from sculpt.files import cache, load_folder, replace_file
from sculpt.molecules.proxy import Proxy, graph
from sculpt.molecules.rewards import MoleculesLike, Reward
from sculpt.weights import read_tensors

__all__ = ["SEH", "STUDENT"]

URL = "https://raw.githubusercontent.com/GFNOrg/gflownet/master/mols/data/pretrained_proxy/best_params.pkl.gz"
SHA256 = "f76ab480b62e23dda04fd45fefe0e7ae2374b3f8c3f18fb7e00651cad05b9e1f"
STUDENT = Path(__file__).with_name("seh_student")


class SEH(Reward):
    """Predicted binding to soluble epoxide hydrolase: clip(proxy, 1e-4, 100) / 8.

    Args:
        weights: a safetensors file; by default the one in the cache or in ``$SCULPT_DATA``, else the public one, downloaded once.
            Where it cannot be downloaded, sculpt's own student of the proxy takes over, with a warning that says how good it is.
        root: ``"published"`` applies ``conv.root`` as every published GFlowNet result does, ``"trained"`` as the network was trained.
        device: where the network runs.
        strict: raise where a molecule has no value, as one with another bond or element than the network was made for.

    Example:
        >>> float(sculpt.molecules.SEH()(["CC(=O)Oc1ccccc1C(=O)O"])[0]) > 0
        True
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        root: str = "published",
        device: torch.device | str | None = None,
        strict: bool = False,
    ):
        self.strict = strict
        if root not in ("published", "trained"):
            raise ValueError(f"Got root={root!r}, expected 'published' (as in all published results) or 'trained'.")
        self.path = find_weights(root) if weights is None else Path(weights)
        if (self.path / "config.json").is_file():
            if root != "published":
                raise ValueError(
                    f"{self.path} holds a student of the published values only, got root={root!r}. Leave root out."
                )
            config, arrays = load_folder(self.path, "seh_student")
            self.network = Proxy(arrays, "trained", config.whole("rounds", 1, 100)).to(device)
        elif self.path.is_file():
            self.network = Proxy(check_weights(read_tensors(self.path), str(self.path)), root).to(device)
        else:
            raise ValueError(
                f"There is no file {str(self.path)!r} with the weights of the sEH proxy. Leave weights out to have them downloaded."
            )

    def proxy(self, molecules: MoleculesLike) -> Float[Tensor, "n"]:
        """The network's raw output."""
        return self._told(molecules, self._proxy)

    def of(self, molecules: list[Chem.Mol]) -> Float[Tensor, "n"]:
        return self._proxy(molecules).clamp(1e-4, 100) / 8

    @torch.no_grad()
    def _proxy(self, molecules: list[Chem.Mol], chunk: int = 128) -> Float[Tensor, "n"]:
        parts = [molecules[i : i + chunk] for i in range(0, len(molecules), chunk)]
        return torch.cat([self.network(*(t.to(self.network.device) for t in graph(part))).cpu() for part in parts])


# Place in the public list -> name and shape. The layer of places 12 to 15 is not used.
_ARRAYS = {
    0: ("atom_in.weight", (64, 71)),
    1: ("atom_in.bias", (64,)),
    2: ("conv.root", (64, 64)),
    3: ("conv.bias", (64,)),
    4: ("edge_net.0.weight", (128, 4)),
    5: ("edge_net.0.bias", (128,)),
    6: ("edge_net.1.weight", (4096, 128)),
    7: ("edge_net.1.bias", (4096,)),
    8: ("gru.weight_ih", (192, 64)),
    9: ("gru.weight_hh", (192, 64)),
    10: ("gru.bias_ih", (192,)),
    11: ("gru.bias_hh", (192,)),
    16: ("readout.weight_ih", (256, 128)),
    17: ("readout.weight_hh", (256, 64)),
    18: ("readout.bias_ih", (256,)),
    19: ("readout.bias_hh", (256,)),
    20: ("out.weight", (1, 128)),
    21: ("out.bias", (1,)),
}


def kept_weights() -> Path | None:
    """The file in the cache or in ``$SCULPT_DATA``, if it is there."""
    folders = cache(), Path(os.environ.get("SCULPT_DATA") or "missing") / "molecules"
    return next((path for folder in folders if (path := folder / "seh_proxy.safetensors").is_file()), None)


def find_weights(root: str = "published") -> Path:
    """The weights that are here, or else downloaded to the cache; offline the folder of the student."""
    if (path := kept_weights()) is not None:
        return path
    kept = cache() / "seh_proxy.safetensors"
    try:
        download(kept, URL, SHA256)
    except Offline as error:
        if root != "published":  # the student knows the published values only
            raise
        quality = read_json(STUDENT / "config.json", "student of the sEH proxy")
        warnings.warn(
            f"{error} Until then sculpt's own student of the proxy takes over: on generated molecules it is off by "
            f"{quality['reward_mae']:.3f} of the reward on average and ranks them much as the proxy does (Spearman {quality['spearman']:.3f}). "
            "Its values are not the published ones.",
            stacklevel=3,
        )
        return STUDENT
    return kept


class Offline(ValueError):
    """The public weights cannot be reached."""


def download(path: Path, url: str, sha256: str, limit: int = 2**24) -> None:
    """Fetch the public weights, check that they are what was published, and keep them as safetensors: all of it or nothing."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            content = answer.read(limit)
    except (OSError, HTTPException) as error:  # no network, no such file, a time-out, an answer that is cut short
        raise Offline(
            f"The weights of the sEH proxy are not here and cannot be downloaded from {url} ({error}). Go online once, pass "
            "SEH(weights=path), or set SCULPT_DATA to a folder with molecules/seh_proxy.safetensors."
        ) from None
    if (got := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(
            f"{url} is not the published file: got sha256 {got}, expected {sha256}. It was not opened. Try again, or pass SEH(weights=path)."
        )
    arrays = _Arrays(io.BytesIO(gzip.decompress(content))).load()
    weights = {name: torch.from_numpy(np.array(arrays[i], dtype=np.float32)) for i, (name, _) in _ARRAYS.items()}
    replace_file(path, save(check_weights(weights, url)))


class _Arrays(pickle.Unpickler):
    """A pickle that may hold plain arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np.ndarray.__reduce__(np.empty(0))[0]  # numpy moved it; this finds it in all versions
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"The file asks for {module}.{name}, and weights are plain arrays: not loaded.")


def check_weights(weights: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The arrays of the proxy in single precision; raise where these are other ones."""
    expected = dict(_ARRAYS.values())
    got = {name: tuple(value.shape) for name, value in weights.items()}
    for name in sorted(expected.keys() | got.keys()):
        if got.get(name) != expected.get(name):
            raise ValueError(
                f"{where} does not hold the sEH proxy: {name} is {got.get(name, 'missing')}, expected {expected.get(name, 'no such array')}. "
                "Leave weights out to have the published file downloaded."
            )
    return {name: value.float() for name, value in weights.items()}
