#include "products.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>

namespace moe_ops {
namespace {

// Whether matrix products of this dtype are fast on this CPU: libtorch falls back to plain loops elsewhere.
bool ask_native(const char* op) {
  std::array<StableIValue, 1> stack{};
  if (torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) return false;
  return torch::stable::detail::to<bool>(stack[0]);
}

bool has_product(ScalarType dtype) {
  if (dtype == ScalarType::Float) return true;
  static const bool bfloat16 = ask_native("mkldnn::_is_mkldnn_bf16_supported");
  static const bool half = ask_native("mkldnn::_is_mkldnn_fp16_supported");
  return dtype == ScalarType::BFloat16 ? bfloat16 : half;
}

Tensor first_rows(const Tensor& tensor, int64_t rows) {
  return view(tensor, {rows, tensor.size(1)}, {tensor.size(1), 1});
}

}  // namespace

Tensor view(const Tensor& tensor, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
            int64_t offset) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
                                                        strides.data(), offset, &handle));
  return Tensor(handle);
}

Tensor new_buffer(const std::vector<int64_t>& sizes, ScalarType dtype) { return torch::stable::empty(sizes, dtype); }

void copy(const Tensor& dst, const Tensor& src) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(dst.get(), src.get(), /*non_blocking=*/0));
}

GroupedProduct::GroupedProduct(const Tensor& weights, const std::optional<Tensor>& bias, int64_t max_rows)
    : weights_(weights), wide_(!has_product(weights.scalar_type())) {
  if (bias && bias->defined()) bias_ = bias;
  // Added after the product it would cost a second rounding, and libtorch's product takes none of another dtype.
  if (bias_ && bias_->scalar_type() != weights.scalar_type()) wide_ = true;
  if (!wide_) return;
  const int64_t columns = weights.size(1), depth = weights.size(2);
  buffers_ = {new_buffer({columns, depth}, ScalarType::Float), new_buffer({max_rows, depth}, ScalarType::Float),
              new_buffer({max_rows, columns}, ScalarType::Float)};
  if (bias_) {
    const std::vector<int64_t> sizes = {bias_->size(0), bias_->size(1)};
    const Tensor wide_bias = new_buffer(sizes, ScalarType::Float);
    copy(wide_bias, view(*bias_, sizes, {bias_->stride(0), bias_->stride(1)}));
    bias_ = wide_bias;
  }
}

void GroupedProduct::run(int64_t expert, const Tensor& rows, const Tensor& out) {
  if (wide_) return run_wide(expert, rows, out);
  multiply(expert, rows, view(weights_, {weights_.size(2), weights_.size(1)}, {weights_.stride(2), weights_.stride(1)},
                              expert * weights_.stride(0)), out);
}

void GroupedProduct::run_wide(int64_t expert, const Tensor& rows, const Tensor& out) {
  const int64_t columns = weights_.size(1), depth = weights_.size(2);
  const Tensor wide_rows = first_rows(buffers_[1], rows.size(0)), wide_out = first_rows(buffers_[2], rows.size(0));
  copy(buffers_[0], view(weights_, {columns, depth}, {weights_.stride(1), weights_.stride(2)},
                         expert * weights_.stride(0)));
  copy(wide_rows, rows);
  multiply(expert, wide_rows, view(buffers_[0], {depth, columns}, {1, depth}), wide_out);
  copy(out, wide_out);
}

void GroupedProduct::multiply(int64_t expert, const Tensor& rows, const Tensor& weight_t, const Tensor& out) {
  if (!bias_) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), rows.get(), weight_t.get()));
    return;
  }
  const Tensor bias = view(*bias_, {bias_->size(1)}, {bias_->stride(1)}, expert * bias_->stride(0));
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), bias.get(), rows.get(), weight_t.get(), 1.0, 1.0));
}

}  // namespace moe_ops
