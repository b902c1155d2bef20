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

// LANES numbers of float8_e4m3fn, finite, over 256. All but their signs, seven places further up, are the
// bits of a float16 of 1/256 of the value, subnormal ones included.
inline Floats from_float8(const uint8_t* from) {
#if defined(__AVX512F__)
  __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from)), 7);
  return (Floats)_mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16((short)0xbfff)));
#elif defined(__F16C__) && defined(__AVX2__)
  __m128i wide = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)from)), 7);
  return (Floats)_mm256_cvtph_ps(_mm_and_si128(wide, _mm_set1_epi16((short)0xbfff)));
#else
  // Exponent and mantissa move to where a float32 has them, and the exponent's bias is corrected; subnormals,
  // m * 2^-9, are what is left of (1 + m / 8) * 2^-6 without the 1.
  Words bits = widen_bytes(from), sign = (bits & 0x80u) << 24, rest = bits & 0x7fu;
  Floats normal = (Floats)((rest << 20) + (112u << 23));
  Floats small = (Floats)((rest << 20) + (113u << 23)) - (Floats)(Words{} + (113u << 23));
  Words value = (rest < 8u) ? (Words)small : (Words)normal;
  return (Floats)(value | sign);
#endif
}

// The same, times the scale of their block, rounded as the products of its matrix are.
inline Floats float8_times(const uint8_t* from, float scale_256, bool round) {
  Floats value = from_float8(from) * scale_256;
  return round ? (Floats)round_number_bf16(value) : value;
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
    while (i < count) {
      long block = (begin + i) / w.block_columns,
           end = std::min(count, (block + 1) * w.block_columns - begin);
      float scale = 256.f * scales[block];
      for (; i + LANES <= end; i += LANES) store(out + i, float8_times(from + i, scale, w.round));
      if (i < end) {
        uint8_t part[LANES] = {};
        float wide[LANES];
        memcpy(part, from + i, end - i);
        store(wide, float8_times(part, scale, w.round));
        memcpy(out + i, wide, 4 * (end - i));
        i = end;
      }
    }
  }
  for (; i < padded; i++) out[i] = 0;
}
