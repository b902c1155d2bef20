// One step of the gated delta rule (model/delta_rule.py): a head's state is read from memory once.
#pragma once
#include "pool.h"
#include "simd.h"

struct DeltaStepArguments {
  long batch, heads, key_heads, key_dim, value_dim;
  const float* state;             // [batch, heads, key_dim, value_dim]
  const float *query, *key;       // [batch, key_heads, key_dim]
  const float *value, *g, *beta;  // [batch, heads, value_dim]; [batch, heads]
  float *out, *new_state;         // [batch, heads, value_dim]; may be the memory of state
};

// Columns of a head's state, VECTORS * LANES of them or the last few.
template <int VECTORS>
inline void delta_columns(const DeltaStepArguments& a, const float* state, float* new_state, const float* q,
                          const float* k, const float* v, float decay, float beta, float* out, long count) {
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
      write(new_state + d * a.value_dim, i, row);
      total[i] += q[d] * row;
    }
  for (int i = 0; i < VECTORS; i++) write(out, i, total[i]);
}

inline void delta_step(Pool& pool, const DeltaStepArguments& a) {
  long all = a.batch * a.heads, ratio = a.heads / a.key_heads, size = a.key_dim * a.value_dim;
  long at_once = std::max(1L, 16384 / std::max(1L, size));
  pool.run((all + at_once - 1) / at_once, [&](long task) {
    for (long i = task * at_once; i < std::min(all, (task + 1) * at_once); i++) {
      long keys = (i / a.heads * a.key_heads + i % a.heads / ratio) * a.key_dim;
      const float *q = a.query + keys, *k = a.key + keys;
      float decay = expf(a.g[i]), beta = a.beta[i];
      for (long c = 0; c < a.value_dim;) {
        const float *state = a.state + i * size + c, *v = a.value + i * a.value_dim + c;
        float *new_state = a.new_state + i * size + c, *out = a.out + i * a.value_dim + c;
        long left = a.value_dim - c;
        if (left >= 4 * LANES) {
          delta_columns<4>(a, state, new_state, q, k, v, decay, beta, out, left), c += 4 * LANES;
        } else {
          delta_columns<1>(a, state, new_state, q, k, v, decay, beta, out, left), c += LANES;
        }
      }
    }
  });
}
