// The flat buffers of one micro-batch, and how many rows of a trajectory are worth computing.
// Legend: N trajectories of T tokens in all, B of them in the batch, P rows of the batch. Trajectory n owns the tokens
// offsets_N1[n] .. offsets_N1[n + 1] - 1. Row i of a sequence reads its token i and predicts token i + 1.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace mgrpo {

/// The index in its trajectory of the last sampled token, 0 where none is or only token 0. As the model is causal and
/// token 0 is never predicted, this is the number of rows that can add to a loss over sampled tokens.
/// Throws std::invalid_argument on offsets that do not rise from 0 to T.
std::vector<int64_t> trainable_rows(std::span<const int64_t> offsets_N1, std::span<const uint8_t> sampled_T);

/// All trajectories. Token is int32_t or int64_t. `sampled` is nonzero where the agent itself chose the token.
template <class Token>
struct Trajectories {
  std::span<const Token> tokens_T;
  std::span<const int64_t> offsets_N1;
  std::span<const uint8_t> sampled_T;
  std::span<const int64_t> rows_N;  // how many leading tokens are inputs: below the trajectory's length
  std::span<const double> advantages_N;
  std::span<const double> weights_N;  // of each sampled token: multiplicity and normalisation are in it
};

struct BatchSize {
  int64_t rows = 0;
  int64_t longest = 0;
};

/// The buffers to fill: _P of BatchSize::rows entries.
struct Batch {
  std::span<int64_t> input_ids_P;
  std::span<int64_t> positions_P;
  std::span<int64_t> targets_P;
  std::span<bool> action_mask_P;
  std::span<float> weights_P;
  std::span<float> advantages_P;
  std::span<int32_t> segment_ids_P;
  std::span<int32_t> cu_seqlens_B1;
};

/// Checks all of the input and gives the batch's size. Throws std::invalid_argument, naming the trajectory, on offsets
/// that do not rise from 0 to T, columns of unequal size, an id out of range, rows that reach the trajectory's length,
/// an advantage or weight that is not finite as float32, or a batch of more rows than int32 counts.
template <class Token>
BatchSize measure(const Trajectories<Token>& given, std::span<const int64_t> ids_B);

/// Fills the batch with the first rows_N[id] tokens of each id in order. Everything was checked by `measure`.
template <class Token>
void fill(const Trajectories<Token>& given, std::span<const int64_t> ids_B, const Batch& batch);

/// Fills a column of log-probs, after `fill`: row i takes that of token i + 1 where it is an action, else 0.
template <class Token>
void fill_logprobs(const Trajectories<Token>& given, std::span<const int64_t> ids_B, const Batch& batch,
                   std::span<const float> logprobs_T, std::span<float> logprobs_P);

}  // namespace mgrpo
