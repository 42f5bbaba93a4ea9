"""Images to descriptors, and descriptors to files."""

from typing import TYPE_CHECKING, Any

from .files import FeatureTable as FeatureTable
from .files import read_feature_table as read_feature_table
from .files import write_feature_table as write_feature_table

if TYPE_CHECKING:
    from .extractor import FeatureExtractor as FeatureExtractor

__all__ = ["FeatureExtractor", "FeatureTable", "read_feature_table", "write_feature_table"]


def __getattr__(name: str) -> Any:
    if name == "FeatureExtractor":  # with the models, which searching features does not need
        from .extractor import FeatureExtractor

        return FeatureExtractor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
