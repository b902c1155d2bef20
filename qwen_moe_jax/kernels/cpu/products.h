// The innermost products, one for each way: a few rows of a matrix times a few tokens.
#pragma once
#include <type_traits>

#include "operand.h"

#if defined(HAS_TILES)
#include <immintrin.h>
#endif

constexpr long PANEL = 32;
constexpr long AHEAD = 16384;  // bytes that are fetched ahead of those being read, into the second cache
constexpr long TOKENS = 512;   // most tokens a panel is multiplied with at once
// Of a step along k. In float32 sums of steps are added up, which loses less than one long sum.
constexpr long FMA_DEPTH = 128, TILE_DEPTH = 2048;

// --- DOT

// ROWS rows of a matrix, `stride` bytes apart, times COUNT tokens; what is `ahead` bytes behind is fetched.
template <int ROWS, int COUNT, bool PAIRS>
inline void dot_rows(const char* w, long stride, long ahead, const float* x, long x_stride, long depth,
                     float* c, long ldc) {
  constexpr int SETS = PAIRS && ROWS * COUNT <= 8 ? 2 : 1;  // enough independent sums to hide the latency
  Floats total[ROWS][COUNT][SETS] = {};
  auto step = [&](long k, const Words* words) {
    if constexpr (PAIRS) {
      for (int m = 0; m < COUNT; m++) {
        Floats x0 = load<Floats>(x + m * x_stride + k), x1 = load<Floats>(x + m * x_stride + k + LANES);
        for (int r = 0; r < ROWS; r++) {
          total[r][m][0] += first_of_pair(words[r]) * x0;
          total[r][m][SETS - 1] += second_of_pair(words[r]) * x1;
        }
      }
    } else {
      for (int m = 0; m < COUNT; m++) {
        Floats x0 = load<Floats>(x + m * x_stride + k);
        for (int r = 0; r < ROWS; r++) total[r][m][0] += (Floats)words[r] * x0;
      }
    }
  };
  constexpr long STEP = PAIRS ? 2 * LANES : LANES, SIZE = PAIRS ? 2 : 4;
  long k = 0;
  for (; k + STEP <= depth; k += STEP) {
    Words words[ROWS];
    for (int r = 0; r < ROWS; r++) {
      const char* from = w + r * stride + k * SIZE;
      __builtin_prefetch(from + ahead, 0, 2);
      words[r] = load<Words>(from);
    }
    step(k, words);
  }
  if (k < depth) {
    Words words[ROWS];
    for (int r = 0; r < ROWS; r++) {
      words[r] = Words{};
      memcpy(&words[r], w + r * stride + k * SIZE, (depth - k) * SIZE);
    }
    step(k, words);
  }
  for (int r = 0; r < ROWS; r++)
    for (int m = 0; m < COUNT; m++)
      c[r * ldc + m] = sum(SETS == 2 ? total[r][m][0] + total[r][m][1] : total[r][m][0]);
}

constexpr int rows_at_once(int count) { return LANES == 16 ? (count == 4 ? 4 : 2) : (count <= 4 ? 2 : 1); }

// Rows that are fetched ahead of the one being read.
inline long rows_ahead(long stride) { return std::clamp(AHEAD / stride, 2L, PANEL); }

// `count` rows of a panel, behind which there are `left` - `count` more that will be read.
template <int COUNT, bool PAIRS>
inline void dot_panel(const Operand& x, long first_token, const char* w, long stride, long count, long left,
                      float* c, long ldc) {
  constexpr int ROWS = rows_at_once(COUNT);
  long x_stride = x.numbers(), ahead = rows_ahead(stride);
  const float* from = (const float*)x.data + first_token * x_stride;
  c += first_token;
  for (long r = 0; r < count;) {
    long bytes = r + ROWS + ahead <= left ? ahead * stride : 0;
    if (r + ROWS <= count) {
      dot_rows<ROWS, COUNT, PAIRS>(w + r * stride, stride, bytes, from, x_stride, x.depth, c + r * ldc, ldc);
      r += ROWS;
    } else {
      dot_rows<1, COUNT, PAIRS>(w + r * stride, stride, bytes, from, x_stride, x.depth, c + r * ldc, ldc);
      r++;
    }
  }
}

