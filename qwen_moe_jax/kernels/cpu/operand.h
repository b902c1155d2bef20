// Tokens packed for a product. Three ways: DOT reads each row of a matrix once, along k, for a few tokens;
// FMA multiplies vectors of tokens in float32; TILES multiplies pairs of bfloat16 by the processor's
// instructions for them (AMX's tiles, or vdpbf16ps).
#pragma once
#include "codes.h"

#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
#define HAS_TILES
#endif

enum class Way { DOT, FMA, TILES };

// Where element k of a row is whose pairs lie apart: LANES first elements, then LANES second ones.
inline long place_of_pair(long k) {
  long within = k % (2 * LANES);
  return k - within + within / 2 + (within % 2 ? LANES : 0);
}

// How DOT's tokens lie beside a matrix.
struct Packing {
  Type type =
      Type::F32;  // F32: in order; BF16: as of place_of_pair; of codes: as Codes<type> has its numbers
  long unit = 0;  // of codes with a bias: elements of `Units`, before which their sums stand

  bool operator==(const Packing& other) const { return type == other.type && unit == other.unit; }
};

// Codes in blocks that do not fit vectors are widened first.
inline Packing packing_of(const Matrix& w) {
  if (!is_codes(w.type)) return {w.type, 0};
  long unit = units_of(w).unit;
  if (unit == 0) return {};
  return {w.type, info_of(w.type).bias == 0 ? 0 : unit};
}

// Tokens as a way reads them.
struct Operand {
  Way way;
  long tokens, depth;
  Packing packing;
  char* data;

  static long group(Way way) { return way == Way::DOT ? 1 : way == Way::FMA ? LANES : 16; }
  // elements of a token, with zeros behind its depth
  long padded() const {
    if (way == Way::FMA) return depth;
    if (way == Way::TILES) return round_up(depth, 32);
    return round_up(depth, is_codes(packing.type) ? info_of(packing.type).step : 2 * LANES);
  }
  // numbers of a token
  long numbers() const {
    bool sums = way == Way::DOT && packing.unit;
    return padded() + (sums ? (depth + packing.unit - 1) / packing.unit * LANES : 0);
  }
  size_t bytes(long some) const {
    return round_up(some, group(way)) * numbers() * (way == Way::TILES ? 2 : 4);
  }
  size_t bytes() const { return bytes(tokens); }
  // from token `first` on, a multiple of group()
  Operand from(long first, long count) const {
    Operand part = *this;
    part.data += bytes(first);
    part.tokens = count;
    return part;
  }
  // columns of a panel's result: DOT writes single numbers, the others whole vectors
  long pitch() const { return way == Way::DOT ? tokens : round_up(tokens, LANES); }

  // Of DOT: a token's numbers, where its element k is among them, and what that is multiplied by.
  float* token(long t) const { return (float*)data + t * numbers(); }
  long place(long k) const {
    if (packing.type == Type::F32) return k;
    if (packing.type == Type::BF16) return place_of_pair(k);
    const CodesInfo& info = info_of(packing.type);
    long sums = packing.unit ? (k / packing.unit + 1) * LANES : 0;
    return sums + k / info.step * info.step + info.place[k % info.step];
  }
  float factor(long k) const {
    if (!is_codes(packing.type)) return 1;
    const CodesInfo& info = info_of(packing.type);
    return info.factor[k % info.step];
  }
};

inline Way choose_way(long tokens, [[maybe_unused]] const Matrix& w, [[maybe_unused]] Type x) {
#if defined(HAS_TILES)
  // codes are widened for tiles, which takes as long as DOT's products of a few tokens
#if defined(__AMX_BF16__)
  long least = is_codes(w.type) ? 9 : 4;
#else
  constexpr long least = 9;
#endif
  // rows of float32 would be rounded
  if (x == Type::BF16 && w.type != Type::F32 && tokens >= least) return Way::TILES;
#endif
  // up to here the sums along vectors are as fast as those token by token, and nearer the truth
  constexpr long FEW = 16;
  return tokens <= FEW ? Way::DOT : Way::FMA;
}

inline Operand operand(long tokens, const Matrix& w, Type x, char* data) {
  Way way = choose_way(tokens, w, x);
  return {way, tokens, w.columns, way == Way::DOT ? packing_of(w) : Packing{}, data};
}

// Bytes that tokens take as this matrix wants them.
inline long operand_bytes(long tokens, const Matrix& w, Type x) {
  return operand(tokens, w, x, nullptr).bytes();
}

