"""What every test of the op under torch.compile needs, before torch reads it."""

import os

# A warm cache knows an op by its name alone and would hide a change of its schema.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
