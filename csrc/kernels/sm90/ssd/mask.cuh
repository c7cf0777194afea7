// M of a chunk from C B^T, by one warp.
#pragma once

#include "kernels/sm90/ssd/chunk.cuh"

namespace ternary::sm90 {

// The decays that take scores to M. Of the 16 rows of a warp, those from tokens before them are taken to
// their start and on to the row; those of the 16 tokens themselves straight. Sums as UnitWorker has them.
template <class Element>
class Mask {
 public:
  float2 logs;  // log2 of the decays through the tokens of the lane's two rows

  __device__ Mask(const ChunkDecays& decays, int warp, int lane) : warp(warp), lane(lane) {
    const auto* all_logs = reinterpret_cast<const float*>(decays.tokens);
    const int row = 16 * warp + lane / 4, at = row / 2 * 4 + row % 2;
    logs = {all_logs[at], all_logs[at + 16]};
    const float start = warp == 0 ? 0.0f : decays.tokens[8 * warp - 1].y;
#pragma unroll
    for (int i = 0; i < 6; ++i) before[i] = decays.across[max(warp - 1, 0)][4 * i + lane % 4];
#pragma unroll
    for (int i = 0; i < 2; ++i) own[i] = decays.tokens[8 * warp + 4 * i + lane % 4];
    onward = {exp2_approximate(logs.x - start), exp2_approximate(logs.y - start)};
  }

  // M with `skip` on its diagonal.
  __device__ void apply(uint32_t (&frag)[4][4], const float (&scores)[32], float skip) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // eight tokens
      uint32_t* pair = &frag[i / 2][i % 2 * 2];
      const float* s = &scores[4 * i];
      pair[0] = pair[1] = 0;
      if (i >= 6 || i / 2 >= warp) continue;
      pair[0] = pack_floats<Element>(s[0] * before[i].x * onward.x, s[1] * before[i].y * onward.x);
      pair[1] = pack_floats<Element>(s[2] * before[i].x * onward.y, s[3] * before[i].y * onward.y);
    }
    if (warp == 0) apply_own<0>(frag[0], scores, skip);
    if (warp == 1) apply_own<1>(frag[1], scores, skip);
    if (warp == 2) apply_own<2>(frag[2], scores, skip);
    if (warp == 3) apply_own<3>(frag[3], scores, skip);
  }

 private:
  const int warp, lane;
  float2 onward;     // from the start of the 16 to the lane's rows
  float2 before[6];  // to the start, with dt: of the lane's two tokens of every eight before
  float4 own[2];     // of its tokens among the 16: log2 of the decays through them, dt

  // The warp's own 16 tokens.
  template <int kWarp>
  __device__ void apply_own(uint32_t (&frag)[4], const float (&scores)[32], float skip) const {
    const int row = lane / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 from = own[i];
      float m[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int later = row + j / 2 * 8 - (8 * i + lane % 4 * 2 + j % 2);  // than the column's token
        const float log = (j < 2 ? logs.x : logs.y) - (j % 2 ? from.y : from.x);
        const float value = scores[8 * kWarp + 4 * i + j] * exp2_approximate(log) * (j % 2 ? from.w : from.z);
        m[j] = (later >= 0 ? value : 0.0f) + (later == 0 ? skip : 0.0f);
      }
      frag[2 * i] = pack_floats<Element>(m[0], m[1]);
      frag[2 * i + 1] = pack_floats<Element>(m[2], m[3]);
    }
  }
};

}  // namespace ternary::sm90
