// Registers the schemas and the kernels when the library is loaded, unless somebody has done so before.
//
// There is no fake here: one in C++ would see numbers instead of symbols, and compile anew for every size.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <exception>

#include "checks.h"
#include "fused_moe.h"
#include "fused_moe_cuda.h"
#include "op_schema.h"
#include "products.h"
#include "routing.h"
#include "text.h"

namespace moe_ops {
namespace {

Tensor fused_moe_cpu(MOE_OPS_PARAMETERS) {
  const Arguments args = MOE_OPS_ARGUMENTS;
  return fused_moe(args, make_problem(args));
}

Tensor fused_moe_on_cuda(MOE_OPS_PARAMETERS) { return fused_moe_cuda(MOE_OPS_ARGUMENTS); }

// Through the dispatcher, which notes that `out` has changed, or refuses. The stable ABI cannot ask it beforehand.
void copy_result(Tensor out, const Tensor& result) {
  try {
    copy(out, result);
  } catch (const std::exception&) {
    fail("out requires grad, and the op has no backward: pass out.detach(), or call it in torch.no_grad(); or out was ",
         "made in torch.inference_mode(): call it there too");
  }
}

void fused_moe_out_cpu(const Tensor& out, MOE_OPS_PARAMETERS) {
  const Arguments args = MOE_OPS_ARGUMENTS;
  const Problem problem = make_problem(args);
  check_out(out, args, problem.out_shape(), problem.out_dtype);
  copy_result(out, fused_moe(args, problem));
}

void fused_moe_out_on_cuda(const Tensor& out, MOE_OPS_PARAMETERS) {
  const Arguments args = MOE_OPS_ARGUMENTS;
  const Tensor result = fused_moe_cuda(args);
  check_out(out, args, {result.sizes().begin(), result.sizes().end()}, result.scalar_type());
  copy_result(out, result);
}

// Whether this library defined the schemas. Where Python came first, its kernels stay too.
bool defined = false;

}  // namespace
}  // namespace moe_ops

STABLE_TORCH_LIBRARY_FRAGMENT(MOE_OPS_NAMESPACE, m) {
  // An exception that leaves a static initialiser ends the process. The first schema that is there already means that
  // all are.
  try {
    m.def(moe_ops::kFusedMoeSchema);
    m.def(moe_ops::kFusedMoeOutSchema);
    m.def(moe_ops::kRouteSchema);
    m.def(moe_ops::kNoBackwardSchema);
    moe_ops::defined = true;
  } catch (const std::exception&) {
  }
}

STABLE_TORCH_LIBRARY_IMPL(MOE_OPS_NAMESPACE, CPU, m) {
  if (!moe_ops::defined) return;
  m.impl("fused_moe_tma", TORCH_BOX(&moe_ops::fused_moe_cpu));
  m.impl("fused_moe_tma_", TORCH_BOX(&moe_ops::fused_moe_out_cpu));
  m.impl("route", TORCH_BOX(&moe_ops::route));
}

STABLE_TORCH_LIBRARY_IMPL(MOE_OPS_NAMESPACE, CUDA, m) {
  if (!moe_ops::defined) return;
  m.impl("fused_moe_tma", TORCH_BOX(&moe_ops::fused_moe_on_cuda));
  m.impl("fused_moe_tma_", TORCH_BOX(&moe_ops::fused_moe_out_on_cuda));
}
