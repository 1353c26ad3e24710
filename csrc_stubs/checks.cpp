#include "checks.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "op_schema.h"
#include "text.h"

namespace moe_ops {
namespace {

constexpr ScalarType kComputeDtypes[] = {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float};
constexpr const char* kComputeDtypesText = "torch.bfloat16 or torch.float16 or torch.float32";

using Named = std::pair<const char*, const std::optional<Tensor>*>;

bool is_compute_dtype(ScalarType dtype) {
  return std::find(std::begin(kComputeDtypes), std::end(kComputeDtypes), dtype) != std::end(kComputeDtypes);
}

bool is_given(const std::optional<Tensor>& tensor) { return tensor.has_value() && tensor->defined(); }

std::string shape_text(const Tensor& tensor) { return moe_ops::shape_text(tensor.sizes()); }

// A caller may pass None, or an undefined tensor, where the schema says Tensor.
void require_defined(const char* name, const Tensor& tensor) {
  if (!tensor.defined()) fail(name, " is NoneType, expected a torch.Tensor");
}

void require_ndim(const char* name, const Tensor& tensor, int64_t ndim, const char* form) {
  if (tensor.dim() != ndim) {
    fail(name, " has shape ", shape_text(tensor), ", expected ", ndim, " dimensions: ", form);
  }
}

void require_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape, const std::string& form) {
  const auto sizes = tensor.sizes();
  if (sizes.size() != shape.size() || !std::equal(shape.begin(), shape.end(), sizes.begin())) {
    fail(name, " has shape ", shape_text(tensor), ", expected ", moe_ops::shape_text(shape), ": ", form);
  }
}

void require_cpu(const char* name, const Tensor& tensor) {
  if (!tensor.is_cpu()) fail(name, " is not on the CPU, where hidden_states is; move it: ", name, ".to('cpu')");
}

template <size_t N>
void require_name(const char* argument, const std::string& value, const char* const (&names)[N]) {
  std::string list;
  for (const char* name : names) {
    if (value == name) return;
    list += (list.empty() ? "" : ", ") + quoted(name);
  }
  fail(argument, " is ", quoted(value), ", expected one of ", list);
}

const Activation& find_activation(const std::string& value) {
  std::string names;
  for (const Activation& activation : kActivations) {
    if (value == activation.name) return activation;
    names += (names.empty() ? "" : ", ") + quoted(activation.name);
  }
  fail("activation is ", quoted(value), ", expected one of ", names);
}

Nonlinearity find_nonlinearity(const Activation& activation) {
  std::string name = activation.name;
  if (!activation.gated) name.resize(name.find("_no_gate"));
  if (name == "silu") return Nonlinearity::kSilu;
  if (name == "gelu") return Nonlinearity::kGelu;
  if (name == "gelu_tanh") return Nonlinearity::kGeluTanh;
  if (name == "swigluoai") return Nonlinearity::kSwigluoai;
  if (name == "relu2") return Nonlinearity::kRelu2;
  fail("activation ", quoted(activation.name), " has no C++ kernel");
}

const Activation& check_activation(const Arguments& args) {
  const Activation& activation = find_activation(args.activation);
  const auto& alpha = args.activation_alpha;
  const auto& limit = args.activation_limit;
  if (alpha && !activation.default_alpha) {
    fail("activation_alpha is ", text(*alpha), ", but activation ", quoted(activation.name),
         " has no slope; leave it out, or use activation='swigluoai'");
  }
  if (limit && !activation.takes_limit) {
    fail("activation_limit is ", text(*limit), ", but activation ", quoted(activation.name),
         " has no clamp; leave it out, or use activation='silu' or 'swigluoai'");
  }
  if (alpha && !std::isfinite(*alpha)) fail("activation_alpha is ", text(*alpha), ", expected a finite number");
  if (limit && !(*limit > 0)) fail("activation_limit is ", text(*limit), ", expected a number above 0");
  return activation;
}

void check_options(const Arguments& args, const Activation& activation) {
  require_name("path", args.path, kPaths);
  require_name("gate_up_layout", args.gate_up_layout, kGateUpLayouts);
  require_name("quantization", args.quantization, kFormats);
  if (args.gate_up_layout == "interleaved" && !activation.gated) {
    fail("gate_up_layout is 'interleaved', but activation ", quoted(activation.name), " has no gate; leave it out");
  }
  if (!std::isfinite(args.routed_scaling_factor)) {
    fail("routed_scaling_factor is ", text(args.routed_scaling_factor), ", expected a finite number");
  }
  if (args.out_dtype && !is_compute_dtype(*args.out_dtype)) {
    fail("out_dtype is ", text(*args.out_dtype), ", expected ", kComputeDtypesText, " or None");
  }
}

// What Python's kernels do and this one does not.
void check_supported(const Arguments& args) {
  if (args.quantization != "none") {
    fail("quantization is ", quoted(args.quantization), ", expected 'none' in the C++ CPU kernel; dequantise the ",
         "weights when the package is made (moe_ops.quantization.dequantize), or import moe_ops in Python before this ",
         "library is loaded");
  }
  const Named scales[] = {
      {"w1_scale", &args.w1_scale},           {"w2_scale", &args.w2_scale}, {"w1_zero_point", &args.w1_zero_point},
      {"w2_zero_point", &args.w2_zero_point}, {"a1_scale", &args.a1_scale}, {"a2_scale", &args.a2_scale},
  };
  for (const auto& [name, tensor] : scales) {
    if (is_given(*tensor)) {
      fail(name, " was given, but quantization is 'none' and does not use it; leave it out");
    }
  }
  if (args.block_shape) fail("block_shape was given, but quantization is 'none' and does not use it; leave it out");
  if (args.path != "auto" && args.path != "reference") {
    fail("path is ", quoted(args.path), ", but the tensors are on the CPU; move them to a CUDA device in a Python ",
         "process that has imported moe_ops, or pass path='auto'");
  }
}

void check_ids(const Tensor& ids, const std::optional<Tensor>& expert_map) {
  if (ids.scalar_type() != ScalarType::Int && ids.scalar_type() != ScalarType::Long) {
    fail("topk_ids has dtype ", text(ids.scalar_type()),
         ", expected torch.int32 or torch.int64; cast it: topk_ids.to(torch.int32)");
  }
  if (!is_given(expert_map)) return;
  require_ndim("expert_map", *expert_map, 1, "[E_global]");
  if (expert_map->scalar_type() != ScalarType::Int) {
    fail("expert_map has dtype ", text(expert_map->scalar_type()),
         ", expected torch.int32; cast it: expert_map.to(torch.int32)");
  }
  require_cpu("expert_map", *expert_map);
}

void check_num_routes(int64_t num_tokens, int64_t top_k, int64_t num_experts, int64_t block) {
  const int64_t most = (int64_t{1} << 31) - num_experts * block;
  // Sizes of views without memory of their own may be anything: divide instead of multiplying.
  if (top_k > 0 && num_tokens > (most - 1) / top_k) {
    fail("topk_ids has M * top_k = ", static_cast<__int128>(num_tokens) * top_k > INT64_MAX
             ? std::string("more than 2^63")
             : std::to_string(num_tokens * top_k),
         " routes, expected fewer than ", most, "; split the tokens over several calls");
  }
}

void check_shapes(const Arguments& args, const Activation& activation) {
  const struct {
    const char* name;
    const Tensor& tensor;
    int64_t ndim;
    const char* form;
  } operands[] = {
      {"hidden_states", args.hidden_states, 2,
       "[M, H]; flatten the others: hidden_states.reshape(-1, hidden_states.shape[-1])"},
      {"w1", args.w1, 3, "[E, 2 * I, H] ([E, I, H] for an activation that ends in '_no_gate')"},
      {"w2", args.w2, 3, "[E, H, I]"},
      {"topk_ids", args.topk_ids, 2, "[M, top_k]"},
  };
  for (const auto& operand : operands) require_ndim(operand.name, operand.tensor, operand.ndim, operand.form);
  const int64_t tokens = args.hidden_states.size(0), hidden = args.hidden_states.size(1);
  const int64_t experts = args.w2.size(0), intermediate = args.w2.size(2), top_k = args.topk_ids.size(1);
  const std::pair<const char*, int64_t> sizes[] = {
      {"hidden_states: H", hidden}, {"w2: I", intermediate}, {"w2: E", experts}, {"topk_ids: top_k", top_k}};
  for (const auto& [name, size] : sizes) {
    if (size < 1) fail(name, " is ", size, ", expected at least 1");
  }
  const std::string rows = activation.gated ? "2 * I" : "I";
  const int64_t w1_rows = activation.gated ? 2 * intermediate : intermediate;
  // First: of a transposed w2 the sizes would make w1 look wrong.
  require_shape("w2", args.w2, {experts, hidden, intermediate}, "[E, H, I], with H from hidden_states");
  require_shape("w1", args.w1, {experts, w1_rows, hidden},
                "[E, " + rows + ", H] for activation " + quoted(activation.name) + ", with E and I from w2 " +
                    shape_text(args.w2) + " and H from hidden_states " + shape_text(args.hidden_states));
  require_shape("topk_ids", args.topk_ids, {tokens, top_k}, "[M, top_k], with M from hidden_states");
  require_shape("topk_weights", args.topk_weights, {tokens, top_k}, "[M, top_k], as topk_ids");
  if (is_given(args.w1_bias)) {
    require_shape("w1_bias", *args.w1_bias, {experts, w1_rows}, "[E, " + rows + "], the rows of w1");
  }
  if (is_given(args.w2_bias)) require_shape("w2_bias", *args.w2_bias, {experts, hidden}, "[E, H]");
  check_ids(args.topk_ids, args.expert_map);
  check_num_routes(tokens, top_k, experts, kLargestBlock);
}

void check_dtypes(const Arguments& args) {
  const ScalarType dtype = args.hidden_states.scalar_type();
  if (!is_compute_dtype(dtype)) {
    fail("hidden_states has dtype ", text(dtype), ", expected ", kComputeDtypesText,
         "; cast it and the weights: hidden_states.to(torch.bfloat16)");
  }
  const std::pair<const char*, const Tensor&> weights[] = {{"w1", args.w1}, {"w2", args.w2}};
  for (const auto& [name, weight] : weights) {
    const ScalarType got = weight.scalar_type();
    if (got == dtype) continue;
    const std::string cast = std::string(name) + ".to(" + text(dtype) + ")";
    fail(name, " has dtype ", text(got), ", expected ", text(dtype), ", the dtype of hidden_states; ",
         is_compute_dtype(got) ? "cast one of them: " + cast + " or hidden_states.to(" + text(got) + ")"
                               : "pass quantization= and scales if it is quantised, or cast it: " + cast);
  }
  const Named biases[] = {{"w1_bias", &args.w1_bias}, {"w2_bias", &args.w2_bias}};
  for (const auto& [name, bias] : biases) {
    if (!is_given(*bias)) continue;
    const ScalarType got = (*bias)->scalar_type();
    if (got != dtype && got != ScalarType::Float) {
      fail(name, " has dtype ", text(got), ", expected ", text(dtype), " or torch.float32; cast it: ", name, ".to(",
           text(dtype), ")");
    }
  }
  const ScalarType weight_dtype = args.topk_weights.scalar_type();
  if (!is_compute_dtype(weight_dtype) && weight_dtype != ScalarType::Double) {
    fail("topk_weights has dtype ", text(weight_dtype),
         ", expected a floating-point dtype of at least 16 bits; cast it: topk_weights.to(torch.float32)");
  }
}

// Whether one element in memory may stand for several of the tensor, as in an expanded one.
bool may_overlap_itself(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> steps;
  for (int64_t i = 0; i < tensor.dim(); ++i) steps.emplace_back(tensor.stride(i), tensor.size(i));
  std::sort(steps.begin(), steps.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : steps) {
    if (size <= 1) continue;
    if (stride <= reach) return true;
    reach += (size - 1) * stride;
  }
  return false;
}

// Addresses of the first byte and past the last one; an empty range for a tensor without elements.
std::pair<uintptr_t, uintptr_t> byte_range(const Tensor& tensor) {
  const auto first = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  if (tensor.numel() == 0) return {first, first};
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  return {first, first + static_cast<uintptr_t>(last + 1) * tensor.element_size()};
}

}  // namespace

