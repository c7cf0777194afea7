#include "kernels/cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace ternary {

static Isa best() {
#ifdef TERNARY_X86
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

const char* name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable"; }

static Isa choose() {
  const char* wish = std::getenv("TERNARY_CPU_ISA");
  if (!wish || !*wish) return best();
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512})
    if (isa <= best() && std::string(wish) == name(isa)) return isa;
  throw std::runtime_error("TERNARY_CPU_ISA is '" + std::string(wish) +
                           "', expected one of portable, avx2, avx512 that this CPU has; its best is " +
                           name(best()));
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace ternary
