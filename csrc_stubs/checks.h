// The arguments of a call and their checks: what moe_ops/problem.py holds calls against in Python, in the same words.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace moe_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The arguments of `fused_moe_tma`, in the schema's order.
struct Arguments {
  Tensor hidden_states;
  Tensor w1;
  Tensor w2;
  Tensor topk_weights;
  Tensor topk_ids;
  std::optional<Tensor> w1_bias;
  std::optional<Tensor> w2_bias;
  std::optional<Tensor> w1_scale;
  std::optional<Tensor> w2_scale;
  std::optional<Tensor> w1_zero_point;
  std::optional<Tensor> w2_zero_point;
  std::optional<Tensor> a1_scale;
  std::optional<Tensor> a2_scale;
  std::optional<Tensor> expert_map;
  std::string activation;
  std::optional<double> activation_alpha;
  std::optional<double> activation_limit;
  std::string gate_up_layout;
  std::string quantization;
  std::optional<std::vector<int64_t>> block_shape;
  bool apply_router_weight_on_input;
  double routed_scaling_factor;
  bool reduce_topk;
  bool deterministic;
  std::string path;
  std::optional<ScalarType> out_dtype;
};

// The arguments of `fused_moe_tma`, once as parameters and once as what makes an `Arguments`.
#define MOE_OPS_PARAMETERS                                                                                           \
  const Tensor& hidden_states, const Tensor& w1, const Tensor& w2, const Tensor& topk_weights,                       \
      const Tensor& topk_ids, const std::optional<Tensor>& w1_bias, const std::optional<Tensor>& w2_bias,            \
      const std::optional<Tensor>& w1_scale, const std::optional<Tensor>& w2_scale,                                  \
      const std::optional<Tensor>& w1_zero_point, const std::optional<Tensor>& w2_zero_point,                        \
      const std::optional<Tensor>& a1_scale, const std::optional<Tensor>& a2_scale,                                  \
      const std::optional<Tensor>& expert_map, std::string activation, std::optional<double> activation_alpha,       \
      std::optional<double> activation_limit, std::string gate_up_layout, std::string quantization,                  \
      std::optional<std::vector<int64_t>> block_shape, bool apply_router_weight_on_input,                            \
      double routed_scaling_factor, bool reduce_topk, bool deterministic, std::string path,                          \
      std::optional<ScalarType> out_dtype
#define MOE_OPS_ARGUMENTS                                                                                            \
  {hidden_states, w1, w2, topk_weights, topk_ids, w1_bias, w2_bias, w1_scale, w2_scale, w1_zero_point,               \
   w2_zero_point, a1_scale, a2_scale, expert_map, activation, activation_alpha, activation_limit, gate_up_layout,    \
   quantization, block_shape, apply_router_weight_on_input, routed_scaling_factor, reduce_topk, deterministic,       \
   path, out_dtype}

// The pointwise function of an activation, before gate and up are multiplied.
enum class Nonlinearity { kSilu, kGelu, kGeluTanh, kSwigluoai, kRelu2 };

// What a checked call asks for. M tokens, H hidden size, I intermediate size, E experts.
struct Problem {
  int64_t num_tokens;
  int64_t hidden_size;
  int64_t intermediate_size;
  int64_t num_experts;
  int64_t top_k;
  ScalarType dtype;
  ScalarType out_dtype;
  Nonlinearity nonlinearity;
  bool gated;
  bool interleaved;
  float alpha;
  std::optional<float> limit;
  bool router_weight_on_input;
  float routed_scaling_factor;
  bool reduce_topk;

  int64_t num_routes() const { return num_tokens * top_k; }
  int64_t w1_rows() const { return gated ? 2 * intermediate_size : intermediate_size; }
  std::vector<int64_t> out_shape() const {
    if (reduce_topk) return {num_tokens, hidden_size};
    return {num_tokens, top_k, hidden_size};
  }
};

constexpr size_t kNumTensors = 14;

// The tensor arguments by name, in the schema's order; nullptr for those that were not given.
std::array<std::pair<const char*, const Tensor*>, kNumTensors> given_tensors(const Arguments& args);

// Each throws std::runtime_error, which says what is wrong, what was expected and the way out.
Problem make_problem(const Arguments& args);
void check_defined(const Arguments& args);
void require_device_of(const Tensor& hidden_states, const char* name, const Tensor& tensor);
void check_out(const Tensor& out, const Arguments& args, const std::vector<int64_t>& shape, ScalarType dtype);
void check_route(const Tensor& topk_ids, int64_t num_experts, int64_t block, const std::optional<Tensor>& expert_map);

}  // namespace moe_ops
