// The CUDA kernel of `fused_moe_tma`: launches what a table, made by `python -m moe_ops aot`, has for a call.
#pragma once

#include "checks.h"

namespace moe_ops {

// Returns a new tensor. The tables are those of the folder that the environment variable MOE_OPS_AOT names.
Tensor fused_moe_cuda(const Arguments& args);

}  // namespace moe_ops
