// All layers of a ternary Mamba-2, for one token of each sequence (decode) or for whole sequences (prefill):
//   x += out_proj(rms_norm(ssd(silu(conv([x, B, C] of in_proj(rms_norm(x))))) * silu(z)))
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

struct CUstream_st;

namespace ternary {

// The projections of one layer, wherever they lie.
struct DecodeLayer {
  const uint8_t *in_codes, *out_codes;
  const void *in_scales, *out_scales;
};

// L layers, b sequences, d = d_model, e = d_inner, h heads, n state size, c = e + 2 n channels of the
// convolution, r = e + c + h rows of in_proj: z, x, B, C, dt.
struct DecodeArgs {
  const int64_t* tokens;        // [b], or of prefill [b, length], or [length] with cu_seqlens
  const void* embedding;        // [vocab, d], of `type`, or int8 where it has scales
  const void* embedding_scale;  // [vocab] of scale_type, or null
  const void* norm;             // [L, d]
  const uint8_t* in_codes;      // [L, r, d / 4], see codes.h; on a CPU, where layers lie apart, of the first
  const void* in_scales;        // [L, r, d / in_group], or [L] where in_one_scale
  const void* conv_weight;      // [L, c, 4]
  const void* conv_bias;        // [L, c] or null
  void* conv_state;             // [L, b, 3, c]; prefill only writes the states: sequences begin
  const float* dt_bias;         // [L, h]
  const float* A;               // [L, h]
  const float* D;               // [L, h]
  void* ssm_state;              // [L, b, h, e / h, n]
  const void* gate_norm;        // [L, e]
  const uint8_t* out_codes;     // [L, d, e / 4]
  const void* out_scales;       // [L, d, e / out_group], or [L] where out_one_scale
  const DecodeLayer* layer;     // [L], for the CPU
  float* hidden;                // [tokens, d]: x after the last layer
  void* workspace;              // zeros at first, the kernel's own from then on; or the plan's buffers
  DType type;                   // of norms, convolution and its state: f16 or bf16
  DType scale_type, state_type;
  bool a8, fp8;  // both projections round their input: a8 on a CPU, fp8 in sm90's prefill
  bool in_one_scale, out_one_scale;
  int layers, batch, d_model, heads, head_dim, state_size;
  int64_t vocab;
  int in_group, out_group;
  float eps, dt_min, dt_max;  // dt_max infinity: no limit
  bool prefill = false;
  int64_t length = 1;
  const int32_t* cu_seqlens = nullptr;  // [b + 1] or null: a sequence is a row of tokens

  int64_t rows() const { return cu_seqlens ? length : batch * length; }
};

namespace sm90 {
struct DecodePlan;
}
// All return a cudaError_t. decode_sm90 takes a plan that expects nothing.
int plan_decode_sm90(const DecodeArgs& args, sm90::DecodePlan* plan);
int decode_sm90(const DecodeArgs& args, const sm90::DecodePlan& plan, CUstream_st* stream);

// What the tensors lack, or null; bytes for the workspace.
int plan_prefill_sm90(const DecodeArgs& args, const char** expected, int64_t* workspace);
int prefill_sm90(const DecodeArgs& args, CUstream_st* stream);

// On a CPU other operators' kernels run what is in a layer. These do what is between; work items are rows.

struct EmbedArgs {
  const int64_t* tokens;   // [b]
  const void* table;       // [vocab, d], of `type`, or int8 where it has scales
  const void* scale;       // [vocab] or null
  void* u;                 // [b, d]
  DType type, scale_type;  // of table and u; of scale
  int64_t dim;
};

struct ResidualArgs {
  float* x;            // [b, d]: the residual stream
  void* u;             // [b, d]: what is added to x, then x as rounded to `type`, then RMSNorm of that
  float* squares;      // [b, d]: of u before the norm
  const float* sums;   // [b]: of the squares
  const void* weight;  // [d]: the norm's
  DType type;          // of u and weight
  int64_t dim;
  float eps;
};

void embed_cpu(const EmbedArgs& args, int64_t begin, int64_t end);
void add_residual_cpu(const ResidualArgs& args, int64_t begin, int64_t end);
void norm_residual_cpu(const ResidualArgs& args, int64_t begin, int64_t end);

}  // namespace ternary
