// A loop over several threads. They are started for each loop and not kept: starting one takes microseconds, loops
// worth sharing take milliseconds, and a process that forks has no pool to lose.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace mgrpo {

/// Returns `asked`, or the number of threads that the machine runs at once if that is 0.
inline int64_t threads_or_all(int64_t asked) {
  return asked > 0 ? asked : std::max<int64_t>(std::thread::hardware_concurrency(), 1);
}

/// Calls work(i) once for each i below `count`, on `threads` threads including this one. An exception does not keep the
/// other calls from running; afterwards the exception of the lowest i is thrown again, so that the outcome does not
/// depend on the threads.
template <class Work>
void parallel_for(int64_t count, int64_t threads, const Work& work) {
  std::atomic<int64_t> next{0};
  std::vector<std::exception_ptr> thrown(count);
  const auto take_turns = [&] {
    for (int64_t i = next++; i < count; i = next++) {
      try {
        work(i);
      } catch (...) {
        thrown[i] = std::current_exception();
      }
    }
  };
  {
    std::vector<std::jthread> others;  // joined when it goes out of scope
    others.reserve(std::max<int64_t>(std::min(threads, count) - 1, 0));
    try {
      while (others.size() < others.capacity()) others.emplace_back(take_turns);
    } catch (const std::system_error&) {
      // the system has no more threads: those that exist do all the work
    }
    take_turns();
  }
  for (const auto& each : thrown) {
    if (each) std::rethrow_exception(each);
  }
}

}  // namespace mgrpo
