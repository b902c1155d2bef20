// x @ w^T for any number of tokens.
#pragma once
#include "panels.h"
#include "pool.h"

// `count` float32 numbers, rounded to `type`.
inline void write_row(const float* values, long count, Type type, char* out) {
  if (type == Type::F32) {
    memcpy(out, values, 4 * count);
    return;
  }
  long i = 0;
  for (; i + LANES <= count; i += LANES) store((uint16_t*)out + i, narrow(load<Floats>(values + i)));
  for (; i < count; i++) ((uint16_t*)out)[i] = to_bf16(values[i]);
}

// Tokens 0 .. tokens and rows 0 .. count of a panel's result c [32][ldc] to rows of `out` that are `stride`
// bytes apart. `turned` is room for [tokens][32].
inline void write_panel(const float* c, long ldc, long tokens, long count, float* turned, Type type,
                        char* out, long stride) {
  if (ldc % LANES) {
    for (long t = 0; t < tokens; t++)
      for (long r = 0; r < count; r++) turned[t * PANEL + r] = c[r * ldc + t];
  } else {
    for (long t = 0; t < tokens; t += LANES)
      for (long r = 0; r < PANEL; r += LANES) transpose(c + r * ldc + t, ldc, turned + t * PANEL + r, PANEL);
  }
  for (long t = 0; t < tokens; t++) write_row(turned + t * PANEL, count, type, out + t * stride);
}

inline void pack_all(Pool& pool, const Operand& to, const char* x, Type type) {
  long group = Operand::group(to.way), at_once = std::max(1L, 64 / group);
  auto pack = [&](long part) {
    long end = std::min(groups(to), (part + 1) * at_once);
    for (long g = part * at_once; g < end; g++) pack_group(to, x, type, nullptr, g * group);
  };
  pool.run((groups(to) + at_once - 1) / at_once, pack, to.tokens * to.depth < 65536);
}

constexpr long RUN = 1 << 20;    // most bytes of matrices that a thread takes at once
constexpr long ROUND = 1 << 20;  // bytes of tokens that are multiplied with all matrices before the next ones

// A matrix and where its product goes: [tokens, w.rows] of `type`.
struct Product {
  Matrix w;
  char* out;
  Type type;
};

// x [tokens, depth] of x_type times the transpose of every matrix. They share threads, so that small matrices
// cost little beside large ones.
inline void linear(Pool& pool, const char* x, Type x_type, long tokens,
                   const std::vector<Product>& products) {
  long bytes = 0, room = 0;
  for (const Product& p : products) {
    bytes += p.w.rows * p.w.stride;
    room = std::max(room, operand_bytes(tokens, p.w, x_type));
  }
  room = round_up(room + 64, 64);
  // matrices of several dtypes may want x packed in several ways
  Workspace memory(room * products.size());
  std::vector<Operand> packed;
  std::vector<const Operand*> operands;
  packed.reserve(products.size());
  for (const Product& p : products) {
    Operand own = operand(tokens, p.w, x_type, memory.as<char>() + room * packed.size());
    const Operand* found = nullptr;
    for (const Operand& other : packed)
      if (other.way == own.way && other.packing == own.packing) found = &other;
    if (!found) {
      pack_all(pool, own, x, x_type);
      packed.push_back(own);
      found = &packed.back();
    }
    operands.push_back(found);
  }
  // panels of all matrices in a row
  std::vector<long> ends;
  for (const Product& p : products)
    ends.push_back((ends.empty() ? 0 : ends.back()) + (p.w.rows + PANEL - 1) / PANEL);
  long panels = ends.back();
  // tokens of a round, which stay in the second cache while all panels pass by
  long own_bytes = packed[0].bytes(32), round = std::clamp(ROUND / own_bytes * 32, 32L, TOKENS);
  auto multiply = [&](long r, long begin, long end) {
    long first_token = r * round;
    PanelScratch& scratch = PanelScratch::mine();
    for (size_t i = 0; i < products.size() && begin < end; i++) {
      if (begin >= ends[i]) continue;
      Product product = products[i];
      Operand some = operands[i]->from(first_token, std::min(round, tokens - first_token));
      long size = size_of(product.type), rows = product.w.rows, before = i ? ends[i - 1] : 0;
      long ldc = some.pitch(), stop = std::min(end, ends[i]);
      product.w.rows = std::min(rows, (stop - before) * PANEL);
      fetch_beginning(product.w, (begin - before) * PANEL, some.way);
      for (; begin < stop; begin++) {
        long first = (begin - before) * PANEL, count = std::min(PANEL, rows - first);
        multiply_panel(product.w, first, count, some, scratch.c[0], ldc);
        write_panel(scratch.c[0], ldc, some.tokens, count, scratch.c[1], product.type,
                    product.out + (first_token * rows + first) * size, rows * size);
      }
    }
  };
  auto rounds = [&](long begin, long end) {
    Tiles tiles;
    by_stretch(begin, end, panels, multiply);
  };
  long longest = std::max(1L, RUN / (PANEL * products[0].w.stride));
  pool.run_ranges((tokens + round - 1) / round * panels, longest, rounds, bytes * (1 + tokens / 32) < 131072);
}
