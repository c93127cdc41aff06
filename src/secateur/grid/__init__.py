"""Grids of prunings on equal terms: `compare` sets methods against each other, `ablate` one method's choices."""

from secateur.grid.ablate import Ablation, ablate
from secateur.grid.cells import Calibration, Cell
from secateur.grid.compare import Comparison, compare
from secateur.grid.run import Grid
from secateur.judge.judging import Judging

__all__ = ["Ablation", "Calibration", "Cell", "Comparison", "Grid", "Judging", "ablate", "compare"]