// panel(COUNT, first token) for groups of 8, 4, 2 and 1 tokens, COUNT a constant.
template <class Panel>
inline void by_tokens(long tokens, Panel panel) {
  long t = 0;
  for (; t + 8 <= tokens; t += 8) panel(std::integral_constant<int, 8>(), t);
  if (t + 4 <= tokens) panel(std::integral_constant<int, 4>(), t), t += 4;
  if (t + 2 <= tokens) panel(std::integral_constant<int, 2>(), t), t += 2;
  if (t < tokens) panel(std::integral_constant<int, 1>(), t);
}

template <bool PAIRS>
inline void dot_all(const Operand& x, const char* w, long stride, long count, long left, float* c, long ldc) {
  by_tokens(x.tokens,
            [&](auto group, long t) { dot_panel<group(), PAIRS>(x, t, w, stride, count, left, c, ldc); });
}

// --- FMA

constexpr long FMA_ROWS = LANES == 16 ? 8 : 4;

// C[r][v * LANES ..] (+)= sum_k w[r * row_stride + k * k_stride] * x[v * x_vector + k * x_k ..], FMA_ROWS
// rows.
template <int VECTORS>
inline void fma_block(const float* w, long row_stride, long k_stride, const float* x, long x_vector, long x_k,
                      long depth, bool add, float* c, long ldc) {
  Floats total[FMA_ROWS][VECTORS];
  for (long r = 0; r < FMA_ROWS; r++)
    for (int v = 0; v < VECTORS; v++) total[r][v] = Floats{};
  for (long k = 0; k < depth; k++) {
    Floats tokens[VECTORS];
    for (int v = 0; v < VECTORS; v++) tokens[v] = load<Floats>(x + v * x_vector + k * x_k);
    for (long r = 0; r < FMA_ROWS; r++)
      for (int v = 0; v < VECTORS; v++) total[r][v] += w[r * row_stride + k * k_stride] * tokens[v];
  }
  for (long r = 0; r < FMA_ROWS; r++)
    for (int v = 0; v < VECTORS; v++) {
      float* to = c + r * ldc + v * LANES;
      store(to, add ? load<Floats>(to) + total[r][v] : total[r][v]);
    }
}

// The same for any number of vectors, and of rows that is a multiple of FMA_ROWS.
inline void fma_rows(const float* w, long row_stride, long k_stride, const float* x, long x_vector, long x_k,
                     long depth, bool add, float* c, long ldc, long rows, long vectors) {
  for (long v = 0; v < vectors; v += 3)
    for (long r = 0; r < rows; r += FMA_ROWS) {
      const float *from = w + r * row_stride, *part = x + v * x_vector;
      float* to = c + r * ldc + v * LANES;
      long some = std::min(3L, vectors - v);
      if (some == 3)
        fma_block<3>(from, row_stride, k_stride, part, x_vector, x_k, depth, add, to, ldc);
      else if (some == 2)
        fma_block<2>(from, row_stride, k_stride, part, x_vector, x_k, depth, add, to, ldc);
      else
        fma_block<1>(from, row_stride, k_stride, part, x_vector, x_k, depth, add, to, ldc);
    }
}

// --- TILES

