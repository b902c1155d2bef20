// The gated delta rule over a sequence, in chunks of matrix products: the equations of model/delta_rule.py,
// with the system solved for the corrections alone, since a head's chunks follow one another here anyway.
#pragma once
#include "panels.h"
#include "pool.h"

struct DeltaChunksArguments {
  long batch, seq, slots, heads, key_heads, key_dim, value_dim;
  const float *query, *key;  // [batch, seq, key_heads, key_dim]
  const float* value;        // [batch, seq, heads, value_dim]
  const float *g, *beta;     // [batch, seq, heads]
  float* state;              // [slots, heads, key_dim, value_dim], changed where it lies
  const int* slot;           // [batch]: the slot of each row; a row whose slot there is not changes nothing
  float* out;                // as value
};

constexpr long CHUNK = 64;

// A head's memory; rows are padded with zeros to whole vectors, and keys to FMA_ROWS.
struct DeltaHead {
  long keys, values;  // padded dimensions
  float *state, *key, *key_turned, *query, *corrections, *out, *overlap, *mixing;
  float from_start[CHUNK], to_end[CHUNK], g[CHUNK], beta[CHUNK];

  static size_t floats(long keys, long values) {
    return keys * values + 3 * CHUNK * keys + 2 * CHUNK * values + 2 * CHUNK * CHUNK;
  }
  DeltaHead(long keys, long values, float* memory) : keys(keys), values(values) {
    state = memory;
    key = state + keys * values;
    key_turned = key + CHUNK * keys;  // [keys][CHUNK]
    query = key_turned + CHUNK * keys;
    corrections = query + CHUNK * keys;
    out = corrections + CHUNK * values;
    overlap = out + CHUNK * values;  // [CHUNK][CHUNK]
    mixing = overlap + CHUNK * CHUNK;
  }

  // overlap -> -A, mixing -> its masked, decayed form; the decays from the start and to the end.
  void decay() {
    alignas(64) float between[CHUNK] = {};  // log decay from step j to the current one
    float sum = 0;
    for (long i = 0; i < CHUNK; i++) {
      sum += g[i];
      from_start[i] = expf(sum);
      for (long j = 0; j < i; j++) between[j] += g[i];
      for (long j = i; j < CHUNK; j++) between[j] = j == i ? 0 : -INFINITY;
      for (long j = 0; j < CHUNK; j += LANES) {
        Floats share = exponential(load<Floats>(between + j));
        store(overlap + i * CHUNK + j, load<Floats>(overlap + i * CHUNK + j) * share * -beta[i]);
        store(mixing + i * CHUNK + j, load<Floats>(mixing + i * CHUNK + j) * share);
        if (i == CHUNK - 1) store(to_end + j, share);
      }
      between[i] = 0;
    }
  }

  // corrections = (I + A)^-1 corrections, by forward substitution over blocks of rows.
  void solve() {
    for (long i = 0; i < CHUNK; i += FMA_ROWS) {
      float* block = corrections + i * values;
      if (i)
        fma_rows(overlap + i * CHUNK, CHUNK, 1, corrections, LANES, values, i, true, block, values, FMA_ROWS,
                 values / LANES);
      for (long r = 1; r < FMA_ROWS; r++)
        for (long v = 0; v < values; v += LANES) {
          Floats sum = load<Floats>(block + r * values + v);
          for (long l = 0; l < r; l++)
            sum += overlap[(i + r) * CHUNK + i + l] * load<Floats>(block + l * values + v);
          store(block + r * values + v, sum);
        }
    }
  }

