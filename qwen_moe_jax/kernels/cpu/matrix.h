// A matrix as it lies in memory: float32, bfloat16, or codes of few bits with a scale for each block of them.
#pragma once
#include <algorithm>

#include "simd.h"

// Of codes, as formats/codes.py says: F8 is float8_e4m3fn; of I4 and E2M1 two share a byte, the element of
// even index in the lower half.
enum class Type { F32, BF16, F8, I8, I4, E2M1 };
enum class ScaleType { F32, BF16, F16, E8M0 };

inline long round_up(long n, long to) { return (n + to - 1) / to * to; }
inline long bits_of(Type type) {
  return type == Type::F32 ? 32 : type == Type::BF16 ? 16 : type == Type::F8 || type == Type::I8 ? 8 : 4;
}
// Bytes of an element that has whole ones.
inline long size_of(Type type) { return bits_of(type) / 8; }
inline bool is_codes(Type type) { return type != Type::F32 && type != Type::BF16; }
inline Floats rounded(Floats x, Type type) { return type == Type::F32 ? x : (Floats)round_bf16(x); }

// An element of codes is (code - zero) * scale.
struct Matrix {
  const void* data;
  Type type;
  long rows, columns, stride;  // bytes from one row to the next
  // of codes, for each block: a scale, and of some integers a zero point
  const void* scales = nullptr;
  ScaleType scale_type = ScaleType::F32;
  const uint8_t* zeros = nullptr;
  long block_rows = 1, block_columns = 1;
  long scales_down = 1;  // rows of scales, and of zero points

  const char* row(long r) const { return (const char*)data + r * stride; }
  long row_bytes() const { return columns * bits_of(type) / 8; }
  long scales_across() const { return (columns + block_columns - 1) / block_columns; }
};

// The zero point where none is stored; E2M1 has it too, since its codes are read as twice their numbers and
// 12 more.
inline long zero_of(Type type) {
  return type == Type::I8 ? 128 : type == Type::I4 ? 8 : type == Type::E2M1 ? 12 : 0;
}

// --- Scales

inline long scale_size(ScaleType type) {
  return type == ScaleType::F32 ? 4 : type == ScaleType::E8M0 ? 1 : 2;
}

inline float from_f16(uint16_t bits) {
  uint32_t exponent = bits >> 10 & 31, mantissa = bits & 1023u;
  // no subnormal float32 on the way: XLA's threads take those for zero
  if (exponent == 0) return (bits & 0x8000 ? -0x1p-24f : 0x1p-24f) * (float)mantissa;
  uint32_t wide = (bits & 0x8000u) << 16 | (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13;
  float x;
  memcpy(&x, &wide, 4);
  return x;
}

// The code 0, 2^-127, is subnormal in float32.
inline float from_e8m0(uint8_t exponent) {
  uint32_t wide = exponent ? (uint32_t)exponent << 23 : 1u << 22;
  float x;
  memcpy(&x, &wide, 4);
  return x;
}

inline float scale_at(const Matrix& w, long i) {
  if (w.scale_type == ScaleType::F32) return ((const float*)w.scales)[i];
  if (w.scale_type == ScaleType::BF16) return from_bf16(((const uint16_t*)w.scales)[i]);
  if (w.scale_type == ScaleType::F16) return from_f16(((const uint16_t*)w.scales)[i]);
  return from_e8m0(((const uint8_t*)w.scales)[i]);
}

// `count` scales, from number `first` on.
inline void widen_scales(const Matrix& w, long first, long count, float* out) {
  long i = 0;
#if defined(__F16C__)
  if (w.scale_type == ScaleType::F16)
    for (; i + 8 <= count; i += 8)
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(load<__m128i>((const uint16_t*)w.scales + first + i)));
#endif
  for (; i < count; i++) out[i] = scale_at(w, first + i);
}

// --- Codes in the order of their elements

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
  return float8_of_bytes(widen_bytes(from));
#endif
}

// A code of e2m1, 0 .. 15, as twice its number, -12 .. 12, and 12 more.
inline int e2m1_byte(int code) {
  int magnitude = code & 7;
  int twice = std::max(magnitude, std::max(2 * magnitude - 4, 4 * magnitude - 16));
  return code & 8 ? 12 - twice : 12 + twice;
}

#if defined(__AVX2__)
// The same of all codes.
inline __m128i e2m1_table() {
  return _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
}
#endif

// `count` codes of four bits, a byte each; of E2M1 as of e2m1_byte.
inline void unpack_nibbles(Type type, const uint8_t* from, long count, uint8_t* out) {
  long i = 0;
#if defined(__AVX2__)
  for (; i + 32 <= count; i += 32) {
    __m128i codes = load<__m128i>(from + i / 2), mask = _mm_set1_epi8(15);
    __m128i low = _mm_and_si128(codes, mask), high = _mm_and_si128(_mm_srli_epi16(codes, 4), mask);
    if (type == Type::E2M1)
      low = _mm_shuffle_epi8(e2m1_table(), low), high = _mm_shuffle_epi8(e2m1_table(), high);
    store(out + i, _mm_unpacklo_epi8(low, high));
    store(out + i + 16, _mm_unpackhi_epi8(low, high));
  }
#endif
  for (; i < count; i++) {
    int code = i % 2 ? from[i / 2] >> 4 : from[i / 2] & 15;
    out[i] = (uint8_t)(type == Type::E2M1 ? e2m1_byte(code) : code);
  }
}

// `count` codes of one block, a byte each, less `zero` and times `scale`.
inline void multiply_out(Type type, const uint8_t* from, long count, float scale, long zero, float* out) {
  auto number = [&](const uint8_t* bytes) {
    if (type == Type::F8) return from_float8(bytes) * scale;
    return __builtin_convertvector((Ints)widen_bytes(bytes) - (int)zero, Floats) * scale;
  };
  long i = 0;
  for (; i + LANES <= count; i += LANES) store(out + i, number(from + i));
  if (i < count) {
    uint8_t part[LANES] = {};
    float wide[LANES];
    memcpy(part, from + i, count - i);
    store(wide, number(part));
    memcpy(out + i, wide, 4 * (count - i));
  }
}

// Elements begin .. begin + count - 1 of a row of codes, multiplied out; `begin` is even.
inline void widen_codes(const Matrix& w, long row, long begin, long count, float* out) {
  constexpr long CHUNK = 256;
  long blocks = row / w.block_rows * w.scales_across(), some;
  float unit = w.type == Type::F8 ? 256 : w.type == Type::E2M1 ? 0.5f : 1;  // what is read as one
  for (long i = 0; i < count; i += some) {
    some = std::min(CHUNK, count - i);
    const uint8_t* from = (const uint8_t*)w.row(row) + (begin + i) * bits_of(w.type) / 8;
    uint8_t bytes[CHUNK];
    if (bits_of(w.type) == 4) {
      unpack_nibbles(w.type, from, some, bytes);
      from = bytes;
    }
    for (long j = 0; j < some;) {
      long block = (begin + i + j) / w.block_columns;
      long end = std::min(some, (block + 1) * w.block_columns - begin - i);
      float scale = scale_at(w, blocks + block) * unit;
      long zero = w.zeros ? w.zeros[blocks + block] : zero_of(w.type);
      multiply_out(w.type, from + j, end - j, scale, zero, out + i + j);
      j = end;
    }
  }
}

// Elements begin .. begin + count - 1 of a row, in float32; zeros up to `padded`. Of four bits, `begin` is
// even.
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
    widen_codes(w, row, begin, count, out);
    i = count;
  }
  for (; i < padded; i++) out[i] = 0;
}
