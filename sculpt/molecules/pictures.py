"""Pictures of molecules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rdkit import Chem
from rdkit.Chem import rdDepictor
from rdkit.Chem.Draw import rdMolDraw2D

from sculpt.files import replace_file

__all__ = ["Picture", "flat", "without_gaps"]


class Picture:
    """Molecules in a grid, each above its scores. Notebooks show it; ``save`` writes .png or .svg.

    Args:
        molecules: with coordinates in the plane, see :func:`flat`.
        legends: the text under each.
        columns: molecules in a row.
        side: width and height of one molecule.
    """

    def __init__(self, molecules: Sequence[Chem.Mol], legends: Sequence[str], columns: int, side: tuple[int, int] = (300, 230)):
        self.molecules, self.legends, self.columns, self.side = list(molecules), list(legends), max(columns, 1), side

    @property
    def svg(self) -> str:
        """The picture as text."""
        return str(self._drawn(rdMolDraw2D.MolDraw2DSVG, 1))

    @property
    def png(self) -> bytes:
        """The picture in pixels, two for each unit."""
        return bytes(self._drawn(rdMolDraw2D.MolDraw2DCairo, 2))

    def save(self, path: str | Path) -> None:
        """Write a .png or an .svg, all of it or nothing."""
        path = Path(path)
        if path.suffix not in (".png", ".svg"):
            raise ValueError(f"Cannot draw {path.name}: expected a name that ends in .png or .svg.")
        replace_file(path, self.png if path.suffix == ".png" else self.svg.encode())

    def _repr_svg_(self) -> str:
        return self.svg

    def _drawn(self, canvas: type, scale: int) -> Any:
        width, height = (scale * side for side in self.side)
        rows = max(math.ceil(len(self.molecules) / self.columns), 1)
        drawing = canvas(width * self.columns, height * rows, width, height)
        options = drawing.drawOptions()
        options.bondLineWidth, options.fixedBondLength, options.padding = 1.4 * scale, 24.0 * scale, 0.06
        options.drawMolsSameScale = False
        options.minFontSize, options.maxFontSize = 10 * scale, 12 * scale
        options.legendFontSize, options.legendFraction = 13 * scale, 0.12
        options.setLegendColour((0.169, 0.129, 0.208, 1.0))  # the ink of sculpt.plots
        drawing.DrawMolecules(self.molecules, legends=self.legends)
        drawing.FinishDrawing()
        return drawing.GetDrawingText()


def without_gaps(n: int) -> int:
    """How many of n molecules stand in a row: somewhat more than in a column, and such that the last row has the fewest gaps."""
    wide = math.sqrt(1.4 * max(n, 1))
    return min(range(math.ceil(0.7 * wide), math.ceil(1.4 * wide) + 1), key=lambda k: (-n % k, abs(k - wide)))


def flat(smiles: str) -> Chem.Mol:
    """A molecule with coordinates in the plane."""
    molecule = Chem.MolFromSmiles(smiles)
    rdDepictor.Compute2DCoords(molecule)
    rdDepictor.StraightenDepiction(molecule)
    return molecule
