// A stable radix sort of indices by unsigned keys, linear in their number for any keys.
// Unlike in the textbook, the digit is wider for more indices, so that short keys take one pass.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

namespace mgrpo {

/// Returns the indices 0 .. count - 1, ordered by key(index); equal keys keep their order. count is below 2^32.
template <class Key>
std::vector<uint32_t> sorted_by(size_t count, Key key) {
  uint64_t ones = 0, zeros = 0;  // bits that are set, or clear, in some key
  for (uint32_t n = 0; n < count; ++n) ones |= key(n), zeros |= ~key(n);
  const int widest = std::clamp<int>(std::bit_width(count), 8, 16);
  const int low = std::countr_zero(ones & zeros) % 64;  // 0 if all keys are the same
  const int bits = std::bit_width(ones & zeros) - low;
  const int passes = std::max(1, (bits + widest - 1) / widest), width = std::max(1, (bits + passes - 1) / passes);
  std::vector<uint32_t> order_N, sorted_N(count), place(size_t{1} << width);
  for (int pass = 0; pass < passes; ++pass) {
    const auto digit = [&, shift = low + pass * width](uint32_t n) { return key(n) >> shift & (place.size() - 1); };
    std::ranges::fill(place, 0);
    for (uint32_t n = 0; n < count; ++n) ++place[digit(n)];
    std::exclusive_scan(place.begin(), place.end(), place.begin(), uint32_t{0});
    if (pass == 0) {
      for (uint32_t n = 0; n < count; ++n) sorted_N[place[digit(n)]++] = n;
      order_N.resize(passes > 1 ? count : 0);
    } else {
      for (const uint32_t n : order_N) sorted_N[place[digit(n)]++] = n;
    }
    if (pass + 1 < passes) std::swap(order_N, sorted_N);
  }
  return sorted_N;
}

}  // namespace mgrpo
