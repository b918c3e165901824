#include "fill.hpp"

#include <algorithm>
#include <limits>
#include <numeric>

#include "check.hpp"
#include "threads.hpp"

namespace mgrpo {
namespace {

constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max();
constexpr int64_t kMostRowsInAll = int64_t{1} << 36;
constexpr int64_t kPieceRows = int64_t{1} << 16;  // half a megabyte of an int64 column, 2.5 of all

template <class T>
void check_column(const Column<T>& column, std::span<const int64_t> offsets_N1) {
  const char* name = column.name;
  if (column.is_flat) {
    const auto tokens = static_cast<size_t>(offsets_N1.back());
    require(column.flat_T.size() == tokens, name, " has ", column.flat_T.size(), " entries, expected ", tokens,
            ", where offsets ends");
    return;
  }
  check_size(name, column.each_N.size(), offsets_N1.size() - 1, "trajectories");
  for (size_t n = 0; n < column.each_N.size(); ++n) {
    const auto length = static_cast<size_t>(offsets_N1[n + 1] - offsets_N1[n]);
    require(column.each_N[n].size() == length, name, "[", n, "] has ", column.each_N[n].size(),
            " entries, expected the ", length, " tokens that offsets gives the trajectory");
  }
}

template <class Token>
void check_columns(const Trajectories<Token>& given) {
  check_rising("offsets", given.offsets_N1, "trajectories");
  check_column(given.sampled, given.offsets_N1);
  check_column(given.tokens, given.offsets_N1);
  for (const auto& column : given.logprobs) check_column(column, given.offsets_N1);
  const size_t trajectories = given.offsets_N1.size() - 1;
  check_size("rows", given.rows_N.size(), trajectories, "trajectories");
  check_size("advantages", given.advantages_N.size(), trajectories, "trajectories");
  check_size("weights", given.weights_N.size(), trajectories, "trajectories");
}

template <class Token>
void check_id(const Trajectories<Token>& given, int64_t b, int64_t id) {
  const auto trajectories = static_cast<int64_t>(given.offsets_N1.size()) - 1;
  require(id >= 0 && id < trajectories, "ids[", b, "] is ", id, ", expected from 0 to below ", trajectories);
  const int64_t length = given.offsets_N1[id + 1] - given.offsets_N1[id], rows = given.rows_N[id];
  require(rows >= 0 && rows < length, "rows[", id, "] is ", rows, ", expected from 0 to below the trajectory's ",
          length, " tokens");
  check_float32("advantages", id, given.advantages_N[id]);
  check_float32("weights", id, given.weights_N[id]);
}

/// Lays out micro-batch m after the others.
template <class Token>
void add_bin(const Trajectories<Token>& given, const Bins& bins, size_t m, Layout& layout) {
  const int64_t begin = bins.bins_M1[m], end = bins.bins_M1[m + 1];
  require(end - begin < kMostRows, "micro-batch ", m, " has ", end - begin, " sequences, more than int32 can count");
  MicroBatch made{.row = layout.rows()};
  for (int64_t b = begin; b < end; ++b) {
    const int64_t id = bins.ids_B[b];
    check_id(given, b, id);
    const int64_t rows = given.rows_N[id];
    require(rows <= kMostRows - made.rows, "ids[", b, "] = ", id, " brings the batch to ", made.rows, " + ", rows,
            " rows, more than int32 can count");
    made.rows += rows;
    made.longest = std::max(made.longest, rows);
    layout.rows_B1.push_back(made.row + made.rows);
  }
  require(layout.rows() < kMostRowsInAll, "micro-batch ", m, " brings all of them to ", layout.rows(),
          " rows, expected below ", kMostRowsInAll);
  layout.bins_M.push_back(made);
}

void add_pieces(std::vector<Piece>& pieces, int64_t bin, const MicroBatch& of) {
  for (int64_t row = 0; row < of.rows; row += kPieceRows) {
    pieces.push_back({.bin = bin, .begin = of.row + row, .end = of.row + std::min(row + kPieceRows, of.rows)});
  }
}

/// Rows of one sequence: `count` of them from its row `first`, stored in the columns from `row`.
struct Run {
  int64_t place, id, first, row, count;
};

/// Visits the runs of a piece in order.
struct Runs {
  const Bins& bins;
  const Layout& layout;
  const Piece& piece;

