// One op, for CPU tensors: the text by which the CUDA kernel looks a call up, as bytes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <string>

#include "launch_table.h"
#include "op_schema.h"

namespace moe_ops {
namespace {

Tensor text_of_call(MOE_OPS_PARAMETERS) {
  const std::string text = call_text(MOE_OPS_ARGUMENTS);
  Tensor result = torch::stable::new_empty(hidden_states, {static_cast<int64_t>(text.size())}, ScalarType::Byte);
  std::memcpy(result.mutable_data_ptr(), text.data(), text.size());
  return result;
}

}  // namespace
}  // namespace moe_ops

STABLE_TORCH_LIBRARY_FRAGMENT(MOE_OPS_NAMESPACE, m) {
  const std::string schema = moe_ops::kFusedMoeSchema;
  m.def(("text_of_call" + schema.substr(schema.find('('))).c_str());
}

STABLE_TORCH_LIBRARY_IMPL(MOE_OPS_NAMESPACE, CPU, m) { m.impl("text_of_call", TORCH_BOX(&moe_ops::text_of_call)); }
