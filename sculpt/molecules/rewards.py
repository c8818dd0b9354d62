r"""What a molecule is worth: predicted binding to soluble epoxide hydrolase, ease of synthesis, drug-likeness.

Notation of the sEH proxy (Bengio et al. 2021): :math:`h_i` features of atom i, :math:`\Theta(e)` the 64×64 matrix of a bond e,
:math:`\varphi` a LeakyReLU, q and r the query and the read-out of Set2Set.
"""

from __future__ import annotations

import abc
import gzip
import hashlib
import importlib.util
import io
import math
import os
import pickle
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from rdkit import Chem, RDConfig, rdBase
from rdkit.Chem.QED import qed
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from sculpt.files import read_tensors, replace_file

__all__ = ["SEH", "SA", "QED", "Reward"]

URL = "https://raw.githubusercontent.com/GFNOrg/gflownet/master/mols/data/pretrained_proxy/best_params.pkl.gz"
SHA256 = "f76ab480b62e23dda04fd45fefe0e7ae2374b3f8c3f18fb7e00651cad05b9e1f"

Molecules = Sequence[str | Chem.Mol | None]


class Reward(abc.ABC):
    """SMILES or RDKit molecules to rewards in [0, about 1]. What is no molecule gets NaN; ``invalid`` counts those of the last call."""

    invalid: int = 0

    def __call__(self, molecules: Molecules) -> Float[Tensor, "n"]:
        return self._each(molecules, self.of)

    @abc.abstractmethod
    def of(self, molecules: list[Chem.Mol]) -> Float[Tensor, "n"]:
        """The rewards of valid molecules."""

    def _each(self, molecules: Molecules, function) -> Float[Tensor, "n"]:
        if isinstance(molecules, str | Chem.Mol):
            raise TypeError(
                f"{type(self).__name__} takes a list of molecules, got one {type(molecules).__name__}. Put it in brackets."
            )
        with rdBase.BlockLogs():
            parsed = [Chem.MolFromSmiles(x) if isinstance(x, str) else x for x in molecules]
        valid = [i for i, molecule in enumerate(parsed) if molecule is not None and molecule.GetNumAtoms()]
        self.invalid = len(parsed) - len(valid)
        out = torch.full((len(parsed),), math.nan)
        if valid:
            out[valid] = function([parsed[i] for i in valid])
        return out


class SA(Reward):
    """Ease of synthesis: (10 − SA score) / 9, with RDKit's own scorer."""

    def __init__(self):
        self.scorer = _contributed("SA_Score", "sascorer")

    def score(self, molecules: Molecules) -> Float[Tensor, "n"]:
        """The SA score itself: 1 is easy, 10 is hard."""
        return self._each(molecules, lambda valid: torch.tensor([self.scorer.calculateScore(x) for x in valid]))

    def of(self, molecules):
        return torch.tensor([(10 - self.scorer.calculateScore(x)) / 9 for x in molecules])


class QED(Reward):
    """The quantitative estimate of drug-likeness, as RDKit computes it."""

    def of(self, molecules):
        return torch.tensor([qed(x) for x in molecules])


class SEH(Reward):
    """Predicted binding to soluble epoxide hydrolase: clip(proxy, 1e-4, 100) / 8.

    Args:
        weights: a safetensors file; by default that of ``$SCULPT_DATA``, or else the public one, downloaded once.
        root: ``"published"`` applies ``conv.root`` as every published GFlowNet result does, ``"trained"`` as it was trained.
    """

    def __init__(self, weights: str | Path | None = None, *, root: str = "published", device: torch.device | str | None = None):
        if root not in ("published", "trained"):
            raise ValueError(f"Got root={root!r}, expected 'published' (as all published results) or 'trained'.")
        path = find_weights() if weights is None else Path(weights)
        if not path.is_file():
            raise ValueError(
                f"There is no file {str(path)!r} with the weights of the sEH proxy. Leave weights out to have them downloaded."
            )
        self.network = Proxy(check_weights(read_tensors(path), str(path)), root).to(device)

    def proxy(self, molecules: Molecules) -> Float[Tensor, "n"]:
        """The network's raw output."""
        return self._each(molecules, self._proxy)

    def of(self, molecules):
        return self._proxy(molecules).clamp(1e-4, 100) / 8

    @torch.no_grad()
    def _proxy(self, molecules: list[Chem.Mol], chunk: int = 256) -> Float[Tensor, "n"]:
        parts = [molecules[i : i + chunk] for i in range(0, len(molecules), chunk)]
        return torch.cat([self.network(*(t.to(self.network.device) for t in graph(part))).cpu() for part in parts])


