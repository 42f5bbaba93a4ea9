"""Ranking metrics, the named protocols, and reports beside the published numbers."""

from .metrics import Ranking as Ranking
from .metrics import evaluate_ranking as evaluate_ranking
