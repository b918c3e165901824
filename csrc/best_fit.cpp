#include "best_fit.hpp"

#include <bit>
#include <map>
#include <memory>

namespace mgrpo {
namespace {

constexpr uint32_t kNone = ~uint32_t{0};
constexpr int64_t kLargestTable = int64_t{1} << 24;

/// A set of numbers from 0 to `most`: a bit for each, and above them a bit for each word that has any, level by level.
class Bitmap {
 public:
  explicit Bitmap(int64_t most) {
    do {
      most >>= 6;
      levels_.emplace_back(most + 2);  // one to spare: at_least may look at what follows the last
    } while (most > 0);
  }

  bool has(int64_t value) const { return levels_[0][value >> 6] >> (value & 63) & 1; }

  void insert(int64_t value) {
    for (auto& level : levels_) {
      const bool known = level[value >> 6] != 0;
      level[value >> 6] |= uint64_t{1} << (value & 63);
      if (known) return;
      value >>= 6;
    }
  }

  void erase(int64_t value) {
    for (auto& level : levels_) {
      level[value >> 6] &= ~(uint64_t{1} << (value & 63));
      if (level[value >> 6] != 0) return;
      value >>= 6;
    }
  }

  /// The smallest of the set that is at least `value`, or -1.
  int64_t at_least(int64_t value) const {
    for (size_t level = 0; level < levels_.size(); ++level) {
      const uint64_t rest = levels_[level][value >> 6] >> (value & 63);
      if (rest != 0) return smallest_under(level, value + std::countr_zero(rest));
      value = (value >> 6) + 1;
    }
    return -1;
  }

 private:
  int64_t smallest_under(size_t level, int64_t value) const {
    while (level-- > 0) value = value << 6 | std::countr_zero(levels_[level][value]);
    return value;
  }

  std::vector<std::vector<uint64_t>> levels_;
};

/// The latest bin of each room that some bin has.
class TableOfRooms {
 public:
  explicit TableOfRooms(int64_t cap) : rooms_(cap), latest_(std::make_unique_for_overwrite<uint32_t[]>(cap + 1)) {}

  int64_t at_least(int64_t room) const { return rooms_.at_least(room); }
  uint32_t latest(int64_t room) const { return rooms_.has(room) ? latest_[room] : kNone; }
  void drop(int64_t room) { rooms_.erase(room); }
  void set(int64_t room, uint32_t bin) {
    rooms_.insert(room);
    latest_[room] = bin;
  }

 private:
  Bitmap rooms_;
  std::unique_ptr<uint32_t[]> latest_;  // of rooms that a bin has
};

/// The same for caps that a table of all rooms would be too large for.
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
  void drop(int64_t room) { latest_.erase(room); }
  void set(int64_t room, uint32_t bin) { latest_[room] = bin; }

 private:
  std::map<int64_t, uint32_t> latest_;
};

template <class Rooms>
Fit best_fit_by(Rooms rooms, const Items& items, int64_t cap) {
  Fit fit{std::vector<uint32_t>(items.rows_K.size()), {}};
  for (size_t k = 0; k < items.rows_K.size(); ++k) {
    int64_t room = rooms.at_least(items.rows_K[k]);
    uint32_t chosen = fit.bins_M.size();
    if (room < 0) {
      room = cap;
      fit.bins_M.emplace_back();
    } else {
      chosen = rooms.latest(room);
      const uint32_t next = fit.bins_M[chosen].next;
      next == kNone ? rooms.drop(room) : rooms.set(room, next);
    }
    Bin& bin = fit.bins_M[chosen];
    room -= items.rows_K[k];
    bin.next = rooms.latest(room);
    rooms.set(room, chosen);
    bin.cost += items.cost_K[k];
    ++bin.items;
    fit.bin_K[k] = chosen;
  }
  return fit;
}

}  // namespace

Fit best_fit(const Items& items, int64_t cap) {
  if (cap <= kLargestTable) return best_fit_by(TableOfRooms(cap), items, cap);
  return best_fit_by(MapOfRooms(), items, cap);
}

}  // namespace mgrpo