// What of DOT's tokens depends on all of their elements, when those are in their places: zeros behind the
// last one, and before each unit its sums times -BIAS.
inline void finish_token(const Operand& to, long t) {
  float* out = to.token(t);
  for (long k = to.depth; k < to.padded(); k++) out[to.place(k)] = 0;
  if (!to.packing.unit) return;
  const CodesInfo& info = info_of(to.packing.type);
  long parts = info.step / LANES;
  float scale[8];  // of a part's tokens
  for (long k = 0; k < info.step; k++) scale[info.place[k] / LANES] = -info.bias / info.factor[k];
  for (long k = 0; k < to.padded(); k += to.packing.unit) {
    float* sums = out;
    Floats total = {};
    out += LANES;
    for (long i = k; i < std::min(to.padded(), k + to.packing.unit); i += info.step)
      for (long n = 0; n < parts; n++, out += LANES) total += load<Floats>(out) * scale[n];
    store(sums, total);
  }
}

// A row of x, a matrix of one row, for DOT beside codes.
template <Type T>
inline void pack_token(const Operand& to, long t, const Matrix& x) {
  using Of = Codes<T>;
  constexpr long STEP = Of::PARTS * LANES;
  const float* factors = info_of(T).factor;  // those of the first lane are those of all
  float *out = to.token(t), in[STEP];
  for (long k = 0; k < to.depth; k += STEP, out += STEP) {
    if (to.packing.unit && k % to.packing.unit == 0) out += LANES;
    widen(x, 0, k, std::min(STEP, to.depth - k), STEP, in);
    if constexpr (Of::RUN == 0) {
      for (long part = 0; part < STEP; part += 2 * LANES)
        for (long i = 0; i < LANES; i++) {
          out[part + i] = in[part + 2 * i];
          out[part + LANES + i] = in[part + 2 * i + 1];
        }
    } else {
      if constexpr (Of::PARTS == LANES) {
        transpose(in, LANES, out, LANES);
      } else {
        for (long lane = 0; lane < LANES; lane++)
          for (long n = 0; n < Of::PARTS; n++) out[n * LANES + lane] = in[lane * Of::PARTS + n];
      }
      for (long n = 0; n < Of::PARTS; n++) store(out + n * LANES, load<Floats>(out + n * LANES) * factors[n]);
    }
  }
  finish_token(to, t);
}

// Rows of x, [*, depth] of `type`, those that rows[0 .. tokens) name (or their own order), packed for tokens
// of one group of the operand: first .. first + group.
inline void pack_group(const Operand& to, const char* x, Type type, const int* rows, long first) {
  long group = Operand::group(to.way), depth = to.depth, padded = to.padded();
  long size = size_of(type);
  auto row = [&](long t) { return x + (rows ? rows[t] : t) * depth * size; };
  if (to.way == Way::DOT) {
    float* out = to.token(first);
    const char* from = row(first);
    if (is_codes(to.packing.type)) {
      Matrix one{from, type, 1, depth, 0};
      if (to.packing.type == Type::F8) return pack_token<Type::F8>(to, first, one);
      if (to.packing.type == Type::I8) return pack_token<Type::I8>(to, first, one);
      if (to.packing.type == Type::I4) return pack_token<Type::I4>(to, first, one);
      pack_token<Type::E2M1>(to, first, one);
    } else if (type == Type::BF16 && to.packing.type == Type::BF16) {
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
      bool pairs = to.packing.type == Type::BF16;
      for (long k = 0; k < depth; k++)
        out[pairs ? place_of_pair(k) : k] =
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
    long place = to.place(k), next = second ? to.place(k + 1) : place;
    float factor = to.factor(k), next_factor = second ? to.factor(k + 1) : factor;
    for (long t = 0; t < to.tokens; t++) {
      float* row = to.token(t);
      row[place] = first[t] * factor;
      if (second) row[next] = second[t] * next_factor;
    }
  } else if (to.way == Way::FMA) {
    for (long g = 0; g < groups(to); g++) {
      float* out = (float*)to.data + (g * to.depth + k) * LANES;
      memcpy(out, first + g * LANES, 4 * LANES);
      if (second) memcpy(out + LANES, second + g * LANES, 4 * LANES);
    }
  } else {
    long padded = to.padded();
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

// What an operand holds beside the elements that put_pair wrote, all of which it did before.
inline void finish(const Operand& to) {
  if (to.way == Way::DOT) {
    for (long t = 0; t < to.tokens; t++) finish_token(to, t);
  } else if (to.way == Way::TILES) {
    long padded = to.padded(), from = round_up(to.depth, 2);  // put_pair writes whole pairs
    for (long g = 0; g < groups(to); g++)
      for (long k = from; k < padded; k += 2) {
        uint32_t* out = (uint32_t*)(to.data + g * 16 * padded * 2) + k / 32 * 256 + k % 32 / 2 * 16;
        memset(out, 0, 64);
      }
  }
}
