// A compressed trie of the prefixes that token sequences share: a node is the run of tokens beyond its parent's that
// its sequences have in common. It is built from the root down: the sequences of a node are compared with its first one
// up to where they part, and sorted by the token that follows. A token is read once for each level at which its
// sequence branches. Legend: N sequences of T tokens in all; sequence n is the first rows_N[n] tokens from
// tokens_T[offsets_N1[n]] on.
#pragma once

#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

namespace mgrpo {

template <class Token>
struct Sequences {
  std::span<const Token> tokens_T;
  std::span<const int64_t> offsets_N1;
  std::span<const int64_t> rows_N;

  const Token* operator[](int64_t n) const { return tokens_T.data() + offsets_N1[n]; }
};

/// Returns the first token, from `from` to at most `to`, at which two sequences differ.
template <class Token>
int64_t alike_until(const Token* a, const Token* b, int64_t from, int64_t to) {
  constexpr int64_t kBlock = 64;
  while (to - from >= kBlock && std::memcmp(a + from, b + from, kBlock * sizeof(Token)) == 0) from += kBlock;
  while (from < to && a[from] == b[from]) ++from;
  return from;
}

struct Node {
  int64_t depth;        // tokens from the root to the node's end
  int32_t parent;       // the root is node 0, its own parent
  int32_t begin, end;   // its sequences are order_N[begin] .. order_N[end - 1]
  int32_t first_child;  // its children are numbered from here on
  int32_t children;     // 0: a leaf, whose sequences are identical
};

struct Trie {
  std::vector<Node> nodes;       // parents before children; the root has no tokens
  std::vector<int32_t> order_N;  // depth-first, by the tokens' values
};

/// Builds the trie. The caller has checked everything: rows are from 1 to the sequence's length. With `groups_N`,
/// sequences share tokens only within a group; if it is empty, all may share.
template <class Token>
Trie build_trie(const Sequences<Token>& given, std::span<const int64_t> groups_N);

}  // namespace mgrpo