std::array<std::pair<const char*, const Tensor*>, kNumTensors> given_tensors(const Arguments& args) {
  const auto pointer = [](const std::optional<Tensor>& tensor) { return is_given(tensor) ? &*tensor : nullptr; };
  return {{{"hidden_states", &args.hidden_states},
           {"w1", &args.w1},
           {"w2", &args.w2},
           {"topk_weights", &args.topk_weights},
           {"topk_ids", &args.topk_ids},
           {"w1_bias", pointer(args.w1_bias)},
           {"w2_bias", pointer(args.w2_bias)},
           {"w1_scale", pointer(args.w1_scale)},
           {"w2_scale", pointer(args.w2_scale)},
           {"w1_zero_point", pointer(args.w1_zero_point)},
           {"w2_zero_point", pointer(args.w2_zero_point)},
           {"a1_scale", pointer(args.a1_scale)},
           {"a2_scale", pointer(args.a2_scale)},
           {"expert_map", pointer(args.expert_map)}}};
}

void check_defined(const Arguments& args) {
  require_defined("hidden_states", args.hidden_states);
  require_defined("w1", args.w1);
  require_defined("w2", args.w2);
  require_defined("topk_weights", args.topk_weights);
  require_defined("topk_ids", args.topk_ids);
}

void require_device_of(const Tensor& hidden_states, const char* name, const Tensor& tensor) {
  if (hidden_states.is_cpu()) return require_cpu(name, tensor);
  const int32_t device = hidden_states.get_device_index();
  if (tensor.is_cpu() || tensor.get_device_index() != device) {
    fail(name, " is on ", tensor.is_cpu() ? "the CPU" : "cuda:" + std::to_string(tensor.get_device_index()),
         ", expected cuda:", device, ", where hidden_states is; move it: ", name, ".to('cuda:", device, "')");
  }
}

