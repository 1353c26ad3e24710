// rows @ weights[expert]^T by libtorch's own matrix products, which know the CPU they run on.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "checks.h"

namespace moe_ops {

// A view of a tensor's memory without its history: nothing of autograd hangs on it. `offset` counts from the tensor's
// first element.
Tensor view(const Tensor& tensor, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
            int64_t offset = 0);

// An uninitialised contiguous CPU tensor.
Tensor new_buffer(const std::vector<int64_t>& sizes, ScalarType dtype);

// dst = src, converted; same shape, any strides.
void copy(const Tensor& dst, const Tensor& src);

class GroupedProduct {
 public:
  // weights: [E, N, K], bias: [E, N] in their dtype or float32, any strides. At most `max_rows` rows are multiplied at
  // a time.
  GroupedProduct(const Tensor& weights, const std::optional<Tensor>& bias, int64_t max_rows);

  // out [n, N] = rows [n, K] @ weights[expert]^T + bias[expert], both contiguous and of the weights' dtype; float32
  // accumulation, and one rounding after the bias.
  void run(int64_t expert, const Tensor& rows, const Tensor& out);

 private:
  void run_wide(int64_t expert, const Tensor& rows, const Tensor& out);
  void multiply(int64_t expert, const Tensor& rows, const Tensor& weight_t, const Tensor& out);

  Tensor weights_;
  std::optional<Tensor> bias_;
  bool wide_;
  // Of a wide product: weights of one expert, rows and result in float32.
  std::vector<Tensor> buffers_;
};

}  // namespace moe_ops
