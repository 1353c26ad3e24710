"""moe_ops: a whole Mixture-of-Experts feed-forward block as one PyTorch operator.

Importing it registers `torch.ops.moe_ops.*`; it imports neither Triton nor anything of CUDA.
"""

__version__ = "0.1.0"

from moe_ops import env, nn
from moe_ops.api import explain, fused_moe, route, topk_route
from moe_ops.dispatch import Plan
from moe_ops.routing import Routing
from moe_ops.tuning import TileConfig

env.set_log_level()

__all__ = ["Plan", "Routing", "TileConfig", "__version__", "explain", "fused_moe", "nn", "route", "topk_route"]