Problem make_problem(const Arguments& args) {
  check_defined(args);
  const Activation& activation = check_activation(args);
  check_options(args, activation);
  check_supported(args);
  check_shapes(args, activation);
  check_dtypes(args);
  for (const auto& [name, tensor] : given_tensors(args)) {
    if (tensor != nullptr) require_cpu(name, *tensor);
  }
  const auto limit = args.activation_limit ? args.activation_limit : activation.default_limit;
  Problem problem{};
  problem.num_tokens = args.hidden_states.size(0);
  problem.hidden_size = args.hidden_states.size(1);
  problem.intermediate_size = args.w2.size(2);
  problem.num_experts = args.w2.size(0);
  problem.top_k = args.topk_ids.size(1);
  problem.dtype = args.hidden_states.scalar_type();
  problem.out_dtype = args.out_dtype.value_or(problem.dtype);
  problem.nonlinearity = find_nonlinearity(activation);
  problem.gated = activation.gated;
  problem.interleaved = args.gate_up_layout == "interleaved";
  problem.alpha = static_cast<float>(args.activation_alpha.value_or(activation.default_alpha.value_or(1.0)));
  if (limit) problem.limit = static_cast<float>(*limit);
  problem.router_weight_on_input = args.apply_router_weight_on_input;
  problem.routed_scaling_factor = static_cast<float>(args.routed_scaling_factor);
  problem.reduce_topk = args.reduce_topk;
  return problem;
}

