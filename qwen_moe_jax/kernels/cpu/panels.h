// A panel: 32 rows of a matrix times some tokens, C[row][token] = sum_k W[row][k] x[token][k], in float32.
// Three ways: DOT reads each row once, along k, for a few tokens; FMA widens the panel to float32 and multiplies
// vectors of tokens; AMX multiplies bfloat16 tiles, the panel's rows straight from where they lie.
#pragma once
#include <algorithm>
#include <memory>
#include <vector>

#include "simd.h"
#if defined(__AMX_BF16__)
#include <immintrin.h>
#endif

enum class Type { F32, BF16, F8 };
enum class Way { DOT, FMA, AMX };

constexpr long PANEL = 32;
constexpr long AHEAD = 16384;  // bytes that are fetched ahead of those being read, into the second cache
constexpr long TOKENS = 512;  // most tokens a panel is multiplied with at once
#if defined(__AMX_BF16__)
constexpr long DEPTH = 1024;  // of a step along k
#else
constexpr long DEPTH = 256;
#endif

inline long round_up(long n, long to) { return (n + to - 1) / to * to; }

inline long size_of(Type type) { return type == Type::F32 ? 4 : type == Type::BF16 ? 2 : 1; }

struct Matrix {
  const void* data;
  Type type;
  long rows, columns, stride;  // bytes from one row to the next
  // of F8: a scale for each block, and whether the products are rounded to bfloat16
  const float* scales = nullptr;
  long block_rows = 1, block_columns = 1;
  bool round = false;

  const char* row(long r) const { return (const char*)data + r * stride; }
  long scales_across() const { return (columns + block_columns - 1) / block_columns; }
};

// float8_e4m3fn, finite. Exponent and mantissa move to where a float32 has them, and the exponent's bias is
// corrected; subnormals, m * 2^-9, are what is left of (1 + m / 8) * 2^-6 without the 1.
inline Floats from_float8(Words bits) {
  Words sign = (bits & 0x80u) << 24, rest = bits & 0x7fu;
  Floats normal = (Floats)((rest << 20) + (120u << 23));
  Floats small = (Floats)((rest << 20) + (121u << 23)) - (Floats)(Words{} + (121u << 23));
  Words value = (rest < 8u) ? (Words)small : (Words)normal;
  return (Floats)(value | sign);
}

// Elements begin .. begin + count - 1 of a row, in float32; zeros up to `padded`.
inline void widen(const Matrix& w, long row, long begin, long count, long padded, float* out) {
  long i = 0;
  if (w.type == Type::F32) {
    memcpy(out, w.row(row) + 4 * begin, 4 * count);
    i = count;
  } else if (w.type == Type::BF16) {
    const uint16_t* from = (const uint16_t*)w.row(row) + begin;
    for (; i + LANES <= count; i += LANES) {
      Words wide = __builtin_convertvector(load<Halves>(from + i), Words);
      store(out + i, wide << 16);
    }
    for (; i < count; i++) out[i] = from_bf16(from[i]);
  } else {
    typedef uint8_t Bytes __attribute__((vector_size(LANES)));
    const uint8_t* from = (const uint8_t*)w.row(row) + begin;
    const float* scales = w.scales + row / w.block_rows * w.scales_across();
    while (i < count) {
      long block = (begin + i) / w.block_columns;
      float scale = scales[block];
      long end = std::min(count, (block + 1) * w.block_columns - begin);
      for (; i < end; i += LANES) {
        uint8_t part[LANES] = {};
        long n = std::min(LANES, end - i);
        if (n == LANES) memcpy(part, from + i, LANES);
        else memcpy(part, from + i, n);
        Floats value = from_float8(__builtin_convertvector(load<Bytes>(part), Words)) * scale;
        if (w.round) value = (Floats)round_bf16(value);
        if (n == LANES) {
          store(out + i, value);
        } else {
          float whole[LANES];
          store(whole, value);
          memcpy(out + i, whole, 4 * n);
        }
      }
      i = end;
    }
  }
  for (; i < padded; i++) out[i] = 0;
}

// Tokens as a way reads them.
struct Operand {
  Way way;
  long tokens, depth;
  bool pairs;  // DOT beside bfloat16: LANES first elements of pairs, then LANES second ones
  char* data;

