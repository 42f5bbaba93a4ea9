"""The tests."""

import gc
import sys

if "pytest" in sys.modules:
    gc.disable()  # while torch is imported, which makes millions of objects and no garbage
