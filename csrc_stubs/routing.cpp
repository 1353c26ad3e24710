#include "routing.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>

namespace moe_ops {
namespace {

constexpr int32_t kDropped = -1;

// Ids are compared in 64 bits: narrowed first, 2^32 + 1 would be expert 1.
template <typename Index>
std::vector<int32_t> local_experts(const Tensor& topk_ids, int64_t num_experts, const std::optional<Tensor>& map) {
  const bool mapped = map.has_value() && map->defined();
  const auto* map_data = mapped ? static_cast<const int32_t*>(map->const_data_ptr()) : nullptr;
  const int64_t map_size = mapped ? map->size(0) : 0, map_stride = mapped ? map->stride(0) : 0;
  const auto* ids = static_cast<const Index*>(topk_ids.const_data_ptr());
  const int64_t tokens = topk_ids.size(0), top_k = topk_ids.size(1);
  const int64_t token_stride = topk_ids.stride(0), k_stride = topk_ids.stride(1);
  std::vector<int32_t> experts(tokens * top_k, kDropped);
  for (int64_t m = 0; m < tokens; ++m) {
    for (int64_t k = 0; k < top_k; ++k) {
      int64_t id = ids[m * token_stride + k * k_stride];
      if (mapped) id = id >= 0 && id < map_size ? map_data[id * map_stride] : kDropped;
      if (id >= 0 && id < num_experts) experts[m * top_k + k] = static_cast<int32_t>(id);
    }
  }
  return experts;
}

Tensor new_int32(const Tensor& like, int64_t size) {
  return torch::stable::new_empty(like, {size}, ScalarType::Int);
}

}  // namespace

GroupedRoutes group_routes(const Tensor& topk_ids, int64_t num_experts, const std::optional<Tensor>& expert_map) {
  const std::vector<int32_t> experts = topk_ids.scalar_type() == ScalarType::Int
                                           ? local_experts<int32_t>(topk_ids, num_experts, expert_map)
                                           : local_experts<int64_t>(topk_ids, num_experts, expert_map);
  GroupedRoutes routes;
  routes.offsets.assign(num_experts + 1, 0);
  for (const int32_t expert : experts) {
    if (expert != kDropped) ++routes.offsets[expert + 1];
  }
  std::partial_sum(routes.offsets.begin(), routes.offsets.end(), routes.offsets.begin());
  routes.sorted.resize(routes.offsets.back());
  routes.position.assign(experts.size(), kDropped);
  std::vector<int64_t> next(routes.offsets.begin(), routes.offsets.end() - 1);
  for (size_t route = 0; route < experts.size(); ++route) {
    if (experts[route] == kDropped) continue;
    const int64_t position = next[experts[route]]++;
    routes.sorted[position] = static_cast<int32_t>(route);
    routes.position[route] = static_cast<int32_t>(position);
  }
  return routes;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> route(const Tensor& topk_ids, int64_t num_experts, int64_t block,
                                                 const std::optional<Tensor>& expert_map) {
  check_route(topk_ids, num_experts, block, expert_map);
  const GroupedRoutes routes = group_routes(topk_ids, num_experts, expert_map);
  const auto num_routes = static_cast<int64_t>(routes.position.size());
  // Every expert that has routes may add all but one row of padding.
  const int64_t max_tiles = (num_routes + std::min(num_routes, num_experts) * (block - 1)) / block;
  Tensor sorted_routes = new_int32(topk_ids, max_tiles * block), tile_experts = new_int32(topk_ids, max_tiles);
  Tensor num_padded = new_int32(topk_ids, 1), inverse = new_int32(topk_ids, num_routes);
  auto* sorted = static_cast<int32_t*>(sorted_routes.mutable_data_ptr());
  auto* tiles = static_cast<int32_t*>(tile_experts.mutable_data_ptr());
  auto* rows = static_cast<int32_t*>(inverse.mutable_data_ptr());
  std::fill_n(sorted, max_tiles * block, static_cast<int32_t>(num_routes));
  std::fill_n(tiles, max_tiles, kDropped);
  std::fill_n(rows, num_routes, kDropped);
  int64_t tile = 0;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    int64_t row = tile * block;
    for (int64_t i = routes.offsets[expert]; i < routes.offsets[expert + 1]; ++i, ++row) {
      sorted[row] = routes.sorted[i];
      rows[routes.sorted[i]] = static_cast<int32_t>(row);
    }
    for (; tile * block < row; ++tile) tiles[tile] = static_cast<int32_t>(expert);
  }
  *static_cast<int32_t*>(num_padded.mutable_data_ptr()) = static_cast<int32_t>(tile * block);
  return {sorted_routes, tile_experts, num_padded, inverse};
}

}  // namespace moe_ops
