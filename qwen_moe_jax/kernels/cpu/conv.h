// What the delta rule reads of a token: a depthwise causal convolution along time, SiLU, and queries and keys
// of unit length (Yang, Kautz & Hatamizadeh, arXiv:2412.06464).
#pragma once
#include <vector>

#include "matrix.h"
#include "pool.h"

struct ConvArguments {
  long batch, seq, key_heads, heads, key_dim, value_dim, taps, slots;
  Type type;            // of x and of what is carried
  const char* x;        // [batch, seq, channels]: queries, keys and values of all heads
  const float* weight;  // [taps, channels], the last one for the current token
  char* carried;      // [slots, taps - 1, channels]: the inputs before x, oldest first; changed where it lies
  const int* slot;    // [batch]: the slot of each row; a row whose slot there is not reads and writes none
  const int* counts;  // [batch]: tokens in front of the pads
  float *query, *key;  // [batch, seq, key_heads, key_dim]
  float* value;        // [batch, seq, heads, value_dim]

  long channels() const { return 2 * key_heads * key_dim + heads * value_dim; }
  long width() const { return channels() * size_of(type); }
  bool held(long b) const { return slot[b] >= 0 && slot[b] < slots; }
  // the i-th input of a row, from the oldest carried one on; nullptr for one that is zero
  const char* input(long b, long i) const {
    long before = taps - 1;
    if (i >= before) return x + (b * seq + i - before) * width();
    return held(b) ? carried + (slot[b] * before + i) * width() : nullptr;
  }
};

constexpr long CONV_TOKENS = 32;  // of a task

// Channels place .. place + count of some tokens, after SiLU, to rows of `out` that are `stride` apart; their
// squares are added to `squares`. inputs[t + tap] is what a tap reads for token t.
template <Type TYPE, bool WHOLE>
inline void conv_channels(const ConvArguments& a, const char* const* inputs, long tokens, long place,
                          long count, float* out, long stride, Floats* squares) {
  auto padded = [&](const char* from, Type type) -> Floats {
    alignas(64) char part[4 * LANES] = {};
    if (!WHOLE) from = (const char*)memcpy(part, from, count * size_of(type));
    if (type == Type::F32) return load<Floats>(from);
    return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
  };
  for (long t = 0; t < tokens; t++) {
    Floats sum = {};
    for (long tap = 0; tap < a.taps; tap++) {
      if (!inputs[t + tap]) continue;
      const float* weight = a.weight + tap * a.channels() + place;
      sum += padded(inputs[t + tap] + place * size_of(TYPE), TYPE) * padded((const char*)weight, Type::F32);
    }
    Floats y = rounded(silu(rounded(sum, TYPE)), TYPE);
    squares[t] += y * y;
    memcpy(out + t * stride, &y, WHOLE ? sizeof y : 4 * count);
  }
}

// Tokens first .. first + tokens of the head whose channels begin at `channel`, to rows of `out` that are
// `stride` apart. With `length` > 0 they get that length; from token `end` on there are zeros.
inline void conv_head(const ConvArguments& a, long b, long first, long tokens, long channel, long dim,
                      float length, long end, float* out, long stride) {
  std::vector<const char*> inputs;
  for (long i = 0; i < tokens + a.taps - 1; i++) inputs.push_back(a.input(b, first + i));
  Floats squares[CONV_TOKENS] = {};
  for (long c = 0; c < dim; c += LANES) {
    long count = std::min(LANES, dim - c);
    auto channels = a.type == Type::F32
                        ? count == LANES ? conv_channels<Type::F32, true> : conv_channels<Type::F32, false>
                    : count == LANES ? conv_channels<Type::BF16, true>
                                     : conv_channels<Type::BF16, false>;
    channels(a, inputs.data(), tokens, channel + c, count, out + c, stride, squares);
  }
  for (long t = 0; t < tokens; t++) {
    float scale = length / sqrtf(sum(squares[t]) + 1e-6f), *row = out + t * stride;
    if (first + t >= end)
      std::fill(row, row + dim, 0.f);
    else if (length > 0)
      for (long c = 0; c < dim; c++) row[c] *= scale;
  }
}

inline void conv_heads(Pool& pool, const ConvArguments& a) {
  long blocks = (a.seq + CONV_TOKENS - 1) / CONV_TOKENS, parts = 2 * a.key_heads + a.heads;
  long keys = a.key_heads * a.key_dim, values = a.heads * a.value_dim;
  auto work = [&](long task) {
    long h = task % parts, block = task / parts % blocks, b = task / parts / blocks;
    long first = block * CONV_TOKENS, tokens = std::min(CONV_TOKENS, a.seq - first), row = b * a.seq + first;
    long end = a.counts[b];
    if (h < a.key_heads)  // a pad's query is never looked at
      conv_head(a, b, first, tokens, h * a.key_dim, a.key_dim, 1 / sqrtf((float)a.key_dim), a.seq,
                a.query + row * keys + h * a.key_dim, keys);
    else if ((h -= a.key_heads) < a.key_heads)
      conv_head(a, b, first, tokens, keys + h * a.key_dim, a.key_dim, 1, end,
                a.key + row * keys + h * a.key_dim, keys);
    else if ((h -= a.key_heads) < a.heads)
      conv_head(a, b, first, tokens, 2 * keys + h * a.value_dim, a.value_dim, 0, end,
                a.value + row * values + h * a.value_dim, values);
  };
  pool.run(a.batch * blocks * parts, work, a.batch * a.seq * a.width() < 32768);
  // oldest first: an input moves to a place that has been read
  for (long b = 0; b < a.batch; b++)
    for (long i = 0; a.held(b) && a.counts[b] && i < a.taps - 1; i++)
      memcpy(a.carried + (a.slot[b] * (a.taps - 1) + i) * a.width(), a.input(b, a.counts[b] + i), a.width());
}