  template <class Work>
  void each(const Work& work) const {
    const auto& rows_B1 = layout.rows_B1;
    int64_t b = std::upper_bound(rows_B1.begin(), rows_B1.end(), piece.begin) - rows_B1.begin() - 1;
    for (int64_t row = piece.begin; row < piece.end; ++b) {
      const int64_t end = std::min(rows_B1[b + 1], piece.end);
      if (end > row) work(Run{b, bins.ids_B[b], row - rows_B1[b], row, end - row});
      row = end;
    }
  }
};

/// Returns the targets of a run's rows.
template <class Token, class T>
const T* next_of(const Trajectories<Token>& given, const Column<T>& column, const Run& run) {
  return column.of(run.id, given.offsets_N1[run.id]) + run.first + 1;
}

int64_t count_nonzero(const uint8_t* flags, int64_t count) {
  constexpr int64_t kBlock = 128;  // the most that a sum of bytes can hold, so that the compiler adds 16 at a time
  int64_t total = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    uint8_t block = 0;
    for (int64_t i = begin; i < std::min(begin + kBlock, count); ++i) block += flags[i] != 0;
    total += block;
  }
  return total;
}

template <class Token>
bool is_live(const Trajectories<Token>& given, Live live, int64_t id) {
  const auto weight = static_cast<float>(given.weights_N[id]), advantage = static_cast<float>(given.advantages_N[id]);
  return live != Live::none && weight != 0.0F && (live == Live::weight || advantage != 0.0F);
}

template <class Token>
void count(const Trajectories<Token>& given, const Bins& bins, Live live, const Layout& layout, Piece& piece) {
  Runs{bins, layout, piece}.each([&](const Run& run) {
    const int64_t actions = count_nonzero(next_of(given, given.sampled, run), run.count);
    piece.actions += actions;
    piece.weight_sum += static_cast<double>(static_cast<float>(given.weights_N[run.id])) * actions;
    piece.lives += is_live(given, live, run.id) ? actions : 0;
  });
}

/// Adds up the pieces' counts in order, so that the sums do not depend on the threads.
void add_up(Layout& layout) {
  int64_t& live = layout.lives;
  size_t p = 0;
  for (size_t m = 0; m < layout.bins_M.size(); ++m) {
    auto& bin = layout.bins_M[m];
    bin.live = live;
    for (; p < layout.pieces.size() && layout.pieces[p].bin == static_cast<int64_t>(m); ++p) {
      auto& piece = layout.pieces[p];
      piece.live = live;
      live += piece.lives;
      bin.actions += piece.actions;
      bin.weight_sum += piece.weight_sum;
    }
    bin.lives = live - bin.live;
  }
}

/// to[i] = flags[i] ? value(i) : 0. The value is always read: a conditional read would prevent vectorisation.
template <class Value>
void where(const uint8_t* __restrict flags, int64_t count, float* __restrict to, const Value& value) {
  for (int64_t i = 0; i < count; ++i) {
    const float taken = value(i);
    to[i] = flags[i] ? taken : 0.0F;
  }
}

template <class Token, class Id>
void fill_ids(const Trajectories<Token>& given, const Runs& runs, const Batch<Id>& batch) {
  runs.each([&](const Run& run) {
    const Token* next = next_of(given, given.tokens, run);
    std::copy_n(next - 1, run.count, batch.input_ids_P + run.row);
  });
  runs.each([&](const Run& run) {
    const Token* next = next_of(given, given.tokens, run);
    std::copy_n(next, run.count, batch.targets_P + run.row);
  });
  runs.each([&](const Run& run) {
    std::iota(batch.positions_P + run.row, batch.positions_P + run.row + run.count, static_cast<Id>(run.first));
  });
}

template <class Token, class Id>
void fill_constants(const Trajectories<Token>& given, const Runs& runs, int64_t first_place, const Batch<Id>& batch) {
  runs.each([&](const Run& run) {
    std::fill_n(batch.advantages_P + run.row, run.count, static_cast<float>(given.advantages_N[run.id]));
  });
  runs.each([&](const Run& run) {
    std::fill_n(batch.segment_ids_P + run.row, run.count, static_cast<int32_t>(run.place - first_place));
  });
}

template <class Token, class Id>
void fill_actions(const Trajectories<Token>& given, const Runs& runs, const Batch<Id>& batch) {
  runs.each([&](const Run& run) {
    const uint8_t* sampled = next_of(given, given.sampled, run);
    std::transform(sampled, sampled + run.count, batch.action_mask_P + run.row, [](uint8_t flag) { return flag != 0; });
  });
  runs.each([&](const Run& run) {
    const auto weight = static_cast<float>(given.weights_N[run.id]);
    where(next_of(given, given.sampled, run), run.count, batch.weights_P + run.row, [&](int64_t) { return weight; });
  });
  for (size_t c = 0; c < given.logprobs.size(); ++c) {
    runs.each([&](const Run& run) {
      const float* next = next_of(given, given.logprobs[c], run);
      where(next_of(given, given.sampled, run), run.count, batch.logprobs_P[c] + run.row,
            [&](int64_t i) { return next[i]; });
    });
  }
}

/// Writes the action rows of live runs, counted from the micro-batch's `first_row`. Every row is written, but the end
/// advances only for an action: there is no branch to mispredict.
template <class Token>
void fill_live(const Trajectories<Token>& given, const Runs& runs, Live live, int64_t first_row,
               std::span<int64_t> live_rows) {
  int64_t *to = live_rows.data(), *const end = to + live_rows.size();
  runs.each([&](const Run& run) {
    if (!is_live(given, live, run.id)) return;
    const uint8_t* sampled = next_of(given, given.sampled, run);
    for (int64_t i = 0; i < run.count && to != end; ++i) {
      *to = run.row - first_row + i;
      to += sampled[i] != 0;
    }
  });
}

void fill_cu_seqlens(const Bins& bins, const Layout& layout, int32_t* cu_seqlens) {
  for (size_t m = 0; m < layout.bins_M.size(); ++m) {
    for (int64_t b = bins.bins_M1[m]; b <= bins.bins_M1[m + 1]; ++b) {
      *cu_seqlens++ = static_cast<int32_t>(layout.rows_B1[b] - layout.bins_M[m].row);
    }
  }
}

}  // namespace