  static long padded_depth(Way way, long depth) {
    return way == Way::DOT ? round_up(depth, 2 * LANES) : way == Way::FMA ? depth : round_up(depth, 32);
  }
  static long group(Way way) { return way == Way::DOT ? 1 : way == Way::FMA ? LANES : 16; }
  static size_t bytes(Way way, long tokens, long depth) {
    return round_up(tokens, group(way)) * padded_depth(way, depth) * (way == Way::AMX ? 2 : 4);
  }
  // from token `first` on, a multiple of group()
  Operand from(long first, long count) const {
    Operand part = *this;
    part.data += bytes(way, first, depth);
    part.tokens = count;
    return part;
  }
  // where token t's element k is in a DOT row
  long place(long k) const {
    if (!pairs) return k;
    long within = k % (2 * LANES);
    return k - within + within / 2 + (within % 2 ? LANES : 0);
  }
};

inline Way choose_way(long tokens, const Matrix& w, Type x) {
#if defined(__AMX_BF16__)
  // rows of float32 would be rounded
  bool exact = x == Type::BF16 && (w.type == Type::BF16 || (w.type == Type::F8 && w.round));
  if (exact && tokens >= 4) return Way::AMX;
#endif
  return tokens <= 8 ? Way::DOT : Way::FMA;
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
        out[to.place(k)] = type == Type::F32 ? ((const float*)from)[k] : from_bf16(((const uint16_t*)from)[k]);
    }
  } else if (to.way == Way::FMA) {
    float* out = (float*)to.data + first * padded;
    for (long t = 0; t < group; t++) {
      bool real = first + t < to.tokens;
      const char* from = real ? row(first + t) : nullptr;
      for (long k = 0; k < depth; k++)
        out[k * group + t] = !real                ? 0
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
#if defined(__AVX512F__)
      transpose(block, 16, out, 16);
#else
      for (long t = 0; t < 16; t++)
        for (long p = 0; p < 16; p++) out[p * 16 + t] = block[t][p];
#endif
    }
  }
}

inline long groups(const Operand& x) { return (x.tokens + Operand::group(x.way) - 1) / Operand::group(x.way); }

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
      for (long t = 0; t < 16; t++)
        out[t] = to_bf16(first[g * 16 + t]) | (second ? (uint32_t)to_bf16(second[g * 16 + t]) << 16 : 0);
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

// --- DOT

template <int ROWS, int COUNT, bool PAIRS>
inline void dot_rows(const char* const* w, const char* const* ahead, const float* x, long stride, long depth,
                     float* c, long ldc) {
  constexpr int SETS = PAIRS && ROWS * COUNT <= 8 ? 2 : 1;  // enough independent sums to hide the latency
  Floats total[ROWS][COUNT][SETS] = {};
  auto step = [&](long k, const Words* words) {
    if constexpr (PAIRS) {
      for (int m = 0; m < COUNT; m++) {
        Floats x0 = load<Floats>(x + m * stride + k), x1 = load<Floats>(x + m * stride + k + LANES);
        for (int r = 0; r < ROWS; r++) {
          total[r][m][0] += first_of_pair(words[r]) * x0;
          total[r][m][SETS - 1] += second_of_pair(words[r]) * x1;
        }
      }
    } else {
      for (int m = 0; m < COUNT; m++) {
        Floats x0 = load<Floats>(x + m * stride + k);
        for (int r = 0; r < ROWS; r++) total[r][m][0] += (Floats)words[r] * x0;
      }
    }
  };
  constexpr long STEP = PAIRS ? 2 * LANES : LANES, SIZE = PAIRS ? 2 : 4;
  long k = 0;
  for (; k + STEP <= depth; k += STEP) {
    Words words[ROWS];
    for (int r = 0; r < ROWS; r++) {
      __builtin_prefetch(ahead[r] + k * SIZE, 0, 2);
      words[r] = load<Words>(w[r] + k * SIZE);
    }
    step(k, words);
  }
  if (k < depth) {
    Words words[ROWS];
    for (int r = 0; r < ROWS; r++) {
      words[r] = Words{};
      memcpy(&words[r], w[r] + k * SIZE, (depth - k) * SIZE);
    }
    step(k, words);
  }
  for (int r = 0; r < ROWS; r++)
    for (int m = 0; m < COUNT; m++) c[r * ldc + m] = sum(SETS == 2 ? total[r][m][0] + total[r][m][1] : total[r][m][0]);
}

