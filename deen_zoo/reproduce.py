"""``python -m deen_zoo.reproduce ...`` is short for ``deen-zoo reproduce ...``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(["reproduce", *sys.argv[1:]]))
