"""Groups that fall apart in water or in air, or that nobody can make: what trees of fragments write and no chemist accepts."""

from __future__ import annotations

__all__ = ["UNSTABLE"]

UNSTABLE = {
    # carbon beside too much
    "ynol ether, ynamine, haloalkyne": "[CX2]#[CX2]-[O,S,N,F,Cl,Br,I]",
    "acyl halide": "[CX3](=[O,S,N])[F,Cl,Br,I]",
    "halogen beside oxygen or nitrogen": "[CX4;!$(C(F)F)]([F,Cl,Br,I])[O,N,S]",
    "hemiacetal, hemiaminal": "[CX4]([OX2H1])[OX2,NX3,SX2]",
    "acyclic aminal": "[CX4;!R]([NX3;!$(N[C,S]=[O,S,N])])[NX3,OX2;!$(N[C,S]=[O,S,N])]",
    "enol, enol ether": "[CX3;!R]=[CX3]-[OX2]",
    "enamine": "[CX3;!R]=[CX3;!$(C=O)]-[NX3;!$(N[C,S]=O)]",
    "cumulene, ketene, isocyanate": "[C,N]=[C]=[C,N,O,S]",
    "carbamic or carbonic acid": "[O,N,S][CX3](=O)[OX2H1]",
    "anhydride": "[CX3](=O)[O,S][CX3]=O",
    "aldehyde": "[CX3H1](=O)[#6]",
    "acyclic imine": "[CX3;!R;!$(C[N,O,S])]=[NX2;!R;!$(N[N,O,S])]",
    "cyanate, thiocyanate, cyanamide": "[O,S,N;!$(NC=O);!$(NS=O)]-[CX2]#[NX1]",
    # hetero atoms beside each other
    "oxime": "[CX3]=[NX2;!R]-[OX2]",
    "peroxide": "[OX2]-[OX2]",
    "hydroxylamine": "[NX3;!R;!$(NC=O)]-[OX2]",
    "hydrazine": "[NX3;!R;!$(NC=O);!$(NS=O)]-[NX3;!R]",
    "disulfide, sulfenamide, sulfenate": "[SX2]-[SX2,NX3,OX2;!R]",
    "halogen on oxygen, nitrogen or sulphur": "[O,N,S]-[F,Cl,Br,I]",
    "nitramine, nitrate": "[N,O;!$(N=*);!n]-[N+](=O)[O-]",
    "sulphur with a hydrogen": "[SX3,SX4;!H0]",
}
"""Name of a group -> SMARTS."""
