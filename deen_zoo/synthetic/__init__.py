"""The synthetic world: drawn people seen by drawn cameras, in the layouts of the real datasets.

``world.py`` says who there is, as numbers; ``figure.py`` poses a person and ``paint.py`` paints the
parts; ``picture.py`` adds place, light and sensor; ``layouts.py`` and ``tree.py`` write datasets.
"""

from __future__ import annotations

from .layouts import LAYOUTS as LAYOUTS
from .tree import SyntheticTree as SyntheticTree
from .tree import contact_sheet as contact_sheet
from .tree import picture as picture
from .tree import synthesize as synthesize
from .world import Person as Person
