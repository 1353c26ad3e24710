#include "fused_moe.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>

#include "activation.h"
#include "products.h"
#include "routing.h"

namespace moe_ops {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Rows of one expert that are taken at a time: enough for the products, and a bound of the buffers.
constexpr int64_t kMaxRows = 1024;
// Elements a thread gets at least.
constexpr int64_t kGrain = 1 << 14;

// Calls `body` with a value of the C++ type of a dtype that the checks have let pass.
template <typename Body>
void with_type(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::BFloat16: return body(BFloat16{});
    case ScalarType::Half: return body(Half{});
    case ScalarType::Double: return body(double{});
    default: return body(float{});
  }
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// for (i = 0; i < count; ++i) body(i), over threads; `work` elements each.
template <typename Body>
void parallel_rows(int64_t count, int64_t work, const Body& body) {
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) body(i);
                              });
}

// Row `row` of a [rows, columns] tensor of any strides, as float32.
void read_row(const Tensor& tensor, int64_t row, float* result) {
  with_type(tensor.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* from = data<T>(tensor) + row * tensor.stride(0);
    for (int64_t i = 0; i < tensor.size(1); ++i) result[i] = static_cast<float>(from[i * tensor.stride(1)]);
  });
}

std::vector<float> read_weights(const Tensor& topk_weights) {
  std::vector<float> weights(topk_weights.numel());
  for (int64_t m = 0; m < topk_weights.size(0); ++m) {
    read_row(topk_weights, m, weights.data() + m * topk_weights.size(1));
  }
  return weights;
}

// A bias of one expert at a time; nullptr where there is none.
class Bias {
 public:
  explicit Bias(const std::optional<Tensor>& bias) : bias_(bias) {
    if (bias_ && !bias_->defined()) bias_.reset();
    if (bias_) row_.resize(bias_->size(1));
  }

  const float* of(int64_t expert) {
    if (!bias_) return nullptr;
    read_row(*bias_, expert, row_.data());
    return row_.data();
  }

 private:
  std::optional<Tensor> bias_;
  std::vector<float> row_;
};

// T is the compute dtype.
template <typename T>
class Kernel {
 public:
  Kernel(const Arguments& args, const Problem& problem)
      : args_(args),
        problem_(problem),
        routes_(group_routes(args.topk_ids, problem.num_experts, args.expert_map)),
        weights_(read_weights(args.topk_weights)),
        w1_bias_(args.w1_bias) {}

  void run(const Tensor& out) {
    const Tensor down = new_buffer({static_cast<int64_t>(routes_.sorted.size()), problem_.hidden_size}, problem_.dtype);
    run_experts(down);
    with_type(problem_.out_dtype, [&](auto zero) { combine(data<T>(down), mutable_data<decltype(zero)>(out)); });
  }

 private:
  // down [kept routes, H] = the down projection of every kept route, in sorted order.
  void run_experts(const Tensor& down) {
    int64_t max_rows = 0;
    for (int64_t e = 0; e < problem_.num_experts; ++e) {
      max_rows = std::max(max_rows, routes_.offsets[e + 1] - routes_.offsets[e]);
    }
    max_rows = std::min(max_rows, kMaxRows);
    const int64_t hidden = problem_.hidden_size, inner = problem_.intermediate_size, w1_rows = problem_.w1_rows();
    const Tensor x = new_buffer({max_rows, hidden}, problem_.dtype);
    const Tensor up = new_buffer({max_rows, w1_rows}, problem_.dtype);
    const Tensor act = new_buffer({max_rows, inner}, problem_.dtype);
    // The routing weight may come between the up projection and its bias.
    GroupedProduct up_product(args_.w1, std::nullopt, max_rows), down_product(args_.w2, args_.w2_bias, max_rows);
    for (int64_t expert = 0; expert < problem_.num_experts; ++expert) {
      const int64_t stop = routes_.offsets[expert + 1];
      if (routes_.offsets[expert] == stop) continue;
      const float* w1_bias = w1_bias_.of(expert);
      for (int64_t start = routes_.offsets[expert]; start < stop; start += kMaxRows) {
        const int64_t rows = std::min(kMaxRows, stop - start);
        const int32_t* routes = routes_.sorted.data() + start;
        gather(routes, rows, mutable_data<T>(x));
        up_product.run(expert, view(x, {rows, hidden}, {hidden, 1}), view(up, {rows, w1_rows}, {w1_rows, 1}));
        activate(routes, rows, data<T>(up), w1_bias, mutable_data<T>(act));
        down_product.run(expert, view(act, {rows, inner}, {inner, 1}),
                         view(down, {rows, hidden}, {hidden, 1}, start * hidden));
      }
    }
  }

