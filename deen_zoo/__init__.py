"""deen_zoo: visible-infrared person re-identification with DEEN (CVPR 2023).

Importing it registers the models with timm; everything else is loaded when first used.
"""

from __future__ import annotations

__version__ = "0.1.0"
