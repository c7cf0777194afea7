#include "kernels/decode.h"

#include <cmath>

#include "kernels/cpu/recurrence.h"

namespace ternary::TERNARY_ISA {

void embed(const EmbedArgs& a, int64_t begin, int64_t end) {
  Scratch row(a.dim);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t token = a.tokens[i], first = token * a.dim;
    if (a.scale) {
      const float scale = load_float(a.scale, a.scale_type, token);
      for (int64_t j = 0; j < a.dim; ++j) row[j] = scale * static_cast<const int8_t*>(a.table)[first + j];
    } else {
      load_floats(a.table, a.type, first, a.dim, row);
    }
    store_floats(row, a.dim, a.u, a.type, i * a.dim);
  }
}

void add_residual(const ResidualArgs& a, int64_t begin, int64_t end) {
  Scratch u(a.dim);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i * a.dim;
    float *x = a.x + first, *squares = a.squares + first;
    load_floats(a.u, a.type, first, a.dim, u);
    for (int64_t j = 0; j < a.dim; ++j) x[j] += u[j];
    store_floats(x, a.dim, a.u, a.type, first);
    load_floats(a.u, a.type, first, a.dim, u);
    for (int64_t j = 0; j < a.dim; ++j) squares[j] = u[j] * u[j];
  }
}

void norm_residual(const ResidualArgs& a, int64_t begin, int64_t end) {
  Scratch u(a.dim), weight(a.dim);
  load_floats(a.weight, a.type, 0, a.dim, weight);
  for (int64_t i = begin; i < end; ++i) {
    const float scale = 1.0f / std::sqrt(a.sums[i] / static_cast<float>(a.dim) + a.eps);
    load_floats(a.u, a.type, i * a.dim, a.dim, u);
    for (int64_t j = 0; j < a.dim; ++j) u[j] = u[j] * scale * weight[j];
    store_floats(u, a.dim, a.u, a.type, i * a.dim);
  }
}

}  // namespace ternary::TERNARY_ISA
