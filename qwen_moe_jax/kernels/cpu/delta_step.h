// A few steps of the gated delta rule (model/delta_rule.py): a head's state is read from memory once.
#pragma once
#include <vector>

#include "pool.h"
#include "simd.h"

struct DeltaStepArguments {
  long batch, seq, slots, heads, key_heads, key_dim, value_dim;
  bool keep;                 // the states stay as they are
  float* state;              // [slots, heads, key_dim, value_dim], changed where it lies unless `keep`
  const int* slot;           // [batch]: the slot of each row; a row whose slot there is not changes nothing
  const float *query, *key;  // [batch, seq, key_heads, key_dim]
  const float *value, *g, *beta;  // [batch, seq, heads, value_dim]; [batch, seq, heads]
  float* out;                     // [batch, seq, heads, value_dim]
};

// One token's columns of a head's state, VECTORS * LANES of them or the last few; rows of the state are
// `stride` apart.
template <int VECTORS>
inline void delta_columns(long key_dim, float* state, long stride, const float* q, const float* k,
                          const float* v, float decay, float beta, float* out, long count) {
  auto read = [&](const float* from, int i) {
    if (count >= VECTORS * LANES) return load<Floats>(from + i * LANES);
    float part[LANES] = {};
    memcpy(part, from, 4 * count);
    return load<Floats>(part);
  };
  auto write = [&](float* to, int i, Floats x) {
    if (count >= VECTORS * LANES) return store(to + i * LANES, x);
    float part[LANES];
    store(part, x);
    memcpy(to, part, 4 * count);
  };
  Floats recalled[VECTORS] = {}, total[VECTORS] = {}, correction[VECTORS];
  for (long d = 0; d < key_dim; d++)
    for (int i = 0; i < VECTORS; i++) recalled[i] += k[d] * read(state + d * stride, i);
  for (int i = 0; i < VECTORS; i++) correction[i] = (read(v, i) - recalled[i] * decay) * beta;
  for (long d = 0; d < key_dim; d++)
    for (int i = 0; i < VECTORS; i++) {
      Floats row = read(state + d * stride, i) * decay + k[d] * correction[i];
      write(state + d * stride, i, row);
      total[i] += q[d] * row;
    }
  for (int i = 0; i < VECTORS; i++) write(out, i, total[i]);
}

// All tokens of a row, in columns c .. of a head: they do not meet the other columns.
template <int VECTORS>
inline void delta_tokens(const DeltaStepArguments& a, long b, long h, long c, float* scratch) {
  long size = a.key_dim * a.value_dim, count = std::min(a.value_dim - c, VECTORS * LANES);
  long stride = a.value_dim;
  float* state = a.state + (a.slot[b] * a.heads + h) * size + c;
  if (a.keep) {
    for (long d = 0; d < a.key_dim; d++) memcpy(scratch + d * VECTORS * LANES, state + d * stride, 4 * count);
    state = scratch, stride = VECTORS * LANES;
  }
  for (long t = 0; t < a.seq; t++) {
    long token = b * a.seq + t, place = token * a.heads + h;
    long keys = (token * a.key_heads + h / (a.heads / a.key_heads)) * a.key_dim;
    delta_columns<VECTORS>(a.key_dim, state, stride, a.query + keys, a.key + keys,
                           a.value + place * a.value_dim + c, expf(a.g[place]), a.beta[place],
                           a.out + place * a.value_dim + c, count);
  }
}

inline void delta_step(Pool& pool, const DeltaStepArguments& a) {
  long all = a.batch * a.heads, size = a.key_dim * a.value_dim;
  long at_once = std::max(1L, 16384 / std::max(1L, size * a.seq));
  pool.run((all + at_once - 1) / at_once, [&](long task) {
    std::vector<float> scratch(a.keep ? a.key_dim * 4 * LANES : 0);
    for (long i = task * at_once; i < std::min(all, (task + 1) * at_once); i++) {
      long b = i / a.heads, h = i % a.heads;
      if (a.slot[b] < 0 || a.slot[b] >= a.slots) {
        for (long t = 0; t < a.seq; t++) {
          float* out = a.out + ((b * a.seq + t) * a.heads + h) * a.value_dim;
          std::fill(out, out + a.value_dim, 0.f);
        }
        continue;
      }
      for (long c = 0; c < a.value_dim;)
        if (a.value_dim - c >= 4 * LANES)
          delta_tokens<4>(a, b, h, c, scratch.data()), c += 4 * LANES;
        else
          delta_tokens<1>(a, b, h, c, scratch.data()), c += LANES;
    }
  });
}