# The network


class Proxy(nn.Module):
    r"""Twelve rounds of messages along the bonds with the same weights, then three of Set2Set.

    .. math::
        m_i = \varphi\Bigl(\operatorname{mean}_{j \to i} h_j \Theta(e_{ji}) + R h_i + b\Bigr), \qquad h_i \leftarrow \mathrm{GRU}(m_i, h_i)

    A bond is single, double, triple, aromatic or nothing, so there are five :math:`\Theta`, computed once.
    """

    def __init__(self, weights: dict[str, Tensor], root: str = "published"):
        super().__init__()
        for name, value in weights.items():
            self.register_buffer(name.replace(".", "_"), value)
        w = self._buffers
        bonds = torch.cat([torch.eye(4), torch.zeros(1, 4)])
        hidden = F.leaky_relu(F.linear(bonds, w["edge_net_0_weight"], w["edge_net_0_bias"]))
        theta = F.linear(hidden, w["edge_net_1_weight"], w["edge_net_1_bias"]).view(5, 64, 64)
        self.register_buffer("theta", theta.transpose(0, 1).reshape(64, 5 * 64).contiguous())
        self.register_buffer("R", w["conv_root"].T.contiguous() if root == "published" else w["conv_root"])

    @property
    def device(self) -> torch.device:
        return self.theta.device

    def forward(
        self,
        x: Float[Tensor, "a 71"],
        source: Int[Tensor, "e"],
        target: Int[Tensor, "e"],
        bond: Int[Tensor, "e"],
        owner: Int[Tensor, "a"],
    ) -> Float[Tensor, "n"]:
        w = self._buffers
        kinds, bond = torch.unique(bond, return_inverse=True)
        theta = self.theta.view(64, 5, 64)[:, kinds].reshape(64, -1)
        messenger = source * len(kinds) + bond
        degree = torch.bincount(target, minlength=len(x)).clamp_(min=1)[:, None].to(x.dtype)
        h = F.leaky_relu(F.linear(x, w["atom_in_weight"], w["atom_in_bias"]))
        for _ in range(12):
            messages = (h @ theta).view(-1, 64)[messenger]
            mean = torch.zeros_like(h).index_add_(0, target, messages) / degree
            m = F.leaky_relu(mean + h @ self.R + w["conv_bias"])
            h = torch.gru_cell(m, h, w["gru_weight_ih"], w["gru_weight_hh"], w["gru_bias_ih"], w["gru_bias_hh"])
        n = int(owner[-1]) + 1
        q_star, q, c = h.new_zeros(n, 128), h.new_zeros(n, 64), h.new_zeros(n, 64)
        for _ in range(3):
            q, c = torch.lstm_cell(
                q_star, (q, c), w["readout_weight_ih"], w["readout_weight_hh"], w["readout_bias_ih"], w["readout_bias_hh"]
            )
            e = (h * q[owner]).sum(-1)
            e = (e - h.new_full((n,), -math.inf).scatter_reduce_(0, owner, e, "amax")[owner]).exp()
            a = e / h.new_zeros(n).index_add_(0, owner, e)[owner]
            r = torch.zeros_like(q).index_add_(0, owner, a[:, None] * h)
            q_star = torch.cat([q, r], dim=-1)
        return F.linear(q_star, w["out_weight"], w["out_bias"])[:, 0]


_ELEMENT = {1: 0, 6: 1, 7: 2, 8: 3, 9: 4}
_ORBITALS = {Chem.HybridizationType.SP: 10, Chem.HybridizationType.SP2: 11, Chem.HybridizationType.SP3: 12}
_BOND = {
    Chem.BondType.UNSPECIFIED: 0,
    Chem.BondType.SINGLE: 0,
    Chem.BondType.DOUBLE: 1,
    Chem.BondType.TRIPLE: 2,
    Chem.BondType.AROMATIC: 3,
}


