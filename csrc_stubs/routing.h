// Which expert each route goes to, and the routes sorted by expert. Route r = m * top_k + k of R = M * top_k.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"

namespace moe_ops {

// Routes sorted by expert, in the order of their numbers within one.
struct GroupedRoutes {
  std::vector<int32_t> sorted;    // the kept routes
  std::vector<int32_t> position;  // [R]: where in `sorted` a route is, -1 if it is dropped
  std::vector<int64_t> offsets;   // [E + 1]: expert e has sorted[offsets[e]] .. sorted[offsets[e + 1] - 1]
};

GroupedRoutes group_routes(const Tensor& topk_ids, int64_t num_experts, const std::optional<Tensor>& expert_map);

// `moe_ops::route`: sorted_routes, tile_experts, num_padded, inverse.
std::tuple<Tensor, Tensor, Tensor, Tensor> route(const Tensor& topk_ids, int64_t num_experts, int64_t block,
                                                 const std::optional<Tensor>& expert_map);

}  // namespace moe_ops