constexpr int rows_at_once(int count) {
  return LANES == 16 ? (count == 4 ? 4 : 2) : (count <= 4 ? 2 : 1);
}

template <int COUNT, bool PAIRS>
inline void dot_panel(const Operand& x, long first_token, const char* const* rows, long count, long ahead, float* c,
                      long ldc) {
  constexpr int ROWS = rows_at_once(COUNT);
  long stride = Operand::padded_depth(Way::DOT, x.depth);
  const float* from = (const float*)x.data + first_token * stride;
  for (long r = 0; r < count; r += ROWS) {  // a last group runs over into rows that repeat the last one
    dot_rows<ROWS, COUNT, PAIRS>(rows + r, rows + r + ahead, from, stride, x.depth, c + r * ldc + first_token, ldc);
  }
}

template <bool PAIRS>
inline void dot_all(const Operand& x, const char* const* rows, long count, long ahead, float* c, long ldc) {
  long t = 0;
  for (; t + 8 <= x.tokens; t += 8) dot_panel<8, PAIRS>(x, t, rows, count, ahead, c, ldc);
  if (t + 4 <= x.tokens) dot_panel<4, PAIRS>(x, t, rows, count, ahead, c, ldc), t += 4;
  if (t + 2 <= x.tokens) dot_panel<2, PAIRS>(x, t, rows, count, ahead, c, ldc), t += 2;
  if (t < x.tokens) dot_panel<1, PAIRS>(x, t, rows, count, ahead, c, ldc);
}

// --- FMA

constexpr long FMA_ROWS = LANES == 16 ? 8 : 4;

template <int VECTORS>
inline void fma_block(const float* w, const float* x, long x_stride, long depth, bool add, float* c, long ldc) {
  Floats total[FMA_ROWS][VECTORS];
  for (long r = 0; r < FMA_ROWS; r++)
    for (int v = 0; v < VECTORS; v++) total[r][v] = add ? load<Floats>(c + r * ldc + v * LANES) : Floats{};
  for (long k = 0; k < depth; k++) {
    Floats tokens[VECTORS];
    for (int v = 0; v < VECTORS; v++) tokens[v] = load<Floats>(x + v * x_stride + k * LANES);
    for (long r = 0; r < FMA_ROWS; r++)
      for (int v = 0; v < VECTORS; v++) total[r][v] += w[r * DEPTH + k] * tokens[v];
  }
  for (long r = 0; r < FMA_ROWS; r++)
    for (int v = 0; v < VECTORS; v++) store(c + r * ldc + v * LANES, total[r][v]);
}

// --- AMX

