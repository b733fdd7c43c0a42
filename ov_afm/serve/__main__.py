"""`python -m ov_afm.serve`."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
