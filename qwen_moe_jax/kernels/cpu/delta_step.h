// One step of the gated delta rule (model/delta_rule.py): a head's state is read from memory once.
#pragma once
#include "pool.h"
#include "simd.h"

struct DeltaStepArguments {
  long batch, slots, heads, key_heads, key_dim, value_dim;
  float* state;              // [slots, heads, key_dim, value_dim], changed where it lies
  const int* slot;           // [batch]: the slot of each row; a row whose slot there is not changes nothing
  const float *query, *key;  // [batch, key_heads, key_dim]
  const float *value, *g, *beta;  // [batch, heads, value_dim]; [batch, heads]
  float* out;                     // [batch, heads, value_dim]
};

// Columns of a head's state, VECTORS * LANES of them or the last few.
template <int VECTORS>
inline void delta_columns(const DeltaStepArguments& a, float* state, const float* q, const float* k,
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
  for (long d = 0; d < a.key_dim; d++)
    for (int i = 0; i < VECTORS; i++) recalled[i] += k[d] * read(state + d * a.value_dim, i);
  for (int i = 0; i < VECTORS; i++) correction[i] = (read(v, i) - recalled[i] * decay) * beta;
  for (long d = 0; d < a.key_dim; d++)
    for (int i = 0; i < VECTORS; i++) {
      Floats row = read(state + d * a.value_dim, i) * decay + k[d] * correction[i];
      write(state + d * a.value_dim, i, row);
      total[i] += q[d] * row;
    }
  for (int i = 0; i < VECTORS; i++) write(out, i, total[i]);
}

inline void delta_step(Pool& pool, const DeltaStepArguments& a) {
  long all = a.batch * a.heads, ratio = a.heads / a.key_heads, size = a.key_dim * a.value_dim;
  long at_once = std::max(1L, 16384 / std::max(1L, size));
  pool.run((all + at_once - 1) / at_once, [&](long task) {
    for (long i = task * at_once; i < std::min(all, (task + 1) * at_once); i++) {
      long slot = a.slot[i / a.heads];
      if (slot < 0 || slot >= a.slots) {
        std::fill(a.out + i * a.value_dim, a.out + (i + 1) * a.value_dim, 0.f);
        continue;
      }
      long keys = (i / a.heads * a.key_heads + i % a.heads / ratio) * a.key_dim;
      const float *q = a.query + keys, *k = a.key + keys;
      float decay = expf(a.g[i]), beta = a.beta[i];
      for (long c = 0; c < a.value_dim;) {
        const float* v = a.value + i * a.value_dim + c;
        float *state = a.state + (slot * a.heads + i % a.heads) * size + c,
              *out = a.out + i * a.value_dim + c;
        long left = a.value_dim - c;
        if (left >= 4 * LANES) {
          delta_columns<4>(a, state, q, k, v, decay, beta, out, left), c += 4 * LANES;
        } else {
          delta_columns<1>(a, state, q, k, v, decay, beta, out, left), c += LANES;
        }
      }
    }
  });
}