def graph(molecules: list[Chem.Mol]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All molecules as one graph: atom features, the directed bonds' sources, targets and kinds, and each atom's molecule."""
    on: list[tuple[int, int]] = []
    hydrogens, owner, source, target, bonds = [], [], [], [], []
    for i, molecule in enumerate(molecules):
        first = len(owner)
        for a, atom in enumerate(molecule.GetAtoms(), first):
            Z = atom.GetAtomicNum()
            if not 0 < Z <= 56:
                raise ValueError(
                    f"The sEH proxy knows the elements up to barium (56), got {atom.GetSymbol()} ({Z}) in {Chem.MolToSmiles(molecule)!r}. "
                    "Leave this molecule out."
                )
            on += [(a, _ELEMENT.get(Z, 5)), (a, 13 + Z)]
            if atom.GetIsAromatic():
                on.append((a, 9))
            if (column := _ORBITALS.get(atom.GetHybridization())) is not None:
                on.append((a, column))
            hydrogens.append(atom.GetTotalNumHs(includeNeighbors=True))
            owner.append(i)
        for bond in molecule.GetBonds():
            if (kind := _BOND.get(bond.GetBondType())) is None:
                raise ValueError(
                    f"The sEH proxy knows single, double, triple and aromatic bonds, got {bond.GetBondType()} in "
                    f"{Chem.MolToSmiles(molecule)!r}. Leave this molecule out."
                )
            p, q = first + bond.GetBeginAtomIdx(), first + bond.GetEndAtomIdx()
            source += (p, q)
            target += (q, p)
            bonds += (kind, kind)
        if not molecule.GetNumBonds():  # the published features give such a molecule one empty bond to itself
            source.append(first)
            target.append(first)
            bonds.append(4)
    x = torch.zeros(len(owner), 71)
    x[tuple(torch.tensor(on).T)] = 1.0
    x[:, 13] = torch.tensor(hydrogens, dtype=torch.float32)
    return x, *(torch.tensor(column) for column in (source, target, bonds, owner))


# Its weights

# Place in the public list -> name and shape. Places 12 to 15 belong to a layer that is not used.
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


def find_weights() -> Path:
    """``$SCULPT_DATA/molecules``, or the cache, filled by a download when it is first needed."""
    if data := os.environ.get("SCULPT_DATA"):
        path = Path(data) / "molecules" / "seh_proxy.safetensors"
        if path.is_file():
            return path
    path = cache() / "seh_proxy.safetensors"
    if not path.is_file():
        download(path, URL, SHA256)
    return path


def cache() -> Path:
    """``$SCULPT_CACHE``, by default the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SCULPT_CACHE") or Path(base) / "sculpt")


def download(path: Path, url: str, sha256: str, limit: int = 2**24) -> None:
    """Fetch the public weights, check that they are what was published, and keep them as safetensors: all of it or nothing."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            content = answer.read(limit)
    except OSError as error:  # no network, no such file, a time-out: urllib's errors are OSErrors
        raise ValueError(
            f"The weights of the sEH proxy are not here and cannot be downloaded from {url} ({error}). Go online once, pass "
            "SEH(weights=path), or set SCULPT_DATA to a folder with molecules/seh_proxy.safetensors."
        ) from None
    if (got := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(
            f"{url} is not the published file: sha256 {got}, expected {sha256}. It was not opened. Try again, or pass SEH(weights=path)."
        )
    arrays = _Arrays(io.BytesIO(gzip.decompress(content))).load()
    weights = {name: torch.from_numpy(np.array(arrays[i], dtype=np.float32)) for i, (name, _) in _ARRAYS.items()}
    replace_file(path, save(check_weights(weights, url)))


class _Arrays(pickle.Unpickler):
    """A pickle that may hold plain arrays and nothing else."""

    def find_class(self, module, name):
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np.ndarray.__reduce__(np.empty(0))[0]  # numpy moved it; this finds it in all versions
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"The file asks for {module}.{name}, and weights are plain arrays: not loaded.")


def check_weights(weights: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    expected = dict(_ARRAYS.values())
    got = {name: tuple(value.shape) for name, value in weights.items()}
    for name in sorted(expected.keys() | got.keys()):
        if got.get(name) != expected.get(name):
            raise ValueError(
                f"{where} does not hold the sEH proxy: {name} is {got.get(name, 'missing')}, expected {expected.get(name, 'no such array')}. "
                "Leave weights out to have the published file downloaded."
            )
    return {name: value.float() for name, value in weights.items()}


def _contributed(folder: str, module: str):
    """A script that RDKit ships beside its package."""
    path = Path(RDConfig.RDContribDir) / folder / f"{module}.py"
    if not path.is_file():
        raise ValueError(f"This RDKit has no Contrib/{folder} ({path}). Install the wheel from PyPI: pip install rdkit.")
    spec = importlib.util.spec_from_file_location(module, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found
