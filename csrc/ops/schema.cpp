// Every operator of the package, declared once.
// register_*.cpp binds the kernels; python/ternary_ssm/ops.py adds the fakes and the gradients;
// python/ternary_ssm/reference says in plain PyTorch what each one computes.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ternary, m) {
  m.def("quantize(Tensor weight, int group_size, ScalarType scale_dtype) -> (Tensor codes, Tensor scales)");
  m.def("fake_quantize(Tensor latent, int group_size, ScalarType scale_dtype, ScalarType dtype) -> Tensor");
  m.def("pack(Tensor ternary) -> Tensor");
  m.def("unpack(Tensor codes) -> Tensor");
  m.def("first_invalid(Tensor codes) -> int");
  m.def("dequantize(Tensor codes, Tensor scales, ScalarType dtype) -> Tensor");
  m.def("quantize_fp8(Tensor x) -> (Tensor q, Tensor scale)");
  m.def("gemm(Tensor x, Tensor codes, Tensor scales, Tensor? bias=None, str activations=\"a16\") -> Tensor");
  m.def("int8_linear(Tensor x, Tensor table, Tensor scale) -> Tensor");

  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias=None, Tensor? initial_state=None, "
      "Tensor? cu_seqlens=None, bool silu=True) -> (Tensor y, Tensor final_state)");
  m.def(
      "causal_conv1d_update(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias=None, bool silu=True) "
      "-> Tensor");

  m.def(
      "selective_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, "
      "Tensor? dt_bias=None, bool dt_softplus=True, Tensor? initial_state=None, Tensor? cu_seqlens=None) "
      "-> (Tensor y, Tensor final_state)");
  m.def(
      "selective_scan_fused(Tensor x, Tensor dt, Tensor dt_weight, Tensor? dt_scales, Tensor A, Tensor B, "
      "Tensor C, Tensor? D=None, Tensor? z=None, Tensor? dt_bias=None, Tensor? initial_state=None, "
      "Tensor? cu_seqlens=None) -> (Tensor y, Tensor final_state)");
  m.def(
      "selective_scan_update(Tensor x, Tensor(a!) state, Tensor dt, Tensor A, Tensor B, Tensor C, "
      "Tensor? D=None, Tensor? z=None, Tensor? dt_bias=None, bool dt_softplus=True) -> Tensor");

  m.def(
      "ssd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, "
      "Tensor? dt_bias=None, bool dt_softplus=True, float dt_min=0.0, float? dt_max=None, "
      "Tensor? initial_state=None, Tensor? cu_seqlens=None) -> (Tensor y, Tensor final_state)");
  m.def(
      "ssd_update(Tensor x, Tensor(a!) state, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, "
      "Tensor? z=None, Tensor? dt_bias=None, bool dt_softplus=True, float dt_min=0.0, float? dt_max=None) "
      "-> Tensor");

  m.def(
      "rms_norm_gated(Tensor y, Tensor z, Tensor weight, int groups, float eps, bool norm_before_gate) "
      "-> Tensor");
  m.def(
      "distillation(Tensor(a!) student, Tensor teacher, Tensor labels, float kl_weight, float temperature) "
      "-> (Tensor kl, Tensor ce)");
  m.def("add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps) -> Tensor");

  m.def(
      "decode(Tensor tokens, Tensor embedding, Tensor? embedding_scale, Tensor norm, Tensor[] in_codes, "
      "Tensor[] in_scales, Tensor conv_weight, Tensor? conv_bias, Tensor(a!) conv_state, Tensor dt_bias, "
      "Tensor A, Tensor D, Tensor(b!) ssm_state, Tensor gate_norm, Tensor[] out_codes, Tensor[] out_scales, "
      "Tensor(c!) workspace, float eps, float dt_min=0.0, float? dt_max=None, str activations=\"a16\") -> "
      "Tensor");
  m.def(
      "prefill(Tensor tokens, Tensor? cu_seqlens, Tensor embedding, Tensor? embedding_scale, Tensor norm, "
      "Tensor[] in_codes, Tensor[] in_scales, Tensor conv_weight, Tensor? conv_bias, Tensor(a!) conv_state, "
      "Tensor dt_bias, Tensor A, Tensor D, Tensor(b!) ssm_state, Tensor gate_norm, Tensor[] out_codes, "
      "Tensor[] out_scales, float eps, float dt_min=0.0, float? dt_max=None, str activations=\"a16\") -> "
      "Tensor");
  m.def("head(Tensor hidden, Tensor norm, Tensor table, Tensor? scale=None, float eps=1e-05) -> Tensor");
  m.def("choose(Tensor logits, int vocab_size, Tensor(a!) tokens, Tensor(b!) chosen, Tensor(c!) step) -> ()");
}
