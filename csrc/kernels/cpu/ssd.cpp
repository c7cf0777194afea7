#include "kernels/ssd.h"

#include <algorithm>
#include <optional>

#include "kernels/cpu/recurrence.h"

// Heads that share B and C go through a tile of tokens one after another. With S a head's state before the
// tile, d_t a token's decay, e_i = d_0 ... d_i those since then and e_ij = d_j+1 ... d_i those between
// tokens,
//   y_i = e_i (S C_i) + sum_j<=i (e_ij dt_j (B_j C_i)) x_j,
//   the state after it = e_last S + sum_j (e_last,j dt_j x_j) B_j,
// which are products of matrices. A few tokens go through the recurrence itself, for which the state is read
// as one stream.
namespace ternary::TERNARY_ISA {
namespace {

constexpr int64_t kTile = 16;  // tokens: whole vectors; at n = 128 their B and C are 16 KiB and stay in L1
constexpr int64_t kFew = 4;    // tokens
constexpr int64_t kHeads = 4;  // whose states stay in L2
constexpr int kVectors = kTile / kLanes;
constexpr int kRows = 8 / kVectors;  // of the state: 8 sums at once hide an addition's latency
constexpr int64_t kAhead = 1024;     // floats of the state: what the memory takes to answer, at its speed

// What the heads of a group have in common of a tile. Rows are padded with zeros to whole vectors; where a
// lane is a token, those past the last hold anything.
struct Shared {
  int64_t n;     // padded
  Scratch B, C;  // [kTile, n]
  Scratch C_t;   // [n, kTile]
  Scratch BC;    // [kTile, kTile]: B_j C_i, a row a j

  explicit Shared(int64_t state_size)
      : n(round_up(state_size)), B(kTile * n), C(kTile * n), C_t(n * kTile), BC(kTile * kTile) {}

  void load(const SsdArgs& a, int64_t head, int64_t first, int64_t tokens) {
    const int64_t group = head / (a.heads / a.groups) * a.state_size;
    for (int64_t t = 0; t < tokens; ++t) {
      load_floats(a.B, a.type, (first + t) * a.B_stride + group, a.state_size, B + t * n);
      load_floats(a.C, a.type, (first + t) * a.C_stride + group, a.state_size, C + t * n);
    }
    if (tokens <= kFew) return;
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t j = 0; j < n; ++j) C_t[j * kTile + t] = C[t * n + j];
    for (int64_t j = 0; j < tokens; j += kRows) {
      Vec sums[kRows][kVectors] = {};
      times_C(B + j * n, sums);
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) store(BC + (j + r) * kTile + v * kLanes, sums[r][v]);
    }
  }

  // sums += rows [rows, n] times C of all tokens.
  template <int rows>
  void times_C(const float* from, Vec (&sums)[rows][kVectors]) const {
    for (int64_t j = 0; j < n; ++j)
      for (int r = 0; r < rows; ++r)
        for (int v = 0; v < kVectors; ++v)
          sums[r][v] += from[r * n + j] * TERNARY_ISA::load(C_t.data + j * kTile + v * kLanes);
  }
};

// The tokens of one head as floats.
struct Head {
  const Shared& shared;
  int64_t p, n;       // padded
  Scratch x, y;       // [kTile, p]
  Scratch z, D;       // [p]
  Scratch dt, decay;  // [kTile]
  Scratch since;      // [kTile]: e_i
  Scratch mix;        // [kTile, kTile]: what x_j counts for in each y, a row a j
  Scratch kept;       // [kTile, p]: what of x is in the state after the tile
  Scratch y_t;        // [p, kTile]

  Head(const Shared& shared, int64_t head_dim)
      : shared(shared),
        p(round_up(head_dim)),
        n(shared.n),
        x(kTile * p),
        y(kTile * p),
        z(p),
        D(p),
        dt(kTile),
        decay(kTile),
        since(kTile),
        mix(kTile * kTile),
        kept(kTile * p),
        y_t(p * kTile) {}

  void load_tokens(const SsdArgs& a, int64_t head, int64_t first, int64_t tokens) {
    for (int64_t t = 0; t < tokens; ++t) {
      dt[t] = load_float(a.dt, a.type, (first + t) * a.dt_stride + head);
      load_floats(a.x, a.type, (first + t) * a.x_stride + head * a.head_dim, a.head_dim, x + t * p);
    }
    const float bias = a.dt_bias ? a.dt_bias[head] : 0.0f;
    for (int64_t t = 0; t < tokens; t += kLanes) {
      const Vec step = step_size(load(dt + t) + bias, a.dt_softplus, a.dt_min, a.dt_max);
      store(dt + t, step);
      store(decay + t, TERNARY_ISA::decay(step * a.A[head]));
    }
    for (int64_t i = 0; a.D && i < a.head_dim; ++i) D[i] = a.D[head * a.D_size + (a.D_size == 1 ? 0 : i)];
  }

