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

void multiply(const Tensor& rows, const Tensor& weight_t, const Tensor& out) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), rows.get(), weight_t.get()));
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

GroupedProduct::GroupedProduct(const Tensor& weights, int64_t max_rows)
    : weights_(weights), native_(has_product(weights.scalar_type())) {
  if (native_) return;
  const int64_t columns = weights.size(1), depth = weights.size(2);
  wide_ = {new_buffer({columns, depth}, ScalarType::Float), new_buffer({max_rows, depth}, ScalarType::Float),
           new_buffer({max_rows, columns}, ScalarType::Float)};
}

void GroupedProduct::run(int64_t expert, const Tensor& rows, const Tensor& out) {
  const std::vector<int64_t> sizes = {weights_.size(1), weights_.size(2)};
  const std::vector<int64_t> strides = {weights_.stride(1), weights_.stride(2)};
  const int64_t offset = expert * weights_.stride(0);
  if (!native_) return run_wide(view(weights_, sizes, strides, offset), rows, out);
  multiply(rows, view(weights_, {sizes[1], sizes[0]}, {strides[1], strides[0]}, offset), out);
}

void GroupedProduct::run_wide(const Tensor& weight, const Tensor& rows, const Tensor& out) {
  const Tensor wide_rows = first_rows(wide_[1], rows.size(0)), wide_out = first_rows(wide_[2], rows.size(0));
  copy(wide_[0], weight);
  copy(wide_rows, rows);
  multiply(wide_rows, view(wide_[0], {weight.size(1), weight.size(0)}, {1, weight.size(1)}), wide_out);
  copy(out, wide_out);
}

}  // namespace moe_ops
