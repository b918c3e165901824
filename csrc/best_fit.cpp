#include "best_fit.hpp"

#include <algorithm>
#include <bit>
#include <map>
#include <utility>

namespace mgrpo {
namespace {

using Ids = std::vector<uint32_t>;

constexpr uint32_t kNone = ~uint32_t{0};
constexpr int64_t kLargestTable = int64_t{1} << 24;

/// Holds a set of numbers from 0 to `most`: one bit for each, and level by level above one bit for each nonzero word.
class Bitmap {
 public:
  explicit Bitmap(int64_t most) {
    size_t words = 0;
    do {
      most >>= 6;
      levels_.push_back(words);
      words += most + 2;  // one spare word: at_least may read the one after the last
    } while (most > 0);
    words_.resize(words);
  }

  void insert(int64_t value) {
    for (const size_t level : levels_) {
      uint64_t& word = words_[level + (value >> 6)];
      const bool known = word != 0;
      word |= uint64_t{1} << (value & 63);
      if (known) return;
      value >>= 6;
    }
  }

  void erase(int64_t value) {
    for (const size_t level : levels_) {
      uint64_t& word = words_[level + (value >> 6)];
      word &= ~(uint64_t{1} << (value & 63));
      if (word != 0) return;
      value >>= 6;
    }
  }

  /// Returns the smallest number of the set that is at least `value`, or -1.
  int64_t at_least(int64_t value) const {
    for (size_t up = 0; up < levels_.size(); ++up) {
      const uint64_t rest = words_[levels_[up] + (value >> 6)] >> (value & 63);
      if (rest != 0) return smallest_under(up, value + std::countr_zero(rest));
      value = (value >> 6) + 1;
    }
    return -1;
  }

 private:
  int64_t smallest_under(size_t up, int64_t value) const {
    while (up-- > 0) value = value << 6 | std::countr_zero(words_[levels_[up] + value]);
    return value;
  }

  std::vector<size_t> levels_;  // where each level begins in words_
  std::vector<uint64_t> words_;
};

/// Maps each room that some bin has to the latest such bin, and other rooms to kNone.
class TableOfRooms {
 public:
  explicit TableOfRooms(int64_t cap) : rooms_(cap), latest_(cap + 1, kNone) {}

  int64_t at_least(int64_t room) const { return rooms_.at_least(room); }
  uint32_t latest(int64_t room) const { return latest_[room]; }
  void set(int64_t room, uint32_t bin) {
    bin == kNone ? rooms_.erase(room) : rooms_.insert(room);
    latest_[room] = bin;
  }

 private:
  Bitmap rooms_;
  Ids latest_;
};

/// Does the same for a cap so large that a table of all rooms would cost more than the items.
class MapOfRooms {
 public:
  int64_t at_least(int64_t room) const {
    const auto found = latest_.lower_bound(room);
    return found == latest_.end() ? -1 : found->first;
  }
  uint32_t latest(int64_t room) const {
    const auto found = latest_.find(room);
    return found == latest_.end() ? kNone : found->second;
  }
  void set(int64_t room, uint32_t bin) {
    if (bin == kNone) {
      latest_.erase(room);
    } else {
      latest_[room] = bin;
    }
  }

 private:
  std::map<int64_t, uint32_t> latest_;
};

template <class Rooms>
class Packer {
 public:
  Packer(Rooms rooms, int64_t cap, size_t items) : rooms_(std::move(rooms)), cap_(cap), fit_{Ids(items), 0} {}

  /// Places items of equal rows, until `end` items have been placed.
  void put(int64_t rows, uint32_t end) {
    while (k_ < end) {
      const int64_t room = rooms_.at_least(rows);
      if (room < 0) {
        next_.push_back(kNone);
        fill_chain(fit_.bins++, cap_, rows, end);
      } else {
        rooms_.set(room, fill_chain(rooms_.latest(room), room, rows, end));
      }
    }
  }

  Fit done() { return std::move(fit_); }

 private:
  /// Fills the bins that have the same `room`, one after another, while there are items. Returns the first bin that
  /// remains in the chain.
  uint32_t fill_chain(uint32_t bin, int64_t room, int64_t rows, uint32_t end) {
    const int64_t filled = room - rows < rows ? room - rows : room % rows;
    uint32_t latest = rooms_.latest(filled);
    while (bin != kNone && k_ < end) {
      const uint32_t following = next_[bin];
      const int64_t left = fill_bin(bin, room, rows, end);
      if (left == filled) {
        next_[bin] = std::exchange(latest, bin);
      } else {  // no items are left; no other bin has this room, or it would have been the best fit
        next_[bin] = kNone;
        rooms_.set(left, bin);
      }
      bin = following;
    }
    if (latest != kNone) rooms_.set(filled, latest);
    return bin;
  }

  int64_t fill_bin(uint32_t bin, int64_t room, int64_t rows, uint32_t end) {
    do {
      fit_.bin_K[k_++] = bin;
      room -= rows;
    } while (room >= rows && k_ < end);
    return room;
  }

  Rooms rooms_;
  int64_t cap_;
  Ids next_;  // the previous bin with the same room
  Fit fit_;
  uint32_t k_ = 0;
};

template <class Rooms>
Fit pack(Rooms rooms, std::span<const Run> runs, int64_t cap) {
  Packer<Rooms> packer(std::move(rooms), cap, runs.empty() ? 0 : runs.back().end);
  for (const auto& [rows, end] : runs) packer.put(rows, end);
  return packer.done();
}

}  // namespace

Fit best_fit(std::span<const Run> runs, int64_t cap) {
  const int64_t items = runs.empty() ? 0 : runs.back().end;
  if (cap <= std::min(kLargestTable, 64 * items)) return pack(TableOfRooms(cap), runs, cap);
  return pack(MapOfRooms(), runs, cap);
}

}  // namespace mgrpo
