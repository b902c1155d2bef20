// A panel: 32 rows of a matrix times some tokens, C[row][token] = sum_k W[row][k] x[token][k], in float32.
// FMA widens the panel first; the other ways read its rows straight from where they lie, where they can.
#pragma once
#include <memory>
#include <vector>

#include "scaled_products.h"

#if defined(HAS_TILES)
// Bytes between the tiles of a copied panel: a line more than they take, so that they lie in different places
// of the first cache.
constexpr long TILE_STEP = PANEL * 64 + 64;

// Elements k .. k + depth of a row in bfloat16, 32 of them every TILE_STEP bytes, zeros up to a multiple
// of 32.
inline void copy_for_tiles(const Matrix& w, long row, long k, long depth, char* to) {
  if (w.type == Type::BF16) {
    const char* from = w.row(row) + 2 * k;
    for (long i = 0; i < depth; i += 32, to += TILE_STEP) {
      long some = std::min(32L, depth - i);
      if (some < 32) memset(to, 0, 64);
      memcpy(to, from + 2 * i, 2 * some);
    }
    return;
  }
  float wide[TILE_DEPTH];
  long padded = round_up(depth, 32);
  widen(w, row, k, depth, padded, wide);
  for (long i = 0; i < padded; i += 32, to += TILE_STEP)
    for (long j = 0; j < 32; j += LANES) store(to + 2 * j, narrow(load<Floats>(wide + i + j)));
}
#else
constexpr long TILE_STEP = 0;
#endif

// Scratch of a thread for one panel: the panel widened, and room for C of up to TOKENS tokens.
struct PanelScratch {
  alignas(64) float c[2][PANEL * TOKENS];  // two, for the halves of an MLP's first product
  alignas(64) char panel[std::max(PANEL * 4 * FMA_DEPTH, TILE_DEPTH / 32 * TILE_STEP)];

  // Rows of a result, in whole panels, that one of c has room for.
  static long rows(long ldc) { return TOKENS / ldc * PANEL; }

  static PanelScratch& mine() {
    static thread_local std::unique_ptr<PanelScratch> own;
    if (!own) own.reset(new PanelScratch);
    return *own;
  }
};

// At least that many bytes that are this thread's until it asks again, beginning at a multiple of 64.
inline char* thread_memory(long bytes) {
  static thread_local std::vector<char> own;
  if ((long)own.size() < bytes + 64) own.resize(bytes + 64);
  return (char*)round_up((long)own.data(), 64);
}

// Rows on their way into the second cache.
inline void fetch_rows(const Matrix& m, long first, long count) {
  for (long r = first; r < std::min(m.rows, first + count); r++)
    for (long i = 0; i < m.row_bytes(); i += 64) __builtin_prefetch(m.row(r) + i, 0, 2);
}

// Before the panels from row `first` on: DOT fetches ahead of what it reads, but nobody has fetched these.
inline void fetch_beginning(const Matrix& m, long first, Way way) {
  if (way == Way::DOT) fetch_rows(m, first, rows_ahead(m.stride));
}

// The three ways of `multiply_panel`.
inline void dot_product(const Matrix& w, long first, long count, const Operand& x, float* c, long ldc) {
  if (w.type == Type::BF16) return dot_all<true>(x, w.row(first), w.stride, count, w.rows - first, c, ldc);
  if (w.type == Type::F32) return dot_all<false>(x, w.row(first), w.stride, count, w.rows - first, c, ldc);
  if (is_codes(x.packing.type)) return scaled_all(w, first, count, x, c, ldc);
  // blocks that fit no vectors: four rows at a time, widened along the whole depth
  static thread_local std::vector<float> wide;
  long padded = round_up(x.depth, 2 * LANES);
  if ((long)wide.size() < 4 * padded) wide.resize(4 * padded);
  for (long r = 0; r < count; r += 4) {
    long some = std::min(4L, count - r);
    for (long i = 0; i < some; i++) widen(w, first + r + i, 0, x.depth, x.depth, wide.data() + i * padded);
    dot_all<false>(x, (const char*)wide.data(), 4 * padded, some, some, c + r * ldc, ldc);
  }
}

inline void fma_product(const Matrix& w, long first, long count, const Operand& x, float* c, long ldc) {
  float* panel = (float*)PanelScratch::mine().panel;
  long padded = round_up(count, FMA_ROWS);
  for (long k = 0; k < x.depth; k += FMA_DEPTH) {
    long depth = std::min(FMA_DEPTH, x.depth - k);
    for (long r = 0; r < padded; r++)
      widen(w, first + std::min(r, count - 1), k, depth, depth, panel + r * FMA_DEPTH);
    const float* from = (const float*)x.data + k * LANES;
    fma_rows(panel, FMA_DEPTH, 1, from, x.depth * LANES, LANES, depth, k > 0, c, ldc, padded, groups(x));
  }
}

#if defined(HAS_TILES)
inline void tile_product(const Matrix& w, long first, long count, const Operand& x, float* c, long ldc) {
  long padded = x.padded();
  for (long k = 0; k < x.depth; k += TILE_DEPTH) {
    long depth = std::min(TILE_DEPTH, x.depth - k), whole = round_up(depth, 32);
    const char* panel = w.row(first) + 2 * k;
    long stride = w.stride, step = 64;
    if (w.type != Type::BF16 || count < PANEL || depth % 32) {
      char* copy = PanelScratch::mine().panel;
      for (long r = 0; r < PANEL; r++)
        copy_for_tiles(w, first + std::min(r, count - 1), k, depth, copy + r * 64);
      panel = copy;
      stride = 64, step = TILE_STEP;
    }
    tile_panel(panel, stride, step, x.data + k * 32, padded * 32, groups(x), whole, k > 0, c, ldc);
  }
}
#endif

// Rows first .. first + count (count <= 32) of w times x.tokens <= TOKENS tokens, into c [32][ldc]. Rows
// behind `count` mean nothing, nor do tokens behind x.tokens up to a whole group. Rows up to w.rows will be
// read next.
inline void multiply_panel(const Matrix& w, long first, long count, const Operand& x, float* c, long ldc) {
  if (x.way == Way::DOT) return dot_product(w, first, count, x, c, ldc);
#if defined(HAS_TILES)
  if (x.way == Way::TILES) return tile_product(w, first, count, x, c, ldc);
#endif
  fma_product(w, first, count, x, c, ldc);
}

// The same for any number of rows, from panel to panel.
inline void multiply_panels(const Matrix& w, long first, long count, const Operand& x, float* c, long ldc) {
  for (long r = 0; r < count; r += PANEL)
    multiply_panel(w, first + r, std::min(PANEL, count - r), x, c + r * ldc, ldc);
}

// The tiles of this thread, for as long as it lives.
struct Tiles {
#if defined(__AMX_BF16__)
  Tiles() {
    // Constant data: of GCC 12's intrinsic the compiler only sees that the first 8 bytes are read, and need
    // not write the rest of a variable.
    static constexpr TileConfig config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
#else
  Tiles() {}
#endif
};