  void advance(float* state, int64_t head_dim, int64_t tokens) {
    int64_t row = 0;
    if (tokens <= kFew) {
      for (; row < head_dim; ++row) step(state + row * n, row, tokens);
      return;
    }
    weigh(tokens);
    for (; row + kRows <= head_dim; row += kRows) multiply<kRows>(state + row * n, row, tokens);
    for (; row < head_dim; ++row) multiply<1>(state + row * n, row, tokens);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < head_dim; ++i) y[t * p + i] = y_t[i * kTile + t];
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

 private:
  // Advances a row of the state by the recurrence.
  void step(float* state, int64_t row, int64_t tokens) {
    for (int64_t t = 0; t < tokens; ++t) {
      const float xdt = x[t * p + row] * dt[t];
      const float *const B = shared.B.data + t * n, *const C = shared.C.data + t * n;
      Vec out{};
      for (int64_t j = 0; j < n; j += kLanes) {
        if (t == 0 && j % 16 == 0) __builtin_prefetch(state + j + kAhead, 1);
        const Vec next = decay[t] * load(state + j) + xdt * load(B + j);
        store(state + j, next);
        out += next * load(C + j);
      }
      y[t * p + row] = sum(out);
    }
  }

  void weigh(int64_t tokens) {
    for (int64_t j = 0; j < tokens; ++j) {
      since[j] = decay[j] * (j ? since[j - 1] : 1.0f);
      float weight = dt[j];
      for (int64_t i = 0; i < tokens; ++i) {
        if (i > j) weight *= decay[i];
        mix[j * kTile + i] = i < j ? 0.0f : weight * shared.BC.data[j * kTile + i];
      }
      for (int64_t i = 0; i < p; ++i) kept[j * p + i] = weight * x[j * p + i];
    }
  }

  // y and the next state of rows of the state.
  template <int rows>
  void multiply(float* state, int64_t row, int64_t tokens) {
    Vec out[rows][kVectors] = {};
    shared.times_C(state, out);
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < kVectors; ++v) out[r][v] *= load(since + v * kLanes);
    for (int64_t t = 0; t < tokens; ++t)
      for (int r = 0; r < rows; ++r)
        for (int v = 0; v < kVectors; ++v)
          out[r][v] += x[t * p + row + r] * load(mix + t * kTile + v * kLanes);
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < kVectors; ++v) store(y_t + (row + r) * kTile + v * kLanes, out[r][v]);
    int64_t j = 0;
    for (; j + kTile <= n; j += kTile) keep<rows, kVectors>(state, row, j, tokens);
    for (; j < n; j += kLanes) keep<rows, 1>(state, row, j, tokens);
  }

  // Columns from j on of the next state.
  template <int rows, int vectors>
  void keep(float* state, int64_t row, int64_t j, int64_t tokens) {
    Vec next[rows][vectors];
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < vectors; ++v) next[r][v] = since[tokens - 1] * load(state + r * n + j + v * kLanes);
    for (int64_t t = 0; t < tokens; ++t)
      for (int r = 0; r < rows; ++r)
        for (int v = 0; v < vectors; ++v)
          next[r][v] += kept[t * p + row + r] * load(shared.B.data + t * n + j + v * kLanes);
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < vectors; ++v) store(state + r * n + j + v * kLanes, next[r][v]);
  }
};

}  // namespace

void ssd(const SsdArgs& a, int64_t begin, int64_t end) {
  Shared shared(a.state_size);
  Head tile(shared, a.head_dim);
  const int64_t per_group = a.heads / std::max<int64_t>(a.groups, 1);
  for (int64_t item = begin; item < end;) {
    const int64_t sequence = item / a.heads, head = item % a.heads;
    const int64_t heads = std::min({kHeads, per_group - head % per_group, end - item});
    const auto [first, last] = tokens_of(a, sequence);
    std::optional<State> states[kHeads];
    for (int64_t h = 0; h < heads; ++h)
      states[h].emplace(a, (item + h) * a.head_dim * a.state_size, a.head_dim, a.state_size);
    for (int64_t t = first; t < last; t += kTile) {
      const int64_t tokens = std::min(kTile, last - t);
      shared.load(a, head, t, tokens);
      for (int64_t h = head; h < head + heads; ++h) {
        tile.load_tokens(a, h, t, tokens);
        tile.advance(states[h - head]->data, a.head_dim, tokens);
        tile.store_tokens(a, h, t, tokens);
      }
    }
    for (int64_t h = 0; h < heads; ++h) states[h]->close();
    item += heads;
  }
}

}  // namespace ternary::TERNARY_ISA
