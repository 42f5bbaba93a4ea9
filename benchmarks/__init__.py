"""This package beside the reference, in turns, on the same inputs: speed, memory, agreement."""

from .rows import WORKS, Row, benchmark, environment, table
from .scaling import Curves, draw_curves, measure_curves

__all__ = [
    "WORKS", "Curves", "Row", "benchmark", "draw_curves", "environment", "measure_curves", "table",
]  # fmt: skip
