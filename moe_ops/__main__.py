"""`python -m moe_ops`."""

import sys

from moe_ops.cli import main

# A worker of `tune` imports this module again, under another name.
if __name__ == "__main__":
    sys.exit(main())
