// What the operators over time share: where a sequence lies, padded rows of floats, the state being advanced.
#pragma once

#include <new>

#include "kernels/cpu/convert.h"
#include "kernels/cpu/vec_math.h"

namespace ternary::TERNARY_ISA {

inline int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Zeros, or anything if it will be written first, aligned to a cache line.
struct Scratch {
  float* data;

  explicit Scratch(int64_t n) : data(new (std::align_val_t(64)) float[n]()) {}
  static Scratch unset(int64_t n) { return Scratch(new (std::align_val_t(64)) float[n]); }
  ~Scratch() { ::operator delete[](data, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  operator float*() { return data; }

 private:
  explicit Scratch(float* data) : data(data) {}
};

struct Tokens {
  int64_t begin, end;  // in the batch seen as one row of b * l
};

template <class Args>
inline Tokens tokens_of(const Args& args, int64_t sequence) {
  if (args.cu_seqlens) return {args.cu_seqlens[sequence], args.cu_seqlens[sequence + 1]};
  return {sequence * args.length, (sequence + 1) * args.length};
}

// Rows of the state as floats, `stride` apart. They are final_state itself where that holds fp32 rows of
// whole vectors, otherwise a copy padded with zeros, which close() writes back.
class State {
 public:
  float* data;
  const int64_t stride;

  // The rows [rows, n] begin at element `first` of both states, which may be one memory.
  template <class Args>
  State(const Args& args, int64_t first, int64_t rows, int64_t n)
      : stride(round_up(n)),
        final_(args.final_state),
        dtype_(args.state_type),
        first_(first),
        rows_(rows),
        n_(n),
        in_place_(dtype_ == DType::f32 && n == stride),
        copy_(in_place_ ? 0 : rows * stride) {
    data = in_place_ ? static_cast<float*>(final_) + first : copy_;
    if (!args.initial_state)
      __builtin_memset(data, 0, sizeof(float) * rows * stride);
    else if (!in_place_ || args.initial_state != final_)
      for (int64_t i = 0; i < rows; ++i)
        load_floats(args.initial_state, dtype_, first + i * n, n, data + i * stride);
  }

  void close() {
    if (in_place_) return;
    for (int64_t i = 0; i < rows_; ++i) store_floats(data + i * stride, n_, final_, dtype_, first_ + i * n_);
  }

 private:
  void* final_;
  DType dtype_;
  int64_t first_, rows_, n_;
  bool in_place_;
  Scratch copy_;
};

// dt with its bias added -> the step size; a NaN stays one.
inline Vec step_size(Vec dt, bool use_softplus, float low, float high) {
  if (use_softplus) dt = softplus(dt);
  return min(broadcast(high), max(broadcast(low), dt));
}

// e^min(x, 0)
inline Vec decay(Vec x) { return exp(min(Vec{}, x)); }

}  // namespace ternary::TERNARY_ISA
