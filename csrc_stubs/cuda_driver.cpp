#include "cuda_driver.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "text.h"

namespace moe_ops::cuda {
namespace {

void* open_driver() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW);
  if (library == nullptr) fail("libcuda.so.1 cannot be opened (", dlerror(), "); install the NVIDIA driver");
  return library;
}

template <typename Pointer>
void find(void* library, const char* name, Pointer& pointer) {
  pointer = reinterpret_cast<Pointer>(dlsym(library, name));
  if (pointer == nullptr) fail("libcuda.so.1 has no ", name, "; install a newer NVIDIA driver");
}

Driver make_driver() {
  void* const library = open_driver();
  Driver driver{};
#define MOE_OPS_FIND(name) find(library, #name, driver.name)
  MOE_OPS_FIND(cuCtxGetCurrent);
  MOE_OPS_FIND(cuCtxSetCurrent);
  MOE_OPS_FIND(cuDevicePrimaryCtxRetain);
  MOE_OPS_FIND(cuDeviceGetAttribute);
  MOE_OPS_FIND(cuModuleLoadData);
  MOE_OPS_FIND(cuModuleGetFunction);
  MOE_OPS_FIND(cuFuncSetAttribute);
  MOE_OPS_FIND(cuFuncSetCacheConfig);
  MOE_OPS_FIND(cuTensorMapEncodeTiled);
  MOE_OPS_FIND(cuLaunchKernelEx);
  MOE_OPS_FIND(cuGetErrorString);
#undef MOE_OPS_FIND
  return driver;
}

using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);

// From the library that has it, which is there where a CUDA tensor is: linked to, it would keep us from a CPU build.
CurrentStream find_current_stream() {
  void* const library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
  void* const found = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
  if (found == nullptr) fail("libtorch_cuda.so is not loaded: this libtorch has no CUDA support; install one that has");
  return reinterpret_cast<CurrentStream>(found);
}

}  // namespace

const Driver& driver() {
  static const Driver driver = make_driver();
  return driver;
}

void check(int result, const char* what) {
  if (result == 0) return;
  const char* words = nullptr;
  driver().cuGetErrorString(result, &words);
  fail(what, " failed: ", words == nullptr ? "CUDA error " + std::to_string(result) : words);
}

void ensure_context(int device) {
  Context context = nullptr;
  check(driver().cuCtxGetCurrent(&context), "cuCtxGetCurrent");
  if (context != nullptr) return;
  check(driver().cuDevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain");
  check(driver().cuCtxSetCurrent(context), "cuCtxSetCurrent");
}

Stream current_stream(int device) {
  static const CurrentStream find_stream = find_current_stream();
  void* stream = nullptr;
  if (find_stream(device, &stream) != AOTI_TORCH_SUCCESS) fail("cuda:", device, " has no current stream");
  return static_cast<Stream>(stream);
}

}  // namespace moe_ops::cuda
