// Tokens packed for a product. Three ways: DOT reads each row of a matrix once, along k, for a few tokens;
// FMA multiplies vectors of tokens in float32; TILES multiplies pairs of bfloat16 by the processor's
// instructions for them (AMX's tiles, or vdpbf16ps).
#pragma once
#include "matrix.h"

#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
#define HAS_TILES
#endif

enum class Way { DOT, FMA, TILES };

// Where element k of a row is whose pairs lie apart: LANES first elements, then LANES second ones.
inline long place_of_pair(long k) {
  long within = k % (2 * LANES);
  return k - within + within / 2 + (within % 2 ? LANES : 0);
}

// Tokens as a way reads them.
struct Operand {
  Way way;
  long tokens, depth;
  bool pairs;  // DOT beside bfloat16: as of place_of_pair
  char* data;

  static long padded_depth(Way way, long depth) {
    return way == Way::DOT ? round_up(depth, 2 * LANES) : way == Way::FMA ? depth : round_up(depth, 32);
  }
  static long group(Way way) { return way == Way::DOT ? 1 : way == Way::FMA ? LANES : 16; }
  static size_t bytes(Way way, long tokens, long depth) {
    return round_up(tokens, group(way)) * padded_depth(way, depth) * (way == Way::TILES ? 2 : 4);
  }
  // from token `first` on, a multiple of group()
  Operand from(long first, long count) const {
    Operand part = *this;
    part.data += bytes(way, first, depth);
    part.tokens = count;
    return part;
  }
  // columns of a panel's result: DOT writes single numbers, the others whole vectors
  long pitch() const { return way == Way::DOT ? tokens : round_up(tokens, LANES); }
  // where token t's element k is in a DOT row
  long place(long k) const { return pairs ? place_of_pair(k) : k; }
};

inline Way choose_way(long tokens, [[maybe_unused]] const Matrix& w, [[maybe_unused]] Type x) {
#if defined(HAS_TILES)
#if defined(__AMX_BF16__)
  constexpr long LEAST = 4;
#else
  constexpr long LEAST = 9;
#endif
  // rows of float32 would be rounded
  bool exact = x == Type::BF16 && (w.type == Type::BF16 || (w.type == Type::F8 && w.round));
  if (exact && tokens >= LEAST) return Way::TILES;
#endif
  // up to here the sums along vectors are as fast as those token by token, and nearer the truth
  constexpr long FEW = 16;
  return tokens <= FEW ? Way::DOT : Way::FMA;
}

inline Operand operand(long tokens, const Matrix& w, Type x, char* data) {
  return {choose_way(tokens, w, x), tokens, w.columns, w.type == Type::BF16, data};
}

// Rows of x, [*, depth] of `type`, those that rows[0 .. tokens) name (or their own order), packed for tokens
// of one group of the operand: first .. first + group.
inline void pack_group(const Operand& to, const char* x, Type type, const int* rows, long first) {
  long group = Operand::group(to.way), depth = to.depth, padded = Operand::padded_depth(to.way, depth);
  long size = size_of(type);
  auto row = [&](long t) { return x + (rows ? rows[t] : t) * depth * size; };
  if (to.way == Way::DOT) {
    float* out = (float*)to.data + first * padded;
    const char* from = row(first);
    if (type == Type::BF16 && to.pairs) {
      long k = 0;
      for (; k + 2 * LANES <= depth; k += 2 * LANES) {
        Words both = load<Words>(from + 2 * k);
        store(out + k, first_of_pair(both));
        store(out + k + LANES, second_of_pair(both));
      }
      std::fill(out + k, out + padded, 0.f);
      for (; k < depth; k++) out[to.place(k)] = from_bf16(((const uint16_t*)from)[k]);
    } else {
      std::fill(out, out + padded, 0.f);
      for (long k = 0; k < depth; k++)
        out[to.place(k)] =
            type == Type::F32 ? ((const float*)from)[k] : from_bf16(((const uint16_t*)from)[k]);
    }
  } else if (to.way == Way::FMA) {
    float* out = (float*)to.data + first * padded;
    for (long t = 0; t < group; t++) {
      bool real = first + t < to.tokens;
      const char* from = real ? row(first + t) : nullptr;
      for (long k = 0; k < depth; k++)
        out[k * group + t] = !real               ? 0
                             : type == Type::F32 ? ((const float*)from)[k]
                                                 : from_bf16(((const uint16_t*)from)[k]);
    }
  } else {
    // [depth / 32][16 pairs][16 tokens][2]: words of two elements, transposed
    uint32_t* out = (uint32_t*)(to.data + first * padded * 2);
    for (long k = 0; k < padded; k += 32, out += 256) {
      uint32_t block[16][16] = {};
      long count = std::min(32L, depth - k);
      for (long t = 0; t < 16 && first + t < to.tokens; t++)
        memcpy(block[t], row(first + t) + 2 * k, 2 * count);
      for (long t = 0; t < 16; t += LANES)
        for (long p = 0; p < 16; p += LANES) transpose(&block[t][p], 16, out + p * 16 + t, 16);
    }
  }
}

inline long groups(const Operand& x) {
  return (x.tokens + Operand::group(x.way) - 1) / Operand::group(x.way);
}

// Elements k and k + 1 of every token, from rows of a panel's result: how the first product of an MLP becomes
// the operand of the second. k is even; `second` is null where the depth ends at k.
inline void put_pair(const Operand& to, long k, const float* first, const float* second) {
  if (to.way == Way::DOT) {
    long padded = Operand::padded_depth(to.way, to.depth);
    for (long t = 0; t < to.tokens; t++) {
      float* row = (float*)to.data + t * padded;
      row[to.place(k)] = first[t];
      if (second) row[to.place(k + 1)] = second[t];
    }
  } else if (to.way == Way::FMA) {
    for (long g = 0; g < groups(to); g++) {
      float* out = (float*)to.data + (g * to.depth + k) * LANES;
      memcpy(out, first + g * LANES, 4 * LANES);
      if (second) memcpy(out + LANES, second + g * LANES, 4 * LANES);
    }
  } else {
    long padded = Operand::padded_depth(to.way, to.depth);
    for (long g = 0; g < groups(to); g++) {
      uint32_t* out = (uint32_t*)(to.data + g * 16 * padded * 2) + k / 32 * 256 + k % 32 / 2 * 16;
      for (long t = 0; t < 16; t += LANES) {
        Words pairs = round_bf16(load<Floats>(first + g * 16 + t)) >> 16;
        if (second) pairs |= round_bf16(load<Floats>(second + g * 16 + t));
        store(out + t, pairs);
      }
    }
  }
}

// What lies behind the depth of an operand that put_pair fills.
inline void clear_padding(const Operand& to) {
  long padded = Operand::padded_depth(to.way, to.depth);
  if (to.way == Way::FMA || padded == to.depth) return;
  if (to.way == Way::DOT) {
    for (long t = 0; t < to.tokens; t++)
      for (long k = to.depth; k < padded; k++) ((float*)to.data)[t * padded + to.place(k)] = 0;
  } else {
    long from = round_up(to.depth, 2);  // put_pair writes whole pairs
    for (long g = 0; g < groups(to); g++)
      for (long k = from; k < padded; k += 2) {
        uint32_t* out = (uint32_t*)(to.data + g * 16 * padded * 2) + k / 32 * 256 + k % 32 / 2 * 16;
        memset(out, 0, 64);
      }
  }
}
