// Vectors as the compiler's own extension writes them, so that one source is AVX-512, AVX2, SSE and NEON.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

constexpr long LANES = VECTOR_BYTES / 4;
typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));

template <class V>
inline V load(const void* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
inline void store(void* to, V v) {
  memcpy(to, &v, sizeof v);
}

inline Floats splat(float x) { return x - Floats{}; }

inline float sum(Floats v) {
  float parts[LANES], total[4] = {};
  store(parts, v);
  for (long i = 0; i < LANES; i++) total[i % 4] += parts[i];
  return (total[0] + total[1]) + (total[2] + total[3]);
}

// A bfloat16 is the upper half of a float32. Of a word with two of them, the first is the lower half
// (little-endian), so both widen without a shuffle; whoever reads x beside them keeps it in that order.
inline Floats first_of_pair(Words pairs) { return (Floats)(pairs << 16); }
inline Floats second_of_pair(Words pairs) { return (Floats)(pairs & 0xffff0000u); }

inline float from_bf16(uint16_t bits) {
  uint32_t wide = (uint32_t)bits << 16;
  float x;
  memcpy(&x, &wide, 4);
  return x;
}

// LANES bytes, each in a word. (GCC 12 takes many instructions for the same conversion written plainly.)
inline Words widen_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  typedef uint8_t Bytes __attribute__((vector_size(LANES)));
  return __builtin_convertvector(load<Bytes>(from), Words);
#endif
}

// Finite numbers of float8_e4m3fn, the lowest byte of each word, over 256: exponent and mantissa move to
// where a float32 has them, and the exponent's bias is corrected; subnormals, m * 2^-9, are what is left of
// (1 + m / 8) * 2^-6 without the 1.
inline Floats float8_of_bytes(Words bytes) {
  Words sign = (bytes & 0x80u) << 24, rest = bytes & 0x7fu;
  Floats normal = (Floats)((rest << 20) + (112u << 23));
  Floats small = (Floats)((rest << 20) + (113u << 23)) - (Floats)(Words{} + (113u << 23));
  Words value = (rest < 8u) ? (Words)small : (Words)normal;
  return (Floats)(value | sign);
}

// from[lanes[i]] in lane i; LANES numbers may be read there.
inline Floats pick(const float* from, Ints lanes) {
#if defined(__AVX512F__)
  return (Floats)_mm512_permutexvar_ps((__m512i)lanes, _mm512_loadu_ps(from));
#elif defined(__AVX2__)
  return (Floats)_mm256_permutevar8x32_ps(_mm256_loadu_ps(from), (__m256i)lanes);
#else
  Floats found;
  for (long i = 0; i < LANES; i++) found[i] = from[lanes[i]];
  return found;
#endif
}

// Rounded to the nearest bfloat16, ties to even, in the upper half of each word; x is no NaN.
inline Words round_number_bf16(Floats x) {
  Words bits = (Words)x;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
}

// The same; NaN stays NaN.
inline Words round_bf16(Floats x) {
  return x == x ? round_number_bf16(x) : ((Words)x | 0x00400000u) & 0xffff0000u;
}

inline Halves narrow(Floats x) { return __builtin_convertvector(round_bf16(x) >> 16, Halves); }

inline uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return (uint16_t)((bits | 0x00400000u) >> 16);
  return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// e^x to two units in the last place (Cody & Waite's reduction, a Taylor polynomial of degree 7 on
// |r| <= ln 2 / 2); zero below -87, NaN for NaN.
inline Floats exponential(Floats x) {
  Floats clamped = x > 88.f ? splat(88.f) : x < -87.f ? splat(-87.f) : x;
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  Floats shifted = clamped * 1.44269504088896341f + magic;
  Ints power = (Ints)shifted - 0x4b400000;
  Floats n = shifted - magic;
  Floats r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = 1.f / 5040 * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  Floats result = p * (Floats)((power + 127) << 23);
  return x < -87.f ? Floats{} : result;
}

inline Floats silu(Floats x) { return x / (1.f + exponential(-x)); }

// LANES x LANES words at `from`, rows `stride` apart, transposed into `to`.
inline void transpose(const void* from, long stride, void* to, long to_stride) {
  const uint32_t* source = (const uint32_t*)from;
  uint32_t* target = (uint32_t*)to;
#if defined(__AVX2__) && !defined(__clang__)
  Words rows[LANES];
  for (long i = 0; i < LANES; i++) rows[i] = load<Words>(source + i * stride);
#pragma GCC unroll 4
  for (long d = 1; d < LANES; d *= 2) {
    Words low, high;
    for (long j = 0; j < LANES; j++) {
      low[j] = (j & d) ? LANES + j - d : j;
      high[j] = (j & d) ? LANES + j : j + d;
    }
#pragma GCC unroll 16
    for (long i = 0; i < LANES; i++) {
      if (i & d) continue;
      Words a = rows[i], b = rows[i + d];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + d] = __builtin_shuffle(a, b, high);
    }
  }
  for (long i = 0; i < LANES; i++) store(target + i * to_stride, rows[i]);
#else
  for (long i = 0; i < LANES; i++)
    for (long j = 0; j < LANES; j++) target[j * to_stride + i] = source[i * stride + j];
#endif
}
