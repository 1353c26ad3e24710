// The CUDA kernel with a driver that writes down what it is asked for, and with CPU tensors: one op, `fused_moe_tma`.
//
// It is linked in the place of csrc_stubs/cuda_driver.cpp. FAKE_CUDA names two files: .sizes has the bytes of the
// parameters of each kernel of the table, a line a kernel; .log is written. A tensor map holds the number of its line.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>

#include "cuda_driver.h"
#include "fused_moe_cuda.h"
#include "op_schema.h"

// CPU tensors have no device to make the current one.
extern "C" AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle*) { return AOTI_TORCH_SUCCESS; }
extern "C" AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

namespace moe_ops::cuda {
namespace {

std::string file(const char* suffix) { return std::getenv("FAKE_CUDA") + std::string(suffix); }

std::ostream& log() {
  static std::ofstream stream(file(".log"));
  return stream;
}

template <typename T>
void list(const T* values, size_t count) {
  for (size_t i = 0; i < count; ++i) log() << " " << values[i];
}

int get_attribute(int* value, int attribute, int) {
  *value = attribute == kCapabilityMajor ? 9 : attribute == kCapabilityMinor ? 0 : 132;
  return 0;
}

// Kernels are loaded in the table's order; the handle of one is its number, from 1 on.
int get_function(Function* function, Module, const char*) {
  static intptr_t number = 0;
  *function = reinterpret_cast<Function>(++number);
  return 0;
}

int set_attribute(Function function, int attribute, int value) {
  log() << "set " << reinterpret_cast<intptr_t>(function) - 1 << " " << attribute << " " << value << "\n";
  return 0;
}

int encode(TensorMap* map, int dtype, uint32_t rank, void* address, const uint64_t* shape, const uint64_t* strides,
           const uint32_t* box, const uint32_t* steps, int interleave, int swizzle, int promotion, int fill) {
  static uint64_t number = 0;
  map->opaque[0] = number++;
  log() << "map " << dtype << " " << reinterpret_cast<uintptr_t>(address) << " " << interleave << " " << swizzle << " "
        << promotion << " " << fill;
  list(shape, rank);
  list(strides, rank - 1);
  list(box, rank);
  list(steps, rank);
  log() << "\n";
  return 0;
}

int launch(const LaunchConfig* config, Function function, void** parameters, void** extra) {
  const intptr_t number = reinterpret_cast<intptr_t>(function) - 1;
  std::ifstream sizes(file(".sizes"));
  std::string line;
  for (intptr_t i = 0; i <= number; ++i) std::getline(sizes, line);
  log() << "launch " << number << " " << config->grid_x << " " << config->grid_y << " " << config->grid_z << " "
        << config->block_x << " " << config->block_y << " " << config->block_z << " " << config->shared_bytes << " "
        << config->num_attributes << " " << config->attributes->id << " " << config->attributes->value.number << " "
        << (extra == nullptr) << std::hex;
  std::istringstream words(line);
  for (size_t size, i = 0; words >> size; ++i) {
    log() << " ";
    for (size_t byte = size; byte-- > 0;) {
      const unsigned value = static_cast<unsigned char*>(parameters[i])[byte];
      log() << (value < 16 ? "0" : "") << value;
    }
  }
  log() << std::dec << std::endl;
  return 0;
}

}  // namespace

const Driver& driver() {
  static const Driver fake = [] {
    Driver result{};
    result.cuDeviceGetAttribute = get_attribute;
    result.cuModuleLoadData = [](Module*, const void*) { return 0; };
    result.cuModuleGetFunction = get_function;
    result.cuFuncSetAttribute = set_attribute;
    result.cuFuncSetCacheConfig = [](Function, int) { return 0; };
    result.cuTensorMapEncodeTiled = encode;
    result.cuLaunchKernelEx = launch;
    return result;
  }();
  return fake;
}

void check(int, const char*) {}
void ensure_context(int) {}
Stream current_stream(int) { return nullptr; }

}  // namespace moe_ops::cuda

namespace {

using moe_ops::ScalarType;
using moe_ops::Tensor;

Tensor on_fake(MOE_OPS_PARAMETERS) { return moe_ops::fused_moe_cuda(MOE_OPS_ARGUMENTS); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MOE_OPS_NAMESPACE, m) { m.def(moe_ops::kFusedMoeSchema); }

STABLE_TORCH_LIBRARY_IMPL(MOE_OPS_NAMESPACE, CPU, m) { m.impl("fused_moe_tma", TORCH_BOX(&on_fake)); }
