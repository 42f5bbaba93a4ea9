"""Images to descriptors, and descriptors to files."""

from .extractor import FeatureExtractor as FeatureExtractor
from .files import FeatureTable as FeatureTable
from .files import read_feature_table as read_feature_table
from .files import write_feature_table as write_feature_table
