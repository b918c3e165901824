// Fills the flat buffers of micro-batches in one parallel pass, and counts the rows of a trajectory worth computing.
//
// The usual collator makes one column after another of all rows. Here rows are cut into pieces, independently of the
// sequences; threads take one piece after another, and make all columns of a piece. What they read again is then still
// in the cache, and they write long stretches, which costs less than many short ones, especially into fresh memory.
//
// Legend: N trajectories of T tokens in all; M micro-batches of B sequences and P rows in all, one after another.
// Trajectory n owns the tokens offsets_N1[n] .. offsets_N1[n + 1] - 1. Row i of a sequence reads its token i and
// predicts token i + 1.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace mgrpo {

/// Holds one value per token of all trajectories, in one flat buffer or in one buffer per trajectory.
template <class T>
struct Column {
  const char* name;
  std::span<const T> flat_T;
  std::vector<std::span<const T>> each_N;
  bool is_flat = true;

  /// Returns the values of the trajectory that has `offset` tokens before it.
  const T* of(int64_t n, int64_t offset) const { return is_flat ? flat_T.data() + offset : each_N[n].data(); }
};

/// Returns the index of each trajectory's last sampled token, 0 if there is none or only token 0. As the model is
/// causal and token 0 is never predicted, this is the number of rows that can add to a loss over sampled tokens. Throws
/// std::invalid_argument for offsets that do not rise from 0 to T, or a column of another size.
std::vector<int64_t> trainable_rows(std::span<const int64_t> offsets_N1, const Column<uint8_t>& sampled);

/// Holds all trajectories. Token is int32_t or int64_t. `sampled` is nonzero where the agent itself chose the token.
template <class Token>
struct Trajectories {
  Column<Token> tokens;
  std::span<const int64_t> offsets_N1;
  Column<uint8_t> sampled;
  std::span<const int64_t> rows_N;  // leading tokens that are inputs: fewer than the trajectory's length
  std::span<const double> advantages_N;
  std::span<const double> weights_N;  // of each sampled token, including multiplicity and normalisation
  std::vector<Column<float>> logprobs;
};

/// Assigns trajectories to micro-batches: m has ids_B[bins_M1[m]] .. ids_B[bins_M1[m + 1] - 1].
struct Bins {
  std::span<const int64_t> bins_M1;
  std::span<const int64_t> ids_B;
};

/// Says which rows the live index holds: none, those of nonzero weight, or those of nonzero weight and advantage.
enum class Live { none, weight, advantage };

/// Holds where one micro-batch lies among all rows and in the live index, and its denominators.
struct MicroBatch {
  int64_t row = 0, rows = 0;
  int64_t live = 0, lives = 0;
  int64_t longest = 0;
  int64_t actions = 0;      // rows whose target was sampled
  double weight_sum = 0.0;  // the sum of their weights
};

/// Rows of one micro-batch that one thread fills; `live` is the place of their first entry in the live index.
struct Piece {
  int64_t bin, begin, end;
  int64_t live = 0, lives = 0, actions = 0;
  double weight_sum = 0.0;
};

/// Holds what `measure` computes and `fill` needs.
struct Layout {
  std::vector<int64_t> rows_B1;  // the first row of each sequence among those of all micro-batches
  std::vector<MicroBatch> bins_M;
  std::vector<Piece> pieces;
  int64_t lives = 0;

  int64_t rows() const { return rows_B1.back(); }
};

/// The buffers to fill. Id is int64_t, or int32_t if Token is int32_t.
template <class Id>
struct Batch {
  Id *input_ids_P, *positions_P, *targets_P;
  bool* action_mask_P;
  float *weights_P, *advantages_P;
  int32_t* segment_ids_P;          // index of the sequence in its micro-batch
  int32_t* cu_seqlens;             // B + M entries: those of micro-batch m begin at bins_M1[m] + m
  int64_t* live_rows;              // Layout::lives entries, counted from the micro-batch's first row
  std::vector<float*> logprobs_P;  // one for each column given
};

/// Checks the whole input, lays out the micro-batches and counts. The result is the same for any number of threads.
/// Throws std::invalid_argument, naming the trajectory, for offsets that do not rise from 0 to T, columns of another
/// size, bins that do not rise from 0 to B, an id out of range, rows that reach the trajectory's length, an advantage
/// or weight that is not finite as float32, a micro-batch of more rows than int32 can count, or 2^36 rows.
template <class Token>
Layout measure(const Trajectories<Token>& given, const Bins& bins, Live live, int64_t threads);

/// Fills the buffers with the first rows_N[id] tokens of each id in order. `measure` has checked everything.
template <class Token, class Id>
void fill(const Trajectories<Token>& given, const Bins& bins, Live live, const Layout& layout, const Batch<Id>& batch,
          int64_t threads);

}  // namespace mgrpo
