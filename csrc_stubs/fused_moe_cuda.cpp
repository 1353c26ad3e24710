#include "fused_moe_cuda.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>

#include "cuda_driver.h"
#include "launch_table.h"
#include "text.h"

namespace moe_ops {
namespace {

// Of all addresses: the kernels were compiled for it.
constexpr uintptr_t kAlignment = 16;
// Of workspaces in one allocation: lines of the L2 of their own.
constexpr int64_t kBufferAlignment = 256;

using Functions = std::vector<cuda::Function>;

// The kernels of a table on one device.
Functions load_kernels(const Table& table, int device) {
  const cuda::Driver& driver = cuda::driver();
  const auto ask = [&](int attribute) {
    int value = 0;
    cuda::check(driver.cuDeviceGetAttribute(&value, attribute, device), "cuDeviceGetAttribute");
    return value;
  };
  const int arch = 10 * ask(cuda::kCapabilityMajor) + ask(cuda::kCapabilityMinor);
  const int multiprocessors = ask(cuda::kMultiprocessors);
  if (arch != table.arch || multiprocessors != table.multiprocessors) {
    fail("cuda:", device, " is sm_", arch, " with ", multiprocessors, " multiprocessors, and the table is for sm_",
         table.arch, " with ", table.multiprocessors, "; make one with python -m moe_ops aot --arch ", arch,
         " --multiprocessors ", multiprocessors, " --shapes '", table.call, "'");
  }
  Functions functions;
  for (const Kernel& kernel : table.kernels) {
    std::ifstream file(kernel.file, std::ios::binary);
    const std::vector<char> image{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    if (image.empty()) fail(kernel.file, " cannot be read; make it again with python -m moe_ops aot");
    cuda::Module module = nullptr;
    cuda::Function function = nullptr;
    cuda::check(driver.cuModuleLoadData(&module, image.data()), "cuModuleLoadData");
    cuda::check(driver.cuModuleGetFunction(&function, module, kernel.name.c_str()), "cuModuleGetFunction");
    if (kernel.shared_bytes > cuda::kSharedWithoutAsking) {
      cuda::check(driver.cuFuncSetCacheConfig(function, cuda::kPreferShared), "cuFuncSetCacheConfig");
      cuda::check(driver.cuFuncSetAttribute(function, cuda::kMaxDynamicShared, static_cast<int>(kernel.shared_bytes)),
                  "cuFuncSetAttribute");
    }
    functions.push_back(function);
  }
  return functions;
}

// All of them at the first call, whatever its number of tokens: later ones may be captured, and loading may not.
const Functions& kernels_of(const Table& table, int device) {
  static std::mutex mutex;
  static std::map<std::pair<const Table*, int>, Functions> loaded;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = loaded.find({&table, device});
  if (found == loaded.end()) found = loaded.emplace(std::pair(&table, device), load_kernels(table, device)).first;
  return found->second;
}

// Checks what the call's text does not say: that tensors are where they have to be, and how.
void check_tensors(const Arguments& args) {
  for (const auto& [name, tensor] : given_tensors(args)) {
    if (tensor == nullptr) continue;
    require_device_of(args.hidden_states, name, *tensor);
    if (is_per_token(name, *tensor) && tensor->size(0) != args.hidden_states.size(0)) {
      fail(name, " has shape ", shape_text(tensor->sizes()), ", expected ", args.hidden_states.size(0),
           " rows, as hidden_states has");
    }
    if (!tensor->is_contiguous()) {
      fail(name, " has strides ", shape_text(tensor->strides()), " for shape ", shape_text(tensor->sizes()),
           ", expected a contiguous tensor in the C++ CUDA kernel; pass ", name, ".contiguous()");
    }
    if (reinterpret_cast<uintptr_t>(tensor->data_ptr()) % kAlignment != 0) {
      fail(name, " starts ", reinterpret_cast<uintptr_t>(tensor->data_ptr()) % kAlignment,
           " bytes past a multiple of 16; pass ", name, ".clone()");
    }
  }
  if (args.path != "auto" && args.path != "tma") {
    fail("path is ", quoted(args.path), ", expected 'auto' or 'tma' in the C++ CUDA kernel");
  }
}

// The parameters of a launch, where the driver copies them from.
class Parameters {
 public:
  Parameters(const Launch& launch, int64_t num_tokens, const std::vector<char*>& places)
      : numbers_(launch.arguments.size()), maps_(launch.arguments.size()) {
    const std::vector<Argument>& arguments = launch.arguments;
    for (size_t i = 0; i < arguments.size(); ++i) numbers_[i] = arguments[i].number.at(num_tokens);
    for (size_t i = 0; i < arguments.size(); ++i) {
      const Argument& argument = arguments[i];
      if (argument.kind == Kind::kTensorMap) {
        encode(argument, places[argument.place] + numbers_[i], &numbers_[i + 1], maps_[i]);
        pointers_.push_back(&maps_[i]);
        continue;
      }
      if (argument.kind == Kind::kPointer) numbers_[i] += reinterpret_cast<intptr_t>(places[argument.place]);
      if (argument.kind == Kind::kInt32 && numbers_[i] != static_cast<int32_t>(numbers_[i])) {
        fail("hidden_states has M = ", num_tokens, " tokens, too many for a launch; split them over calls");
      }
      // Little-endian: the first bytes of a number are its narrower self.
      pointers_.push_back(&numbers_[i]);
    }
    // Two pointers to scratch memory, of which the kernels use none.
    pointers_.insert(pointers_.end(), 2, &scratch_);
  }
  Parameters(const Parameters&) = delete;

  void** data() { return pointers_.data(); }

 private:
  // `sizes`: the shape, outermost first, then the strides. The driver wants the innermost first, and no stride of it.
  static void encode(const Argument& argument, char* address, const int64_t* sizes, cuda::TensorMap& map) {
    const size_t rank = argument.box.size();
    uint64_t shape[kMaxRank], strides[kMaxRank];
    uint32_t box[kMaxRank];
    const uint32_t steps[kMaxRank] = {1, 1, 1, 1, 1};
    for (size_t i = 0; i < rank; ++i) {
      shape[i] = sizes[rank - 1 - i];
      box[i] = argument.box[rank - 1 - i];
      if (i > 0) strides[i - 1] = sizes[2 * rank - 1 - i] * argument.element_size;
    }
    cuda::check(cuda::driver().cuTensorMapEncodeTiled(&map, argument.dtype, static_cast<uint32_t>(rank), address, shape,
                                                      strides, box, steps, cuda::kPlain, argument.swizzle,
                                                      cuda::kPromoteTo128Bytes, cuda::kPlain),
                "cuTensorMapEncodeTiled");
  }

  std::vector<int64_t> numbers_;
  std::vector<cuda::TensorMap> maps_;
  std::vector<void*> pointers_;
  void* scratch_ = nullptr;
};

void run_launch(const Launch& launch, const Kernel& kernel, cuda::Function function, int64_t num_tokens,
                const std::vector<char*>& places, cuda::Stream stream) {
  Parameters parameters(launch, num_tokens, places);
  cuda::LaunchAttribute dependent{};
  dependent.id = cuda::kDependentLaunch;
  dependent.value.number = 1;
  cuda::LaunchConfig config{};
  config.grid_x = static_cast<unsigned>(launch.grid.at(num_tokens));
  config.grid_y = config.grid_z = config.block_y = config.block_z = 1;
  config.block_x = kernel.threads;
  config.shared_bytes = kernel.shared_bytes;
  config.stream = stream;
  config.attributes = &dependent;
  config.num_attributes = kernel.dependent ? 1 : 0;
  cuda::check(cuda::driver().cuLaunchKernelEx(&config, function, parameters.data(), nullptr), kernel.name.c_str());
}

const std::string& folder_of_tables() {
  static const std::string folder = [] {
    const char* value = std::getenv("MOE_OPS_AOT");
    return std::string(value == nullptr ? "" : value);
  }();
  return folder;
}

const Tables& tables() {
  static const Tables tables = folder_of_tables().empty() ? Tables{} : read_tables(folder_of_tables());
  return tables;
}

}  // namespace

Tensor fused_moe_cuda(const Arguments& args) {
  check_defined(args);
  const Tensor& x = args.hidden_states;
  if (x.dim() != 2) fail("hidden_states has shape ", shape_text(x.sizes()), ", expected 2 dimensions: [M, H]");
  check_tensors(args);
  const int64_t num_tokens = x.size(0);
  const std::string& folder = folder_of_tables();
  const Table& table = find_table(tables(), folder, call_text(args), num_tokens);
  const Entry& entry = num_tokens == 0 ? table.entries.front() : find_entry(table, folder, num_tokens);

  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor out = torch::stable::new_empty(x, entry.shape_of_out(num_tokens), entry.out_dtype);
  if (num_tokens == 0) return out;
  cuda::ensure_context(device);
  const Functions& functions = kernels_of(table, device);

  std::vector<int64_t> offsets{0};
  for (const Formula& bytes : entry.buffers) {
    const int64_t blocks = (bytes.at(num_tokens) + kBufferAlignment - 1) / kBufferAlignment;
    offsets.push_back(offsets.back() + blocks * kBufferAlignment);
  }
  const Tensor workspace = torch::stable::new_empty(x, {offsets.back()}, ScalarType::Byte);
  std::vector<char*> places;
  for (const auto& [name, tensor] : given_tensors(args)) {
    places.push_back(tensor == nullptr ? nullptr : static_cast<char*>(tensor->data_ptr()));
  }
  places.push_back(static_cast<char*>(out.data_ptr()));
  for (const int64_t offset : offsets) places.push_back(static_cast<char*>(workspace.data_ptr()) + offset);

  const cuda::Stream stream = cuda::current_stream(device);
  for (const Launch& launch : entry.launches) {
    run_launch(launch, table.kernels[launch.kernel], functions[launch.kernel], num_tokens, places, stream);
  }
  return out;
}

}  // namespace moe_ops
