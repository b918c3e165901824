#include "fill.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "check.hpp"

namespace mgrpo {
namespace {

constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max();

void check_offsets(std::span<const int64_t> offsets_N1, size_t tokens) {
  require(!offsets_N1.empty(), "offsets is empty, expected one entry more than there are trajectories");
  require(offsets_N1[0] == 0, "offsets[0] is ", offsets_N1[0], ", expected 0");
  for (size_t n = 1; n < offsets_N1.size(); ++n) {
    require(offsets_N1[n] >= offsets_N1[n - 1], "offsets[", n, "] is ", offsets_N1[n], ", below offsets[", n - 1,
            "] = ", offsets_N1[n - 1]);
  }
  require(static_cast<uint64_t>(offsets_N1.back()) == tokens, "offsets ends at ", offsets_N1.back(), ", expected the ",
          tokens, " tokens that sampled has");
}

void check_size(const char* name, size_t size, size_t expected, const char* of) {
  require(size == expected, name, " has ", size, " entries, expected one for each of the ", expected, " ", of);
}

void check_float32(const char* name, int64_t id, double value) {
  const bool finite = std::abs(value) <= std::numeric_limits<float>::max();  // false for nan
  require(finite, name, "[", id, "] is ", value, ", expected a finite float32");
}

}  // namespace

std::vector<int64_t> trainable_rows(std::span<const int64_t> offsets_N1, std::span<const uint8_t> sampled_T) {
  check_offsets(offsets_N1, sampled_T.size());
  std::vector<int64_t> rows_N;
  rows_N.reserve(offsets_N1.size() - 1);
  for (size_t n = 0; n + 1 < offsets_N1.size(); ++n) {
    const int64_t start = offsets_N1[n];
    int64_t last = std::max<int64_t>(offsets_N1[n + 1] - start - 1, 0);
    while (last > 0 && !sampled_T[start + last]) --last;
    rows_N.push_back(last);
  }
  return rows_N;
}

template <class Token>
BatchSize measure(const Trajectories<Token>& given, std::span<const int64_t> ids_B) {
  check_size("tokens", given.tokens_T.size(), given.sampled_T.size(), "entries of sampled");
  check_offsets(given.offsets_N1, given.sampled_T.size());
  const size_t trajectories = given.offsets_N1.size() - 1;
  check_size("rows", given.rows_N.size(), trajectories, "trajectories");
  check_size("advantages", given.advantages_N.size(), trajectories, "trajectories");
  check_size("weights", given.weights_N.size(), trajectories, "trajectories");
  require(static_cast<int64_t>(ids_B.size()) < kMostRows, "ids has ", ids_B.size(), " entries, more than int32 counts");
  BatchSize size;
  for (size_t b = 0; b < ids_B.size(); ++b) {
    const int64_t id = ids_B[b];
    require(id >= 0 && id < static_cast<int64_t>(trajectories), "ids[", b, "] is ", id, ", expected from 0 to below ",
            trajectories);
    const int64_t length = given.offsets_N1[id + 1] - given.offsets_N1[id], rows = given.rows_N[id];
    require(rows >= 0 && rows < length, "rows[", id, "] is ", rows, ", expected from 0 to below the trajectory's ",
            length, " tokens");
    check_float32("advantages", id, given.advantages_N[id]);
    check_float32("weights", id, given.weights_N[id]);
    require(rows <= kMostRows - size.rows, "ids[", b, "] = ", id, " brings the batch to ", size.rows, " + ", rows,
            " rows, more than int32 counts");
    size.rows += rows;
    size.longest = std::max(size.longest, rows);
  }
  return size;
}

template <class Token>
void fill(const Trajectories<Token>& given, std::span<const int64_t> ids_B, const Batch& batch) {
  int32_t p = 0;
  batch.cu_seqlens_B1[0] = 0;
  for (size_t b = 0; b < ids_B.size(); ++b) {
    const int64_t id = ids_B[b], start = given.offsets_N1[id];
    const auto weight = static_cast<float>(given.weights_N[id]), advantage = static_cast<float>(given.advantages_N[id]);
    for (int64_t i = 0; i < given.rows_N[id]; ++i, ++p) {
      const bool action = given.sampled_T[start + i + 1] != 0;
      batch.input_ids_P[p] = given.tokens_T[start + i];
      batch.positions_P[p] = i;
      batch.targets_P[p] = given.tokens_T[start + i + 1];
      batch.action_mask_P[p] = action;
      batch.weights_P[p] = action ? weight : 0.0F;
      batch.advantages_P[p] = advantage;
      batch.segment_ids_P[p] = static_cast<int32_t>(b);
    }
    batch.cu_seqlens_B1[b + 1] = p;
  }
}

template <class Token>
void fill_logprobs(const Trajectories<Token>& given, std::span<const int64_t> ids_B, const Batch& batch,
                   std::span<const float> logprobs_T, std::span<float> logprobs_P) {
  for (size_t b = 0; b < ids_B.size(); ++b) {
    const float* next = logprobs_T.data() + given.offsets_N1[ids_B[b]] + 1;
    for (int32_t p = batch.cu_seqlens_B1[b]; p < batch.cu_seqlens_B1[b + 1]; ++p, ++next) {
      logprobs_P[p] = batch.action_mask_P[p] ? *next : 0.0F;
    }
  }
}

template BatchSize measure(const Trajectories<int32_t>&, std::span<const int64_t>);
template BatchSize measure(const Trajectories<int64_t>&, std::span<const int64_t>);
template void fill(const Trajectories<int32_t>&, std::span<const int64_t>, const Batch&);
template void fill(const Trajectories<int64_t>&, std::span<const int64_t>, const Batch&);
template void fill_logprobs(const Trajectories<int32_t>&, std::span<const int64_t>, const Batch&,
                            std::span<const float>, std::span<float>);
template void fill_logprobs(const Trajectories<int64_t>&, std::span<const int64_t>, const Batch&,
                            std::span<const float>, std::span<float>);

}  // namespace mgrpo
