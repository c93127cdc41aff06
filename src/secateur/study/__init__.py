"""Grids of prunings on equal terms: `compare` sets methods against each other, `ablate` one method's choices."""

from secateur.evaluation.judging import Judging
from secateur.study.ablate import Ablation, ablate
from secateur.study.cells import Calibration, Cell
from secateur.study.compare import Comparison, compare
from secateur.study.engine import Grid

__all__ = ["Ablation", "Calibration", "Cell", "Comparison", "Grid", "Judging", "ablate", "compare"]