  void gather(const int32_t* routes, int64_t rows, T* x) const {
    const Tensor& from = args_.hidden_states;
    const T* first = data<T>(from);
    const int64_t hidden = problem_.hidden_size, row_stride = from.stride(0), stride = from.stride(1);
    parallel_rows(rows, hidden, [&](int64_t i) {
      const T* row = first + routes[i] / problem_.top_k * row_stride;
      if (stride == 1) {
        std::memcpy(x + i * hidden, row, hidden * sizeof(T));
      } else {
        for (int64_t h = 0; h < hidden; ++h) x[i * hidden + h] = row[h * stride];
      }
    });
  }

  void activate(const int32_t* routes, int64_t rows, const T* up, const float* bias, T* act) const {
    const int64_t inner = problem_.intermediate_size, w1_rows = problem_.w1_rows();
    parallel_rows(rows, 4 * w1_rows, [&](int64_t i) {
      const float factor = problem_.router_weight_on_input ? weights_[routes[i]] : 1.0f;
      activate_row(up + i * w1_rows, bias, factor, problem_, act + i * inner);
    });
  }

  // The weighted sum over each token's routes in the order of k, or the routes themselves. A dropped route is not
  // read, and neither is its weight, which may be NaN.
  template <typename Out>
  void combine(const T* down, Out* out) const {
    const int64_t hidden = problem_.hidden_size, top_k = problem_.top_k;
    const int64_t routes_per_row = problem_.reduce_topk ? top_k : 1;
    const int64_t rows = problem_.num_routes() / routes_per_row;
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / (hidden * routes_per_row)),
                                [&](int64_t begin, int64_t end) {
      std::vector<float> sum(hidden);
      for (int64_t row = begin; row < end; ++row) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (int64_t route = row * routes_per_row; route < (row + 1) * routes_per_row; ++route) {
          if (routes_.position[route] >= 0) add_route(route, down, sum.data());
        }
        for (int64_t h = 0; h < hidden; ++h) out[row * hidden + h] = static_cast<Out>(sum[h]);
      }
    });
  }

  void add_route(int64_t route, const T* down, float* sum) const {
    const float weight = problem_.router_weight_on_input ? 1.0f : weights_[route];
    const float factor = weight * problem_.routed_scaling_factor;
    const T* row = down + routes_.position[route] * problem_.hidden_size;
    for (int64_t h = 0; h < problem_.hidden_size; ++h) sum[h] += static_cast<float>(row[h]) * factor;
  }

  const Arguments& args_;
  const Problem& problem_;
  GroupedRoutes routes_;
  std::vector<float> weights_;
  Bias w1_bias_;
};

}  // namespace

Tensor fused_moe(const Arguments& args, const Problem& problem) {
  const std::vector<int64_t> shape = problem.out_shape();
  Tensor out = torch::stable::new_empty(args.hidden_states, shape, problem.out_dtype);
  if (problem.num_tokens == 0) return out;
  switch (problem.dtype) {
    case ScalarType::BFloat16: Kernel<BFloat16>(args, problem).run(out); break;
    case ScalarType::Half: Kernel<Half>(args, problem).run(out); break;
    default: Kernel<float>(args, problem).run(out); break;
  }
  return out;
}

}  // namespace moe_ops
