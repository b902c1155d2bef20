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

inline void pack_all(Pool& pool, const Operand& to, const char* x, Type type) {
  long group = Operand::group(to.way), at_once = std::max(1L, 64 / group),
       parts = (groups(to) + at_once - 1) / at_once;
  pool.run(to.tokens * to.depth < 65536 ? std::min(parts, 1L) : parts, [&](long part) {
    bool alone = to.tokens * to.depth < 65536;
    long begin = alone ? 0 : part * at_once, end = alone ? groups(to) : std::min(groups(to), begin + at_once);
    for (long g = begin; g < end; g++) pack_group(to, x, type, nullptr, g * group);
  });
}

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
  long depth = products[0].w.columns, bytes = 0;
  size_t room = 0;
  for (const Product& p : products) {
    bytes += p.w.rows * p.w.stride;
    room = std::max(room, Operand::bytes(choose_way(tokens, p.w, x_type), tokens, depth));
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
      if (other.way == own.way && other.pairs == own.pairs) found = &other;
    if (!found) {
      pack_all(pool, own, x, x_type);
      packed.push_back(own);
      found = &packed.back();
    }
    operands.push_back(found);
  }
  // runs of panels of one matrix, long ones, since every one begins with a wait for memory
  struct Run {
    long product, begin, end;
  };
  std::vector<Run> runs;
  long share = std::max(bytes / (4 * pool.workers()), PANEL * depth);
  bool alone = bytes * (1 + tokens / 32) < 131072;  // waking a thread costs more than its help
  for (long i = 0; i < (long)products.size(); i++) {
    const Matrix& w = products[i].w;
    long panels = (w.rows + PANEL - 1) / PANEL, most = std::min(share, 1L << 20) / (PANEL * w.stride);
    long at_once = alone ? panels : std::max(1L, most);
    for (long p = 0; p < panels; p += at_once) runs.push_back({i, p, std::min(panels, p + at_once)});
  }
  pool.run(alone ? 1 : (long)runs.size(), [&](long task) {
    Tiles tiles;
    float *c = PanelScratch::mine().c[0], *turned = PanelScratch::mine().c[1];
    for (long i = task; i < (alone ? (long)runs.size() : task + 1); i++) {
      const Product& product = products[runs[i].product];
      const Operand& all = *operands[runs[i].product];
      long size = size_of(product.type), rows = product.w.rows;
      // the tokens of a round stay in the second cache
      for (long t = 0; t < tokens; t += TOKENS) {
        Operand some = all.from(t, std::min(TOKENS, tokens - t));
        long ldc = all.way == Way::DOT ? 8 : round_up(some.tokens, LANES);
        for (long panel = runs[i].begin; panel < runs[i].end; panel++) {
          long first = panel * PANEL, count = std::min(PANEL, rows - first);
          multiply_panel(product.w, first, count, some, c, ldc);
          char* to = product.out + (t * rows + first) * size;
          if (all.way == Way::DOT) {
            for (long j = 0; j < some.tokens; j++)
              for (long r = 0; r < PANEL; r++) turned[j * PANEL + r] = c[r * ldc + j];
          } else {
            transpose_panel(c, ldc, some.tokens, turned);
          }
          for (long j = 0; j < some.tokens; j++)
            write_row(turned + j * PANEL, count, product.type, to + j * rows * size);
        }
      }
    }
  });
}
