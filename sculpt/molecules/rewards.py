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
import warnings
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from rdkit import Chem, RDConfig, rdBase
from rdkit.Chem.QED import qed
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from sculpt.files import load_folder, read_json, read_tensors, replace_file

__all__ = ["SEH", "SA", "QED", "Reward"]

URL = "https://raw.githubusercontent.com/GFNOrg/gflownet/master/mols/data/pretrained_proxy/best_params.pkl.gz"
SHA256 = "f76ab480b62e23dda04fd45fefe0e7ae2374b3f8c3f18fb7e00651cad05b9e1f"
STUDENT = Path(__file__).with_name("seh_student")  # also pretrained/molecules/seh_student

Molecules = Sequence[str | Chem.Mol | None]


class Reward(abc.ABC):
    """SMILES or RDKit molecules to rewards in [0, about 1].

    What is no molecule gets NaN and a warning, and ``invalid`` counts those of the last call.
    """

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
        valid = [i for i, molecule in enumerate(parsed) if isinstance(molecule, Chem.Mol) and molecule.GetNumAtoms()]
        for i in valid:
            if parsed[i].NeedsUpdatePropertyCache():
                raise ValueError(f"Molecule {i} was not sanitised. Call Chem.SanitizeMol on it, or pass its SMILES.")
        self.invalid = len(parsed) - len(valid)
        if self.invalid:
            i = min(set(range(len(parsed))) - set(valid))
            warnings.warn(
                f"{self.invalid} of {len(parsed)} are no molecules and get NaN, number {i} first: {molecules[i]!r}",
                stacklevel=3,
            )
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
        weights: a safetensors file; by default that of the cache or of ``$SCULPT_DATA``, or else the public one, downloaded once.
            Where that is impossible sculpt's own student of the proxy takes over, with a warning that says how good it is.
        root: ``"published"`` applies ``conv.root`` as every published GFlowNet result does, ``"trained"`` as it was trained.
    """

    def __init__(self, weights: str | Path | None = None, *, root: str = "published", device: torch.device | str | None = None):
        if root not in ("published", "trained"):
            raise ValueError(f"Got root={root!r}, expected 'published' (as all published results) or 'trained'.")
        self.path = find_weights(root) if weights is None else Path(weights)
        if (self.path / "config.json").is_file():
            if root != "published":
                raise ValueError(
                    f"{self.path} holds a student of the published values only, got root={root!r}. Leave root out."
                )
            config, arrays = load_folder(self.path, "seh_student")
            self.network = Proxy(arrays, "trained", config["rounds"]).to(device)
        elif self.path.is_file():
            self.network = Proxy(check_weights(read_tensors(self.path), str(self.path)), root).to(device)
        else:
            raise ValueError(
                f"There is no file {str(self.path)!r} with the weights of the sEH proxy. Leave weights out to have them downloaded."
            )

    def proxy(self, molecules: Molecules) -> Float[Tensor, "n"]:
        """The network's raw output."""
        return self._each(molecules, self._proxy)

    def of(self, molecules):
        return self._proxy(molecules).clamp(1e-4, 100) / 8

    @torch.no_grad()
    def _proxy(self, molecules: list[Chem.Mol], chunk: int = 128) -> Float[Tensor, "n"]:
        parts = [molecules[i : i + chunk] for i in range(0, len(molecules), chunk)]
        return torch.cat([self.network(*(t.to(self.network.device) for t in graph(part))).cpu() for part in parts])


# The network