#if defined(__AMX_BF16__)
struct TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// 32 rows, `stride` bytes apart, each 32 elements `step` bytes further, times 32 tokens. Meanwhile `rows`
// rows at `next` are fetched into the second cache; a fetch from where nothing lies does no harm.
inline void tile_square(const char* w, long stride, long step, const char* x, long x_stride, long depth,
                        bool add, float* c, long ldc, const char* next, long rows) {
  float *c1 = c + 16, *c2 = c + 16 * ldc, *c3 = c2 + 16;
  if (add) {
    _tile_loadd(0, c, ldc * 4);
    _tile_loadd(1, c1, ldc * 4);
    _tile_loadd(2, c2, ldc * 4);
    _tile_loadd(3, c3, ldc * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (long k = 0; k < depth; k += 32, w += step) {
    for (long r = 0; r < rows; r++) __builtin_prefetch(next + r * stride + 2 * k, 0, 2);
    _tile_loadd(4, w, stride);
    _tile_loadd(6, x + k * 32, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, w + 16 * stride, stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, x + x_stride + k * 32, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, ldc * 4);
  _tile_stored(1, c1, ldc * 4);
  _tile_stored(2, c2, ldc * 4);
  _tile_stored(3, c3, ldc * 4);
}

// 16 rows, laid out likewise, times 16 * VECTORS tokens, one or two vectors.
template <int VECTORS>
inline void tile_strip(const char* w, long stride, long step, const char* x, long x_stride, long depth,
                       bool add, float* c, long ldc) {
  if (add) {
    _tile_loadd(0, c, ldc * 4);
    if (VECTORS == 2) _tile_loadd(1, c + 16, ldc * 4);
  } else {
    _tile_zero(0);
    if (VECTORS == 2) _tile_zero(1);
  }
  for (long k = 0; k < depth; k += 32, w += step) {
    _tile_loadd(4, w, stride);
    _tile_loadd(6, x + k * 32, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (VECTORS == 2) {
      _tile_loadd(7, x + x_stride + k * 32, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
  }
  _tile_stored(0, c, ldc * 4);
  if (VECTORS == 2) _tile_stored(1, c + 16, ldc * 4);
}

// A panel's 32 rows times 16 * vectors tokens, `x_stride` bytes from one vector to the next. Up to two
// vectors take as long as their rows take to come from memory, and 16 of them at once come faster than 32;
// more vectors leave time to fetch the next panel.
inline void tile_panel(const char* w, long stride, long step, const char* x, long x_stride, long vectors,
                       long depth, bool add, float* c, long ldc) {
  long v = 0;
  if (vectors > 2) {
    // rows that one square fetches of the next panel, where rows are read from where they lie
    long share = step == 64 ? (PANEL + vectors / 2 - 1) / (vectors / 2) : 0;
    for (; v + 2 <= vectors; v += 2)
      tile_square(w, stride, step, x + v * x_stride, x_stride, depth, add, c + v * 16, ldc,
                  w + (PANEL + v / 2 * share) * stride, share);
  }
  for (long r = 0; r < PANEL; r += 16) {
    const char *rows = w + r * stride, *from = x + v * x_stride;
    float* to = c + r * ldc + v * 16;
    if (vectors - v == 2) tile_strip<2>(rows, stride, step, from, x_stride, depth, add, to, ldc);
    if (vectors - v == 1) tile_strip<1>(rows, stride, step, from, x_stride, depth, add, to, ldc);
  }
}
#elif defined(HAS_TILES)
// A panel's 32 rows, `stride` bytes apart, each 32 elements `step` bytes further, times 16 * VECTORS tokens.
template <int VECTORS>
inline void tile_block(const char* w, long stride, long step, const char* x, long x_stride, long depth,
                       bool add, float* c, long ldc) {
  constexpr long ROWS = 8;
  for (long r = 0; r < PANEL; r += ROWS) {
    __m512 total[ROWS][VECTORS];
    for (long i = 0; i < ROWS; i++)
      for (int v = 0; v < VECTORS; v++)
        total[i][v] = add ? _mm512_loadu_ps(c + (r + i) * ldc + v * 16) : _mm512_setzero_ps();
    for (long k = 0; k < depth; k += 2) {
      __m512bh tokens[VECTORS];
      for (int v = 0; v < VECTORS; v++) tokens[v] = (__m512bh)_mm512_loadu_si512(x + v * x_stride + k * 32);
      for (long i = 0; i < ROWS; i++) {
        int pair;
        memcpy(&pair, w + (r + i) * stride + k / 32 * step + k % 32 * 2, 4);
        for (int v = 0; v < VECTORS; v++)
          total[i][v] = _mm512_dpbf16_ps(total[i][v], tokens[v], (__m512bh)_mm512_set1_epi32(pair));
      }
    }
    for (long i = 0; i < ROWS; i++)
      for (int v = 0; v < VECTORS; v++) _mm512_storeu_ps(c + (r + i) * ldc + v * 16, total[i][v]);
  }
}

// The same for any number of vectors.
inline void tile_panel(const char* w, long stride, long step, const char* x, long x_stride, long vectors,
                       long depth, bool add, float* c, long ldc) {
  for (long v = 0; v < vectors; v += 3) {
    auto block = vectors - v >= 3 ? tile_block<3> : vectors - v == 2 ? tile_block<2> : tile_block<1>;
    block(w, stride, step, x + v * x_stride, x_stride, depth, add, c + v * 16, ldc);
  }
}
#endif
