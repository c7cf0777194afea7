// Which copy of the CPU kernels runs: they are compiled once per instruction set.
#pragma once

namespace ternary {

enum class Isa { portable, avx2, avx512 };  // avx512: F, BW, DQ, VL and VNNI

// The best that this CPU has, or what the environment variable TERNARY_CPU_ISA names.
// Throws std::runtime_error where that is unknown or more than the CPU has.
Isa isa();
const char* name(Isa isa);

}  // namespace ternary