class Proxy(nn.Module):
    r"""Twelve rounds of messages along the bonds with the same weights, then three of Set2Set.

    .. math::
        m_i = \varphi\Bigl(\operatorname{mean}_{j \to i} h_j \Theta(e_{ji}) + R h_i + b\Bigr), \qquad h_i \leftarrow \mathrm{GRU}(m_i, h_i)

    A bond is single, double, triple, aromatic or nothing, so there are five :math:`\Theta`, computed once. The weights say how wide
    it is; gradients reach them.
    """

    def __init__(self, weights: dict[str, Tensor], root: str = "published", rounds: int = 12):
        super().__init__()
        for name, value in weights.items():
            self.register_buffer(name.replace(".", "_"), value)
        w, self.rounds, self.width = self._buffers, rounds, len(weights["conv.bias"])
        bonds = torch.cat([torch.eye(4), torch.zeros(1, 4)])
        hidden = F.leaky_relu(F.linear(bonds, w["edge_net_0_weight"], w["edge_net_0_bias"]))
        theta = F.linear(hidden, w["edge_net_1_weight"], w["edge_net_1_bias"])
        self.register_buffer("theta", theta.view(5, self.width, self.width))
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
        *_, h = self.states(x, source, target, bond)
        return self.read(h, owner)

    def states(
        self, x: Float[Tensor, "a 71"], source: Int[Tensor, "e"], target: Int[Tensor, "e"], bond: Int[Tensor, "e"]
    ) -> Iterator[Float[Tensor, "a d"]]:
        """h after each round."""
        w = self._buffers
        # An atom sends the same along all its bonds of one kind: one product for each such pair, those of one kind together.
        pairs, message = torch.unique(bond * len(x) + source, return_inverse=True)
        sender, sizes = pairs % len(x), torch.bincount(pairs // len(x), minlength=5).tolist()
        degree = torch.bincount(target, minlength=len(x)).clamp(min=1)[:, None].to(x.dtype)
        h = F.leaky_relu(F.linear(x, w["atom_in_weight"], w["atom_in_bias"]))
        for _ in range(self.rounds):
            messages = torch.cat(
                [part @ theta for part, theta in zip(h.index_select(0, sender).split(sizes), self.theta, strict=True)]
            )
            mean = torch.zeros_like(h).index_add(0, target, messages.index_select(0, message)) / degree
            m = F.leaky_relu(mean + torch.addmm(w["conv_bias"], h, self.R))
            h = torch.gru_cell(m, h, w["gru_weight_ih"], w["gru_weight_hh"], w["gru_bias_ih"], w["gru_bias_hh"])
            yield h

    def read(self, h: Float[Tensor, "a d"], owner: Int[Tensor, "a"]) -> Float[Tensor, "n"]:
        """Set2Set over the atoms of each molecule."""
        w, n, d = self._buffers, int(owner[-1]) + 1, self.width
        q_star, q, c = h.new_zeros(n, 2 * d), h.new_zeros(n, d), h.new_zeros(n, d)
        for _ in range(3):
            q, c = torch.lstm_cell(
                q_star, (q, c), w["readout_weight_ih"], w["readout_weight_hh"], w["readout_bias_ih"], w["readout_bias_hh"]
            )
            e = (h * q[owner]).sum(-1)
            highest = h.new_full((n,), -math.inf).scatter_reduce(0, owner, e.detach(), "amax")
            e = (e - highest[owner]).exp()
            a = e / h.new_zeros(n).index_add(0, owner, e)[owner]
            r = torch.zeros_like(q).index_add(0, owner, a[:, None] * h)
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
    kinds: dict[tuple, int] = {}  # there are few kinds of atoms among many
    atoms, sizes, source, target, bonds = [], [], [], [], []
    for molecule in molecules:
        first, n = len(atoms), molecule.GetNumAtoms()
        # By index: RDKit's iterators take twice as long.
        for atom in map(molecule.GetAtomWithIdx, range(n)):
            kind = (atom.GetAtomicNum(), atom.GetIsAromatic(), atom.GetHybridization(), atom.GetTotalNumHs(True))
            if kind not in kinds:
                if not 0 < kind[0] <= 56:
                    raise ValueError(
                        f"The sEH proxy knows the elements up to barium (56), got {atom.GetSymbol()} ({kind[0]}) in "
                        f"{Chem.MolToSmiles(molecule)!r}. Leave this molecule out."
                    )
                kinds[kind] = len(kinds)
            atoms.append(kinds[kind])
        sizes.append(n)
        for bond in map(molecule.GetBondWithIdx, range(molecule.GetNumBonds())):
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
    x = torch.stack([_features(*kind) for kind in kinds])[torch.tensor(atoms)]
    owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return x, *(torch.tensor(column) for column in (source, target, bonds)), owner


def _features(Z: int, aromatic: bool, orbitals: Chem.HybridizationType, hydrogens: int) -> Float[Tensor, "71"]:
    x = torch.zeros(71)
    x[[_ELEMENT.get(Z, 5), 13 + Z]] = 1.0
    x[9], x[13] = aromatic, hydrogens
    if orbitals in _ORBITALS:
        x[_ORBITALS[orbitals]] = 1.0
    return x


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


def find_weights(root: str = "published") -> Path:
    """In the cache or in ``$SCULPT_DATA``; else downloaded to the cache; offline the folder of the student."""
    kept = cache() / "seh_proxy.safetensors"
    for path in (kept, Path(os.environ.get("SCULPT_DATA") or "missing") / "molecules" / "seh_proxy.safetensors"):
        if path.is_file():
            return path
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


def cache() -> Path:
    """``$SCULPT_CACHE``, by default the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SCULPT_CACHE") or Path(base) / "sculpt")


def download(path: Path, url: str, sha256: str, limit: int = 2**24) -> None:
    """Fetch the public weights, check that they are what was published, and keep them as safetensors: all of it or nothing."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            content = answer.read(limit)
    except (OSError, HTTPException) as error:  # no network, no such file, a time-out, an answer cut short
        raise Offline(
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
