// The CPU kernel of `fused_moe_tma` for weights that are not quantised.
#pragma once

#include "checks.h"

namespace moe_ops {

// Returns a new tensor of `problem.out_shape()` and `problem.out_dtype`.
Tensor fused_moe(const Arguments& args, const Problem& problem);

}  // namespace moe_ops
