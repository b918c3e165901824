// The items that are put into bins: sequences, or groups of sequences that stay together.
// Legend: I items.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace mgrpo {

/// The cost of a sequence of L rows: linear * L + square * L^2. Neither may be negative, and one must be positive.
struct Cost {
  double linear = 1.0;
  double square = 0.0;

  double of(int64_t rows) const {
    const auto length = static_cast<double>(rows);
    return linear * length + square * length * length;
  }
};

struct Items {
  std::span<const int64_t> rows_I;
  Cost rule;                         // the cost of sequences
  std::span<const double> cost_I{};  // the cost of groups

  double cost(uint32_t i) const { return cost_I.empty() ? rule.of(rows_I[i]) : cost_I[i]; }
};

}  // namespace mgrpo
