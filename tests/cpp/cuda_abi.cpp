// Compiles if the driver's declarations in csrc_stubs/cuda_driver.h are those of cuda.h.
#include <cuda.h>

#include <type_traits>

#include "cuda_driver.h"

using namespace moe_ops::cuda;

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) % alignof(CUtensorMap) == 0);
static_assert(sizeof(LaunchAttribute) == sizeof(CUlaunchAttribute));
static_assert(offsetof(LaunchAttribute, value) == offsetof(CUlaunchAttribute, value));
static_assert(sizeof(LaunchConfig) == sizeof(CUlaunchConfig));
static_assert(offsetof(LaunchConfig, grid_x) == offsetof(CUlaunchConfig, gridDimX));
static_assert(offsetof(LaunchConfig, block_x) == offsetof(CUlaunchConfig, blockDimX));
static_assert(offsetof(LaunchConfig, shared_bytes) == offsetof(CUlaunchConfig, sharedMemBytes));
static_assert(offsetof(LaunchConfig, stream) == offsetof(CUlaunchConfig, hStream));
static_assert(offsetof(LaunchConfig, attributes) == offsetof(CUlaunchConfig, attrs));
static_assert(offsetof(LaunchConfig, num_attributes) == offsetof(CUlaunchConfig, numAttrs));
static_assert(kDependentLaunch == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
static_assert(kMaxDynamicShared == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
static_assert(kPreferShared == CU_FUNC_CACHE_PREFER_SHARED);
static_assert(kMultiprocessors == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
static_assert(kCapabilityMajor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
static_assert(kCapabilityMinor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
static_assert(kPromoteTo128Bytes == CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
static_assert(kPlain == CU_TENSOR_MAP_INTERLEAVE_NONE && kPlain == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);

static_assert(std::is_same_v<Function, CUfunction> && std::is_same_v<Stream, CUstream>);
static_assert(std::is_same_v<decltype(&cuTensorMapEncodeTiled),
                             CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                          const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                                          CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                          CUtensorMapFloatOOBfill)>);
static_assert(sizeof(cuuint32_t) == 4 && sizeof(cuuint64_t) == 8 && sizeof(CUresult) == 4);
static_assert(std::is_same_v<decltype(&cuLaunchKernelEx),
                             CUresult (*)(const CUlaunchConfig*, CUfunction, void**, void**)>);
