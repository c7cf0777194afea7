#include "kernels/ssd.h"

#include "kernels/cpu/recurrence.h"

namespace ternary::TERNARY_ISA {
namespace {

constexpr int64_t kTile = 16;  // tokens a tile: at n = 128 their B and C are 16 KiB and stay in L1
constexpr int64_t kRows = 4;   // rows of the state advanced together: each B and C loaded serves all of them
constexpr int64_t kAhead = 1024;  // floats of the state: what the memory takes to answer, at its speed

// Tokens of one head as floats. Rows are padded with zeros to whole vectors.
struct Tile {
  int64_t p, n;       // padded
  Scratch B, C;       // [kTile, n]
  Scratch x, y;       // [kTile, p]
  Scratch z, D;       // [p]
  Scratch dt, decay;  // [kTile]

  Tile(int64_t head_dim, int64_t state_size)
      : p(round_up(head_dim)),
        n(round_up(state_size)),
        B(kTile * n),
        C(kTile * n),
        x(kTile * p),
        y(kTile * p),
        z(p),
        D(p),
        dt(kTile),
        decay(kTile) {}

  void load_skip(const SsdArgs& a, int64_t head) {
    for (int64_t i = 0; a.D && i < a.head_dim; ++i) D[i] = a.D[head * a.D_size + (a.D_size == 1 ? 0 : i)];
  }

  void load_tokens(const SsdArgs& a, int64_t head, int64_t first, int64_t tokens) {
    const int64_t group = head / (a.heads / a.groups) * a.state_size;
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t token = first + t;
      dt[t] = load_float(a.dt, a.type, token * a.dt_stride + head);
      load_floats(a.x, a.type, token * a.x_stride + head * a.head_dim, a.head_dim, x + t * p);
      load_floats(a.B, a.type, token * a.B_stride + group, a.state_size, B + t * n);
      load_floats(a.C, a.type, token * a.C_stride + group, a.state_size, C + t * n);
    }
    const float bias = a.dt_bias ? a.dt_bias[head] : 0.0f;
    for (int64_t t = 0; t < tokens; t += kLanes) {
      const Vec step = step_size(load(dt + t) + bias, a.dt_softplus, a.dt_min, a.dt_max);
      store(dt + t, step);
      store(decay + t, TERNARY_ISA::decay(step * a.A[head]));
    }
  }

  // Advances `rows` rows of the state, from `row` on, through the tile's tokens; y = S C.
  template <int rows>
  void advance(float* state, int64_t row, int64_t tokens) {
    for (int64_t t = 0; t < tokens; ++t) {
      float xdt[rows];
      Vec out[rows] = {};
      for (int r = 0; r < rows; ++r) xdt[r] = x[t * p + row + r] * dt[t];
      for (int64_t j = 0; j < n; j += kLanes) {
        const Vec b = load(B + t * n + j), c = load(C + t * n + j);
        for (int r = 0; r < rows; ++r) {
          float* s = state + (row + r) * n + j;
          if (rows == 1 && j % 16 == 0) __builtin_prefetch(s + kAhead, 1);
          const Vec next = decay[t] * load(s) + xdt[r] * b;
          store(s, next);
          out[r] += next * c;
        }
      }
      for (int r = 0; r < rows; ++r) y[t * p + row + r] = sum(out[r]);
    }
  }

  void store_tokens(const SsdArgs& a, int64_t head, int64_t first, int64_t tokens) {
    for (int64_t t = 0; t < tokens; ++t) {
      float* out = y + t * p;
      for (int64_t i = 0; i < p; i += kLanes)
        store(out + i, load(out + i) + load(D + i) * load(x + t * p + i));
      if (a.z) {
        load_floats(a.z, a.type, (first + t) * a.z_stride + head * a.head_dim, a.head_dim, z);
        for (int64_t i = 0; i < p; i += kLanes) store(out + i, load(out + i) * silu(load(z + i)));
      }
      store_floats(out, a.head_dim, a.y, a.type, ((first + t) * a.heads + head) * a.head_dim);
    }
  }
};

}  // namespace

void ssd(const SsdArgs& a, int64_t begin, int64_t end) {
  Tile tile(a.head_dim, a.state_size);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sequence = item / a.heads, head = item % a.heads;
    const auto [first, last] = tokens_of(a, sequence);
    State state(a, item * a.head_dim * a.state_size, a.head_dim, a.state_size);
    tile.load_skip(a, head);
    for (int64_t t = first; t < last; t += kTile) {
      const int64_t tokens = last - t < kTile ? last - t : kTile;
      tile.load_tokens(a, head, t, tokens);
      int64_t row = 0;
      if (tokens > 1)  // else the state is all there is to read: as one stream
        for (; row + kRows <= a.head_dim; row += kRows) tile.advance<kRows>(state.data, row, tokens);
      for (; row < a.head_dim; ++row) tile.advance<1>(state.data, row, tokens);
      tile.store_tokens(a, head, t, tokens);
    }
    state.close();
  }
}

}  // namespace ternary::TERNARY_ISA
