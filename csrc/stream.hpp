// Copies that leave the cache alone. A buffer of hundreds of megabytes falls out of the cache before it is read, and an
// ordinary store first reads the line it is about to overwrite.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace mgrpo {

inline constexpr size_t kLine = 64;  // bytes of a cache line

#if defined(__SSE2__)

/// Copies `bytes`, a multiple of kLine, where both sides begin at a line. Seen by other threads after `stream_end`.
inline void stream(void* to, const void* from, size_t bytes) {
  using Vector = long long __attribute__((vector_size(16)));
  auto* target = static_cast<Vector*>(to);
  const auto* source = static_cast<const Vector*>(from);
  for (size_t i = 0; i < bytes / sizeof(Vector); ++i) {
#if defined(__clang__)
    __builtin_nontemporal_store(source[i], target + i);
#else
    __builtin_ia32_movntdq(target + i, source[i]);
#endif
  }
}

inline void stream_end() { __builtin_ia32_sfence(); }

#else

inline void stream(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
inline void stream_end() {}

#endif

}  // namespace mgrpo