  void chunk() {
    long wide = values / LANES;
    for (long d = 0; d < keys; d++)
      for (long i = 0; i < CHUNK; i++) key_turned[d * CHUNK + i] = key[i * keys + d];
    fma_rows(key, keys, 1, key_turned, LANES, CHUNK, keys, false, overlap, CHUNK, CHUNK, CHUNK / LANES);
    fma_rows(query, keys, 1, key_turned, LANES, CHUNK, keys, false, mixing, CHUNK, CHUNK, CHUNK / LANES);
    decay();
    // what the state recalls, subtracted from the values
    fma_rows(key, keys, 1, state, LANES, values, keys, false, out, values, CHUNK, wide);
    for (long i = 0; i < CHUNK; i++)
      for (long v = 0; v < values; v += LANES) {
        Floats value = load<Floats>(corrections + i * values + v);
        store(corrections + i * values + v,
              (value - load<Floats>(out + i * values + v) * from_start[i]) * beta[i]);
      }
    solve();
    fma_rows(query, keys, 1, state, LANES, values, keys, false, out, values, CHUNK, wide);
    scale(out, from_start);
    fma_rows(mixing, CHUNK, 1, corrections, LANES, values, CHUNK, true, out, values, CHUNK, wide);
    scale(corrections, to_end);
    float whole = from_start[CHUNK - 1];
    for (long i = 0; i < keys * values; i += LANES) store(state + i, load<Floats>(state + i) * whole);
    fma_rows(key, 1, keys, corrections, LANES, values, CHUNK, true, state, values, keys, wide);
  }

  void scale(float* rows, const float* by) {
    for (long i = 0; i < CHUNK; i++)
      for (long v = 0; v < values; v += LANES)
        store(rows + i * values + v, load<Floats>(rows + i * values + v) * by[i]);
  }
};

inline void copy_rows(const float* from, long stride, long rows, long count, float* to, long to_stride,
                      long to_rows) {
  for (long i = 0; i < to_rows; i++) {
    float* row = to + i * to_stride;
    long some = i < rows ? count : 0;
    if (some) memcpy(row, from + i * stride, 4 * some);
    std::fill(row + some, row + to_stride, 0.f);
  }
}

inline void delta_chunks(Pool& pool, const DeltaChunksArguments& a) {
  pool.run(a.batch * a.heads, [&](long task) {
    long b = task / a.heads, h = task % a.heads, key_head = h / (a.heads / a.key_heads);
    long slot = a.slot[b], key_stride = a.key_heads * a.key_dim, value_stride = a.heads * a.value_dim;
    if (slot < 0 || slot >= a.slots) {
      for (long s = 0; s < a.seq; s++) {
        float* out = a.out + (b * a.seq + s) * value_stride + h * a.value_dim;
        std::fill(out, out + a.value_dim, 0.f);
      }
      return;
    }
    long keys = round_up(a.key_dim, FMA_ROWS), values = round_up(a.value_dim, LANES);
    Workspace memory(4 * DeltaHead::floats(keys, values));
    DeltaHead head(keys, values, memory.as<float>());
    float* state = a.state + (slot * a.heads + h) * a.key_dim * a.value_dim;
    copy_rows(state, a.value_dim, a.key_dim, a.value_dim, head.state, values, keys);
    for (long first = 0; first < a.seq; first += CHUNK) {
      long count = std::min(CHUNK, a.seq - first), row = b * a.seq + first;
      long place = row * key_stride + key_head * a.key_dim, own = row * value_stride + h * a.value_dim;
      copy_rows(a.key + place, key_stride, count, a.key_dim, head.key, keys, CHUNK);
      copy_rows(a.query + place, key_stride, count, a.key_dim, head.query, keys, CHUNK);
      copy_rows(a.value + own, value_stride, count, a.value_dim, head.corrections, values, CHUNK);
      for (long i = 0; i < CHUNK; i++) {
        head.g[i] = i < count ? a.g[(row + i) * a.heads + h] : 0;
        head.beta[i] = i < count ? a.beta[(row + i) * a.heads + h] : 0;
      }
      head.chunk();
      for (long i = 0; i < count; i++)
        memcpy(a.out + own + i * value_stride, head.out + i * values, 4 * a.value_dim);
    }
    for (long d = 0; d < a.key_dim; d++)
      memcpy(state + d * a.value_dim, head.state + d * values, 4 * a.value_dim);
  });
}
