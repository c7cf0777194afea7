// ternary_ssm._C: what this build is and what it runs on. Everything on tensors is in torch.ops.ternary.
#include <pybind11/pybind11.h>

#include "kernels/cpu/isa.h"
#include "kernels/sm90/decode/select.h"
#include "kernels/sm90/gemm/select.h"

#ifndef TERNARY_CUDA_VERSION
#define TERNARY_CUDA_VERSION nullptr
#endif

namespace py = pybind11;

static py::dict gemm_plan(int64_t m, int64_t n, int64_t k, int64_t group, bool one_scale, bool aligned,
                          int sms, bool fp8) {
  using namespace ternary::sm90;
  const GemmPlan plan = plan_gemm(m, n, k, group, one_scale, aligned, sms, fp8);
  const char* kernels[] = {"plain", "stream", "split", "tile"};
  return py::dict(py::arg("kernel") = kernels[static_cast<int>(plan.kernel)], py::arg("span") = plan.span,
                  py::arg("rows_of_x") = plan.rows_of_x, py::arg("blocks") = plan.blocks,
                  py::arg("cluster") = plan.cluster, py::arg("tiles") = plan.tiles,
                  py::arg("chunk") = plan.chunk, py::arg("warps") = plan.warps, py::arg("units") = plan.units,
                  py::arg("boxes") = plan.boxes, py::arg("steps") = plan.steps,
                  py::arg("workspace") = plan.workspace);
}

static py::dict decode_plan(int batch, int d_model, int heads, int head_dim, int in_groups, int out_groups,
                            int state_bytes, int sms) {
  using namespace ternary::sm90;
  const DecodePlan p =
      plan_decode({batch, d_model, heads, head_dim, in_groups, out_groups, state_bytes}, sms);
  if (p.kernel == DecodeKernel::sequence)
    return py::dict(py::arg("kernel") = "sequence", py::arg("persistent_expects") = p.persistent_expects);
  return py::dict(
      py::arg("kernel") = "persistent", py::arg("blocks") = p.blocks, py::arg("warps") = p.warps,
      py::arg("shared_tiles") = p.shared_tiles, py::arg("shared_blocks_units") = p.shared_blocks_units,
      py::arg("other_units") = p.other_units, py::arg("max_units") = p.max_units,
      py::arg("out_tiles") = p.out_tiles, py::arg("shared_bytes") = p.shared_bytes,
      py::arg("depths") = py::make_tuple(p.params.depth, p.in.depth, p.states.depth, p.out.depth));
}

PYBIND11_MODULE(_C, m) {
  m.def(
      "cpu_isa", [] { return ternary::name(ternary::isa()); },
      "Instruction set of the CPU kernels in use: portable, avx2 or avx512.");
  m.attr("cuda_version") = static_cast<const char*>(TERNARY_CUDA_VERSION);  // nvcc's, None without CUDA
  m.def("gemm_plan", &gemm_plan, "How gemm runs on a Hopper GPU (csrc/kernels/sm90/gemm/select.h).",
        py::arg("m"), py::arg("n"), py::arg("k"), py::arg("group"), py::arg("one_scale"), py::arg("aligned"),
        py::arg("sms"), py::arg("fp8") = false);
  m.attr("persistent_batch") = ternary::sm90::Decode::kMaxBatch;  // of decode's persistent kernel, at most
  m.def("decode_plan", &decode_plan, "How decode runs on a Hopper GPU (csrc/kernels/sm90/decode/select.h).",
        py::arg("batch"), py::arg("d_model"), py::arg("heads"), py::arg("head_dim"), py::arg("in_groups"),
        py::arg("out_groups"), py::arg("state_bytes"), py::arg("sms"));
}
