// The random numbers of the packer: counter-based, so that they do not depend on threads, order or the machine.
#pragma once

#include <cstdint>

namespace mgrpo {

inline constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;

/// The output function of splitmix64 (Steele, Lea and Flood 2014): a bijection of the 64-bit numbers.
inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

/// Returns the state from which the numbers of (seed, key) start.
inline uint64_t start(uint64_t seed, uint64_t key) { return mix(mix(seed + kGolden) + key); }

}  // namespace mgrpo
