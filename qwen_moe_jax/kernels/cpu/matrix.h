// A matrix as it lies in memory: float32, bfloat16, or float8 with a scale for each block.
#pragma once
#include <algorithm>

#include "simd.h"

enum class Type { F32, BF16, F8 };

inline long round_up(long n, long to) { return (n + to - 1) / to * to; }
inline long size_of(Type type) { return type == Type::F32 ? 4 : type == Type::BF16 ? 2 : 1; }
inline Floats rounded(Floats x, Type type) { return type == Type::F32 ? x : (Floats)round_bf16(x); }

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
    const uint8_t* from = (const uint8_t*)w.row(row) + begin;
    const float* scales = w.scales + row / w.block_rows * w.scales_across();
    auto values = [&](const uint8_t* bytes, float scale) {
      Floats value = from_float8(widen_bytes(bytes)) * scale;
      return w.round ? (Floats)round_number_bf16(value) : value;
    };
    while (i < count) {
      long block = (begin + i) / w.block_columns,
           end = std::min(count, (block + 1) * w.block_columns - begin);
      for (; i + LANES <= end; i += LANES) store(out + i, values(from + i, scales[block]));
      if (i < end) {
        uint8_t part[LANES] = {};
        float wide[LANES];
        memcpy(part, from + i, end - i);
        store(wide, values(part, scales[block]));
        memcpy(out + i, wide, 4 * (end - i));
        i = end;
      }
    }
  }
  for (; i < padded; i++) out[i] = 0;
}
