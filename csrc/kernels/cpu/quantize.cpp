#include "kernels/quantize.h"

#include "kernels/codes.h"
#include "kernels/cpu/convert.h"

namespace ternary::TERNARY_ISA {
namespace {

constexpr int kRun = 256;  // weights at a time between their dtype and fp32

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The first of all threads' finds; only ever called on the way to an error.
void refuse(int64_t* first, int64_t found) {
  int64_t seen = __atomic_load_n(first, __ATOMIC_RELAXED);
  while (found < seen &&
         !__atomic_compare_exchange_n(first, &seen, found, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
}

bool finite(double v) { return v - v == 0; }

// Of weights first .. first + n; in eight sums, which makes vectors of the additions.
double absolute_sum(const QuantizeArgs& a, int64_t first, int64_t n) {
  double sums[8] = {};
  for (int64_t i = 0; i < n; i += kRun) {
    float w[kRun];
    const int64_t count = least(kRun, n - i);
    load_floats(a.weight, a.weight_type, first + i, count, w);
    for (int64_t j = count; j % 8; ++j) w[j] = 0;
    for (int64_t j = 0; j < count; j += 8)
      for (int lane = 0; lane < 8; ++lane) sums[lane] += __builtin_fabsf(w[j + lane]);
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

float mean(const QuantizeArgs& a, int64_t group) {
  if (!a.one_scale) return static_cast<float>(a.sums[group] / static_cast<double>(a.group));
  double sum = 0;
  for (int64_t row = 0; row < a.n; ++row) sum += a.sums[row];
  return static_cast<float>(sum / static_cast<double>(a.n * a.k));
}

float rounded(float v, DType dtype) {
  float storage;
  store_float(v, &storage, dtype, 0);
  return load_float(&storage, dtype, 0);
}

void encode(const QuantizeArgs& a, int64_t first, int64_t n, float scale) {
  for (int64_t i = 0; i < n; i += kRun) {
    float w[kRun];
    int8_t ternary[kRun];
    const int64_t count = least(kRun, n - i);
    load_floats(a.weight, a.weight_type, first + i, count, w);
    // |w| / scale > 1/2 without the quotient's rounding: doubling is exact.
    for (int64_t j = 0; j < count; ++j)
      ternary[j] = 2 * __builtin_fabsf(w[j]) > scale ? (w[j] > 0 ? 1 : -1) : 0;
    if (a.codes) {
      for (int64_t j = 0; j < count; j += 4) a.codes[(first + i + j) / 4] = pack_byte(ternary + j);
    } else {
      for (int64_t j = 0; j < count; ++j) w[j] = static_cast<float>(ternary[j]) * scale;
      store_floats(w, count, a.rounded, a.rounded_type, first + i);
    }
  }
}

}  // namespace

void absolute_sums(const QuantizeArgs& a, int64_t begin, int64_t end) {
  const int64_t groups = a.k / a.group;
  for (int64_t i = begin * groups; i < end * groups; ++i) {
    a.sums[i] = absolute_sum(a, i * a.group, a.group);
    if (finite(a.sums[i])) continue;
    int64_t weight = i * a.group;
    while (finite(load_float(a.weight, a.weight_type, weight))) ++weight;
    refuse(&a.refused[0], weight);
  }
}

void quantize(const QuantizeArgs& a, int64_t begin, int64_t end) {
  const int64_t groups = a.k / a.group;
  float scale = 0;
  for (int64_t i = begin * groups; i < end * groups; ++i) {
    if (!a.one_scale || i == begin) {
      scale = rounded(mean(a, i), a.scale_type);
      if (!finite(scale)) refuse(&a.refused[1], a.one_scale ? 0 : i);
    }
    if (a.scales && (!a.one_scale || i == 0)) store_float(scale, a.scales, a.scale_type, i);
    encode(a, i * a.group, a.group, scale);
  }
}

void pack(const PackArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin * a.k; i < end * a.k; i += kWeightsPerByte) {
    a.codes[i / kWeightsPerByte] = pack_byte(a.ternary + i);
    for (int64_t j = i; j < i + kWeightsPerByte; ++j)
      if (a.ternary[j] < -1 || a.ternary[j] > 1)
        refuse(a.refused, j << 8 | static_cast<uint8_t>(a.ternary[j]));
  }
}

void unpack(const UnpackArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin * a.k; i < end * a.k; ++i) a.ternary[i] = static_cast<int8_t>(weight_at(a.codes, i));
}

void first_invalid(const FirstInvalidArgs& a, int64_t begin, int64_t end) {
  const auto invalid = [&](int64_t i) -> uint8_t { return a.codes[i] & ~(a.codes[i] << 1) & 0xaa; };
  for (int64_t i = begin; i < end; i += kRun) {
    const int64_t last = least(i + kRun, end);
    uint8_t found = 0;
    for (int64_t j = i; j < last; ++j) found |= invalid(j);
    if (!found) continue;
    while (!invalid(i)) ++i;
    int field = 0;
    while (!(invalid(i) >> 2 * field & 2)) ++field;
    return refuse(a.first, i * kWeightsPerByte + field);
  }
}

void dequantize(const DequantizeArgs& a, int64_t begin, int64_t end) {
  const int64_t groups = a.k / a.group;
  for (int64_t group = begin * groups; group < end * groups; ++group) {
    const float scale = load_float(a.scales, a.scale_type, a.one_scale ? 0 : group);
    const int64_t last = (group + 1) * a.group;
    for (int64_t i = group * a.group; i < last; i += kRun) {
      float w[kRun];
      const int64_t count = least(kRun, last - i);
      for (int64_t j = 0; j < count; ++j) w[j] = static_cast<float>(weight_at(a.codes, i + j)) * scale;
      store_floats(w, count, a.weight, a.weight_type, i);
    }
  }
}

}  // namespace ternary::TERNARY_ISA