#if defined(__AMX_BF16__)
struct TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// A panel's 32 rows, `stride` bytes apart, times 16 * VECTORS tokens.
template <int VECTORS>
inline void amx_block(const char* w, long stride, const char* x, long x_stride, long depth, bool add, float* c,
                      long ldc) {
  if (add) {
    _tile_loadd(0, c, ldc * 4);
    _tile_loadd(1, c + 16 * ldc, ldc * 4);
    if (VECTORS == 2) _tile_loadd(2, c + 16, ldc * 4);
    if (VECTORS == 2) _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (VECTORS == 2) _tile_zero(2);
    if (VECTORS == 2) _tile_zero(3);
  }
  for (long k = 0; k < depth; k += 32) {
    _tile_loadd(4, w + 2 * k, stride);
    _tile_loadd(6, x + k * 32, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, w + 16 * stride + 2 * k, stride);
    _tile_dpbf16ps(1, 5, 6);
    if (VECTORS == 2) {
      _tile_loadd(7, x + x_stride + k * 32, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, ldc * 4);
  _tile_stored(1, c + 16 * ldc, ldc * 4);
  if (VECTORS == 2) _tile_stored(2, c + 16, ldc * 4);
  if (VECTORS == 2) _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
}
#endif

// Scratch of a thread for one panel: the panel widened, and room for C of up to TOKENS tokens.
struct PanelScratch {
  alignas(64) float c[2][PANEL * TOKENS];  // two, for the halves of an MLP's first product
  alignas(64) float widened[PANEL * (DEPTH + LANES)];

  static PanelScratch& mine() {
    static thread_local std::unique_ptr<PanelScratch> own;
    if (!own) own.reset(new PanelScratch);
    return *own;
  }
};

// Rows first .. first + count (count <= 32) of w times x.tokens <= TOKENS tokens, into c [32][ldc]. Rows behind
// `count` mean nothing, nor do tokens behind x.tokens up to a whole group.
inline void multiply_panel(const Matrix& w, long first, long count, const Operand& x, float* c, long ldc) {
  float* widened = PanelScratch::mine().widened;
  if (x.way == Way::DOT) {
    if (w.type != Type::F8) {
      const char* rows[2 * PANEL];
      long ahead = std::max(2L, std::min(AHEAD / w.stride, PANEL));
      // those behind the panel are where the next one begins
      for (long r = 0; r < PANEL + ahead; r++)
        rows[r] = w.row(std::min(first + (r < PANEL ? std::min(r, count - 1) : r), w.rows - 1));
      if (w.type == Type::BF16) dot_all<true>(x, rows, count, ahead, c, ldc);
      else dot_all<false>(x, rows, count, ahead, c, ldc);
      return;
    }
    // float8: four rows at a time, widened along the whole depth
    static thread_local std::vector<float> wide;
    long padded = round_up(x.depth, 2 * LANES);
    if ((long)wide.size() < 4 * padded) wide.resize(4 * padded);
    const char* rows[8];
    for (long r = 0; r < 8; r++) rows[r] = (const char*)(wide.data() + (r % 4) * padded);
    for (long r = 0; r < count; r += 4) {
      for (long i = 0; i < 4; i++)
        widen(w, first + std::min(r + i, count - 1), 0, x.depth, x.depth, wide.data() + i * padded);
      dot_all<false>(x, rows, 4, 4, c + r * ldc, ldc);
    }
    return;
  }
  for (long k = 0; k < x.depth; k += DEPTH) {
    long depth = std::min(DEPTH, x.depth - k);
    if (x.way == Way::FMA) {
      long padded = round_up(count, FMA_ROWS);
      for (long r = 0; r < padded; r++)
        widen(w, first + std::min(r, count - 1), k, depth, depth, widened + r * DEPTH);
      long stride = x.depth * LANES;
      for (long g = 0; g < groups(x); g += 3) {
        const float* from = (const float*)x.data + (g * x.depth + k) * LANES;
        long vectors = std::min(3L, groups(x) - g);
        for (long r = 0; r < padded; r += FMA_ROWS) {
          float* to = c + r * ldc + g * LANES;
          const float* part = widened + r * DEPTH;
          if (vectors == 3) fma_block<3>(part, from, stride, depth, k > 0, to, ldc);
          else if (vectors == 2) fma_block<2>(part, from, stride, depth, k > 0, to, ldc);
          else fma_block<1>(part, from, stride, depth, k > 0, to, ldc);
        }
      }
    }
#if defined(__AMX_BF16__)
    if (x.way == Way::AMX) {
      const char* panel = w.row(first) + 2 * k;
      long stride = w.stride, whole = round_up(depth, 32);
      if (w.type != Type::BF16 || count < PANEL || depth % 32) {
        uint16_t* narrow = (uint16_t*)widened;
        float row[DEPTH + LANES];
        for (long r = 0; r < PANEL; r++) {
          widen(w, first + std::min(r, count - 1), k, depth, whole, row);
          for (long i = 0; i < whole; i++) narrow[r * DEPTH + i] = to_bf16(row[i]);
        }
        panel = (const char*)narrow;
        stride = DEPTH * 2;
      }
      long padded = Operand::padded_depth(x.way, x.depth);
      for (long g = 0; g < groups(x); g += 2) {
        const char* from = x.data + (g * padded + k) * 32;
        if (g + 1 < groups(x)) amx_block<2>(panel, stride, from, padded * 32, whole, k > 0, c + g * 16, ldc);
        else amx_block<1>(panel, stride, from, padded * 32, whole, k > 0, c + g * 16, ldc);
      }
    }
#endif
  }
}

// The tiles of this thread, for as long as it lives.
struct Tiles {
#if defined(__AMX_BF16__)
  Tiles() {
    TileConfig config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
#else
  Tiles() {}
#endif
};

// Tokens 0 .. tokens of rows 0 .. rows of a panel's result, as LANES-aligned rows of `out` [tokens][32].
inline void transpose_panel(const float* c, long ldc, long tokens, float* out) {
  for (long t = 0; t < tokens; t += LANES)
    for (long r = 0; r < PANEL; r += LANES) transpose(c + r * ldc + t, ldc, out + t * PANEL + r, PANEL);
}
