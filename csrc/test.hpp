// Helpers of the core's tests, without a framework and without Python: a check that fails is printed with its place,
// and the program ends in failure.
#pragma once

#include <cstdint>
#include <iostream>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define CHECK(condition) mgrpo::test::check(condition, #condition, __FILE__, __LINE__)

namespace mgrpo::test {

inline int failures = 0;

inline void check(bool holds, const char* condition, const char* file, int line) {
  if (holds) return;
  ++failures;
  std::cerr << file << ':' << line << ": " << condition << '\n';
}

/// Returns whether the call is refused as a caller's mistake, with this text in the message.
template <class Call>
bool refuses(const Call& call, const std::string& part) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return std::string(error.what()).find(part) != std::string::npos;
  }
  return false;
}

/// Draws `count` numbers from `low` to `high`, the same on every machine, unlike std::uniform_int_distribution.
inline std::vector<int64_t> numbers(uint64_t seed, size_t count, int64_t low, int64_t high) {
  std::mt19937_64 random(seed);
  std::vector<int64_t> drawn(count);
  for (auto& number : drawn) number = low + static_cast<int64_t>(random() % static_cast<uint64_t>(high - low + 1));
  return drawn;
}

/// Returns the exit status of main.
inline int result() { return failures == 0 ? 0 : 1; }

}  // namespace mgrpo::test
