// What the CUDA kernel asks of the driver, libcuda.so.1, which is opened at the first call: the library builds and
// loads where there is none. The declarations are those of cuda.h, which may be absent too; tests/cpp/test_cuda.py
// compares.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moe_ops::cuda {

using Function = struct CUfunc_st*;
using Module = struct CUmod_st*;
using Context = struct CUctx_st*;
using Stream = struct CUstream_st*;

struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

struct LaunchAttribute {
  int id;
  char padding[4];
  union {
    char bytes[64];
    int number;
  } value;
};

struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z;
  unsigned block_x, block_y, block_z;
  unsigned shared_bytes;
  Stream stream;
  LaunchAttribute* attributes;
  unsigned num_attributes;
};

constexpr int kDependentLaunch = 6;            // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
constexpr int kMaxDynamicShared = 8;           // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kPreferShared = 1;               // CU_FUNC_CACHE_PREFER_SHARED
constexpr int kMultiprocessors = 16;           // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
constexpr int kCapabilityMajor = 75;           // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
constexpr int kCapabilityMinor = 76;           // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
constexpr int kPromoteTo128Bytes = 2;          // CU_TENSOR_MAP_L2_PROMOTION_L2_128B
constexpr int kPlain = 0;                      // CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE
constexpr unsigned kSharedWithoutAsking = 48 * 1024;

// Functions of the driver; each returns a CUresult, 0 for success.
struct Driver {
  int (*cuCtxGetCurrent)(Context*);
  int (*cuCtxSetCurrent)(Context);
  int (*cuDevicePrimaryCtxRetain)(Context*, int device);
  int (*cuDeviceGetAttribute)(int* value, int attribute, int device);
  int (*cuModuleLoadData)(Module*, const void* image);
  int (*cuModuleGetFunction)(Function*, Module, const char* name);
  int (*cuFuncSetAttribute)(Function, int attribute, int value);
  int (*cuFuncSetCacheConfig)(Function, int config);
  int (*cuTensorMapEncodeTiled)(TensorMap*, int dtype, uint32_t rank, void* address, const uint64_t* shape,
                                const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                                int interleave, int swizzle, int promotion, int fill);
  int (*cuLaunchKernelEx)(const LaunchConfig*, Function, void** parameters, void** extra);
  int (*cuGetErrorString)(int result, const char** text);
};

// Opened once; throws std::runtime_error where there is no driver.
const Driver& driver();

// Throws std::runtime_error with the driver's words unless `result` is a success.
void check(int result, const char* what);

// Makes the device's context, which libtorch uses too, the thread's, if the thread has none.
void ensure_context(int device);

// Torch's stream of this thread and device.
Stream current_stream(int device);

}  // namespace moe_ops::cuda
