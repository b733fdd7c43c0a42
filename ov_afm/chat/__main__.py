"""`python -m ov_afm.chat`."""

import sys

from ov_afm.chat import main

if __name__ == "__main__":
    sys.exit(main())
