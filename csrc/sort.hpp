// A stable radix sort of indices by unsigned keys, linear in their number whatever the keys.
// Departs from the textbook in the digit: as wide as the indices are many allow, so that short keys take one pass.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

namespace mgrpo {

/// The indices 0 .. count - 1, those of smaller key(index) first, equal ones in order. count is below 2^32.
template <class Key>
std::vector<uint32_t> sorted_by(size_t count, Key key) {
  uint64_t ones = 0, zeros = 0;  // bits that are set, or not, in some key
  for (uint32_t n = 0; n < count; ++n) ones |= key(n), zeros |= ~key(n);
  std::vector<uint32_t> order_N(count), sorted_N(count);
  std::iota(order_N.begin(), order_N.end(), 0);
  const int widest = std::clamp<int>(std::bit_width(count), 8, 16);
  const int low = std::countr_zero(ones & zeros), bits = std::bit_width(ones & zeros) - low;
  const int passes = bits > 0 ? (bits + widest - 1) / widest : 0;
  for (int pass = 0; pass < passes; ++pass) {
    const int width = (bits + passes - 1) / passes, shift = low + pass * width;
    const auto digit = [&](uint32_t n) { return key(n) >> shift & ((uint64_t{1} << width) - 1); };
    std::vector<uint32_t> place((size_t{1} << width) + 1);
    for (uint32_t n = 0; n < count; ++n) ++place[digit(n) + 1];
    std::partial_sum(place.begin(), place.end(), place.begin());
    for (const uint32_t n : order_N) sorted_N[place[digit(n)]++] = n;
    std::swap(order_N, sorted_N);
  }
  return order_N;
}

}  // namespace mgrpo