std::vector<int64_t> trainable_rows(std::span<const int64_t> offsets_N1, const Column<uint8_t>& sampled) {
  check_rising("offsets", offsets_N1, "trajectories");
  check_column(sampled, offsets_N1);
  std::vector<int64_t> rows_N;
  rows_N.reserve(offsets_N1.size() - 1);
  for (size_t n = 0; n + 1 < offsets_N1.size(); ++n) {
    const uint8_t* flags = sampled.of(static_cast<int64_t>(n), offsets_N1[n]);
    int64_t last = std::max<int64_t>(offsets_N1[n + 1] - offsets_N1[n] - 1, 0);
    while (last > 0 && !flags[last]) --last;
    rows_N.push_back(last);
  }
  return rows_N;
}

template <class Token>
Layout measure(const Trajectories<Token>& given, const Bins& bins, Live live, int64_t threads) {
  check_columns(given);
  check_bins(bins.bins_M1, bins.ids_B.size());
  Layout layout;
  layout.rows_B1.reserve(bins.ids_B.size() + 1);
  layout.rows_B1.push_back(0);
  for (size_t m = 0; m + 1 < bins.bins_M1.size(); ++m) {
    add_bin(given, bins, m, layout);
    add_pieces(layout.pieces, static_cast<int64_t>(m), layout.bins_M.back());
  }
  const auto pieces = static_cast<int64_t>(layout.pieces.size());
  parallel_for(pieces, threads_or_all(threads), [&](int64_t p) { count(given, bins, live, layout, layout.pieces[p]); });
  add_up(layout);
  return layout;
}

template <class Token, class Id>
void fill(const Trajectories<Token>& given, const Bins& bins, Live live, const Layout& layout, const Batch<Id>& batch,
          int64_t threads) {
  fill_cu_seqlens(bins, layout, batch.cu_seqlens);
  const auto fill_piece = [&](int64_t p) {
    const Piece& piece = layout.pieces[p];
    const Runs runs{bins, layout, piece};
    fill_ids<Token>(given, runs, batch);
    fill_constants<Token>(given, runs, bins.bins_M1[piece.bin], batch);
    fill_actions<Token>(given, runs, batch);
    const std::span<int64_t> live_rows(batch.live_rows + piece.live, piece.lives);
    fill_live<Token>(given, runs, live, layout.bins_M[piece.bin].row, live_rows);
  };
  parallel_for(static_cast<int64_t>(layout.pieces.size()), threads_or_all(threads), fill_piece);
}

template Layout measure(const Trajectories<int32_t>&, const Bins&, Live, int64_t);
template Layout measure(const Trajectories<int64_t>&, const Bins&, Live, int64_t);
template void fill(const Trajectories<int32_t>&, const Bins&, Live, const Layout&, const Batch<int32_t>&, int64_t);
template void fill(const Trajectories<int32_t>&, const Bins&, Live, const Layout&, const Batch<int64_t>&, int64_t);
template void fill(const Trajectories<int64_t>&, const Bins&, Live, const Layout&, const Batch<int64_t>&, int64_t);

}  // namespace mgrpo
