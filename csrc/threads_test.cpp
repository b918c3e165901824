// Tests the loop over several threads: everything is done once, and the exception does not depend on the threads.
#include "threads.hpp"

#include "test.hpp"

namespace {

void each_is_called_once(int64_t count, int64_t threads) {
  std::vector<std::atomic<int>> called(count);
  mgrpo::parallel_for(count, threads, [&](int64_t i) { ++called[i]; });
  CHECK(std::ranges::all_of(called, [](const auto& times) { return times == 1; }));
}

/// Throws for the multiples of `step`, and checks that the others are called all the same.
void the_lowest_is_thrown_again(int64_t step, int64_t threads) {
  constexpr int64_t kCount = 500;
  std::atomic<int64_t> called = 0;
  int64_t thrown = -1;
  try {
    mgrpo::parallel_for(kCount, threads, [&](int64_t i) {
      ++called;
      if (i > 0 && i % step == 0) throw i;
    });
  } catch (int64_t i) {
    thrown = i;
  }
  CHECK(called == kCount);
  CHECK(thrown == (step < kCount ? step : -1));
}

}  // namespace

int main() {
  for (const int64_t threads : {1, 2, 7, 64}) {
    for (const int64_t count : {0, 1, 2, 1000}) each_is_called_once(count, threads);
    for (const int64_t step : {1, 3, 499, 500}) the_lowest_is_thrown_again(step, threads);
  }
  return mgrpo::test::result();
}