void check_out(const Tensor& out, const Arguments& args, const std::vector<int64_t>& shape, ScalarType dtype) {
  require_defined("out", out);
  require_shape("out", out, shape, "[M, H], or [M, top_k, H] with reduce_topk=False");
  if (out.scalar_type() != dtype) {
    fail("out has dtype ", text(out.scalar_type()), ", expected ", text(dtype),
         "; allocate it so, or pass out_dtype=", text(out.scalar_type()));
  }
  require_device_of(args.hidden_states, "out", out);
  if (may_overlap_itself(out)) {
    fail("out has strides ", moe_ops::shape_text(out.strides()), " for shape ", shape_text(out),
         ": one element may stand for several results; pass a contiguous tensor");
  }
  const auto [first, end] = byte_range(out);
  for (const auto& [name, tensor] : given_tensors(args)) {
    if (tensor == nullptr) continue;
    const auto [other_first, other_end] = byte_range(*tensor);
    if (first < other_end && other_first < end) {
      fail("out shares memory with ", name, ", which is read while out is written; pass another tensor");
    }
  }
}

void check_route(const Tensor& topk_ids, int64_t num_experts, int64_t block, const std::optional<Tensor>& expert_map) {
  require_defined("topk_ids", topk_ids);
  require_ndim("topk_ids", topk_ids, 2, "[M, top_k]");
  if (block < 1 || block > 1024) fail("block is ", block, ", expected 1 to 1024");
  const int64_t most = (int64_t{1} << 31) / block - 1;
  if (num_experts < 1 || num_experts > most) fail("num_experts is ", num_experts, ", expected 1 to ", most);
  check_ids(topk_ids, expert_map);
  check_num_routes(topk_ids.size(0), topk_ids.size(1), num_experts, block);
}

}  // namespace moe_ops
