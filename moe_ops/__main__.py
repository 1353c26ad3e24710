"""`python -m moe_ops`."""

import sys

from moe_ops.cli import main

sys.exit(main())
