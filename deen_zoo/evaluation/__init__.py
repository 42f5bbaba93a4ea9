"""Ranking metrics, the named protocols, and reports with the published numbers."""

from .metrics import Ranking as Ranking
from .metrics import evaluate_ranking as evaluate_ranking
from .protocols import evaluate as evaluate
from .protocols import images_of as images_of
from .published import published as published
from .published import published_ablation as published_ablation
from .report import report as report
from .report import terminal_table as terminal_table
from .rerank import KReciprocal as KReciprocal
from .rerank import k_reciprocal_distance as k_reciprocal_distance
from .results import ProtocolResult as ProtocolResult
from .results import merge_trials as merge_trials
