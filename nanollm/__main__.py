"""`python -m nanollm` is the command `nanollm`."""

import sys

from nanollm.cli import main

if __name__ == "__main__":
    sys.exit(main())
