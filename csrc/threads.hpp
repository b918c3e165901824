// A loop over several threads. They are started for each loop, not kept: starting one takes microseconds, the loops
// that are worth sharing take milliseconds, and a process that forks has no pool to lose.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace mgrpo {

/// As many threads as the machine runs at once, where `asked` is 0.
inline int64_t threads_or_all(int64_t asked) {
  return asked > 0 ? asked : std::max<int64_t>(std::thread::hardware_concurrency(), 1);
}

/// Calls work(i) once for each i below `count`, on `threads` threads of which this is one. `work` must not throw.
template <class Work>
void parallel_for(int64_t count, int64_t threads, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto take_turns = [&] {
    for (int64_t i = next++; i < count; i = next++) work(i);
  };
  std::vector<std::jthread> others;  // joined when it goes out of scope
  others.reserve(std::max<int64_t>(std::min(threads, count) - 1, 0));
  try {
    while (others.size() < others.capacity()) others.emplace_back(take_turns);
  } catch (const std::system_error&) {
    // no more threads to be had: those there are do all of it
  }
  take_turns();
}

}  // namespace mgrpo
