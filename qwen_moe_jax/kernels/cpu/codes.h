// How registers full of codes become numbers, for products that read codes as they lie in memory. No code is
// moved to where its number stands: a word's bytes or half bytes are masked and converted where they are, and
// become numbers that are too large by a power of two, by which the tokens beside them are smaller. (Of
// tokens below 2^-102 that leaves a subnormal number, or nothing.)
#pragma once
#include "matrix.h"

// Of codes that fill a vector, in PARTS vectors of numbers: part<N> of what `read` makes of them, in units of
// UNIT, times 2^exponent(N), and BIAS more. `place` says where among these LANES * PARTS an element is, and
// RUN how many elements side by side share a lane (none where lanes have several such runs).
template <Type T>
struct Codes;

inline Floats converted(Words x) { return __builtin_convertvector((Ints)x, Floats); }

// Integers of BITS bits, side by side in a word; the uppermost one is shifted, since its bits may be the
// sign.
template <int BITS>
struct IntegerCodes {
  static constexpr long PARTS = 32 / BITS, RUN = PARTS;
  static constexpr float UNIT = 1, BIAS = 1 << (BITS - 1);
  static Words read(Words codes) { return codes; }
  template <int N>
  static Floats part(Words codes) {
    constexpr uint32_t MASK = (1u << BITS) - 1;
    return converted(N == PARTS - 1 ? codes >> (32 - BITS) : codes & (MASK << BITS * N));
  }
  static constexpr int exponent(long n) { return n == PARTS - 1 ? 0 : (int)(BITS * n); }
  static constexpr long place(long k) { return k % PARTS * LANES + k / PARTS; }
};

template <>
struct Codes<Type::I8> : IntegerCodes<8> {};

template <>
struct Codes<Type::I4> : IntegerCodes<4> {};

template <>
struct Codes<Type::E2M1> {
  static constexpr long PARTS = 8, RUN = 8;
  static constexpr float UNIT = 0.5f, BIAS = 12;
  // a code a byte, as of e2m1_byte
  struct Bytes {
    Words half[2];  // elements of even index, and of odd index
  };
  static Bytes read(Words codes) {
    Words low = codes & 0x0f0f0f0fu, high = (codes >> 4) & 0x0f0f0f0fu;
#if defined(__AVX2__)
#if defined(__AVX512F__)
    __m512i all = _mm512_broadcast_i32x4(e2m1_table());
    return {{(Words)_mm512_shuffle_epi8(all, (__m512i)low), (Words)_mm512_shuffle_epi8(all, (__m512i)high) }};
#else
    __m256i all = _mm256_broadcastsi128_si256(e2m1_table());
    return {{(Words)_mm256_shuffle_epi8(all, (__m256i)low), (Words)_mm256_shuffle_epi8(all, (__m256i)high) }};
#endif
#else
    return {{ looked_up(low), looked_up(high) }};
#endif
  }
#if !defined(__AVX2__)
  static Words looked_up(Words codes) {
    typedef int8_t Signed __attribute__((vector_size(VECTOR_BYTES)));
    Signed code = (Signed)codes, magnitude = code & 7;
    Signed middle = 2 * magnitude - 4, large = 4 * magnitude - 16;
    Signed twice = magnitude > middle ? magnitude : middle;
    twice = twice > large ? twice : large;
    return (Words)(code > 7 ? 12 - twice : 12 + twice);
  }
#endif
  template <int N>
  static Floats part(const Bytes& bytes) {
    return converted(bytes.half[N % 2] & (0xffu << N / 2 * 8));
  }
  static constexpr int exponent(long n) { return (int)(n / 2 * 8); }
  static constexpr long place(long k) { return k % PARTS * LANES + k / PARTS; }
};

#if defined(__AVX512F__)
// Pairs of bytes as pairs of float16 (see from_float8), the first of each pair in one vector, the second in
// another; so elements lie as bfloat16's do.
template <>
struct Codes<Type::F8> {
  static constexpr long PARTS = 4, RUN = 0;
  static constexpr float UNIT = 256, BIAS = 0;
  struct Halves {
    __m512i of_pair[2];
  };
  static Halves read(Words codes) {
    __m512i pairs = (__m512i)codes, keep = _mm512_set1_epi16((short)0xbf80);
    return {{_mm512_and_si512(_mm512_srai_epi16(_mm512_slli_epi16(pairs, 8), 1), keep),
             _mm512_and_si512(_mm512_srai_epi16(pairs, 1), keep)}};
  }
  template <int N>
  static Floats part(const Halves& halves) {
    __m512i all = halves.of_pair[N % 2];
    return (Floats)_mm512_cvtph_ps(N < 2 ? _mm512_castsi512_si256(all) : _mm512_extracti64x4_epi64(all, 1));
  }
  static constexpr int exponent(long) { return 0; }
  static constexpr long place(long k) {
    long within = k % (2 * LANES);
    return k - within + within / 2 + (within % 2 ? LANES : 0);
  }
};
#elif defined(__x86_64__)
// Sign, exponent and mantissa where a float32 has them: 2^-120 of the number, subnormal ones included, as
// long as `Subnormals` lives. Tokens are 2^60 times as large, so that their products are no subnormal
// numbers.
template <>
struct Codes<Type::F8> {
  static constexpr long PARTS = 4, RUN = 4;
  static constexpr float UNIT = 0x1p60f, BIAS = 0;
  struct Pairs {
    Words of_pair[2];
  };
  static Pairs read(Words codes) {
    typedef uint16_t Bits __attribute__((vector_size(VECTOR_BYTES)));
    typedef int16_t Signed __attribute__((vector_size(VECTOR_BYTES)));
    Bits pairs = (Bits)codes;
    return {{(Words)((Signed)(pairs << 8) >> 4), (Words)((Signed)pairs >> 4)}};
  }
  template <int N>
  static Floats part(const Pairs& pairs) {
    Words codes = pairs.of_pair[N % 2];
    return (Floats)((N < 2 ? codes << 16 : codes) & 0x87f00000u);
  }
  static constexpr int exponent(long) { return -60; }
  static constexpr long place(long k) { return k % PARTS * LANES + k / PARTS; }
};
#else
template <>
struct Codes<Type::F8> {
  static constexpr long PARTS = 4, RUN = 4;
  static constexpr float UNIT = 256, BIAS = 0;
  static Words read(Words codes) { return codes; }
  template <int N>
  static Floats part(Words codes) {
    return float8_of_bytes(codes >> 8 * N & 0xffu);
  }
  static constexpr int exponent(long) { return 0; }
  static constexpr long place(long k) { return k % PARTS * LANES + k / PARTS; }
};
#endif

// While it lives, subnormal numbers that are read count as themselves; XLA's threads take them for zero.
struct Subnormals {
#if defined(__x86_64__)
  unsigned before = __builtin_ia32_stmxcsr();
  Subnormals() { __builtin_ia32_ldmxcsr(before & ~0x40u); }
  ~Subnormals() { __builtin_ia32_ldmxcsr(before); }
#else
  Subnormals() {}
#endif
};

// What of `Codes` is needed to pack tokens, by a type that is known at run time.
struct CodesInfo {
  long step = 0, run = 0;  // elements that a vector of codes has, and RUN
  float bias = 0;
  // of each element of a step: where it is, and 2^-exponent there
  uint16_t place[8 * LANES] = {};
  float factor[8 * LANES] = {};

  template <Type T>
  static CodesInfo of() {
    CodesInfo info;
    info.step = Codes<T>::PARTS * LANES;
    info.run = Codes<T>::RUN;
    info.bias = Codes<T>::BIAS;
    for (long k = 0; k < info.step; k++) {
      info.place[k] = (uint16_t)Codes<T>::place(k);
      info.factor[k] = std::ldexp(1.f, -Codes<T>::exponent(Codes<T>::place(k) / LANES));
    }
    return info;
  }
};

inline const CodesInfo& info_of(Type type) {
  static const CodesInfo f8 = CodesInfo::of<Type::F8>(), i8 = CodesInfo::of<Type::I8>(),
                         i4 = CodesInfo::of<Type::I4>(), e2m1 = CodesInfo::of<Type::E2M1>();
  return type == Type::F8 ? f8 : type == Type::I8 ? i8 : type == Type::I4 ? i4 : e2m1;
}

// How blocks of columns fit the vectors of codes.
struct Units {
  long unit;    // elements, whole vectors of codes, whose sums are scaled at once; 0: none fit
  long across;  // scales of a unit, each for as many lanes
  long repeat;  // how often a block's scale is one of these
};

inline Units units_of(const Matrix& w) {
  constexpr long MOST = 512;  // a longer unit would not stay in the first cache beside several tokens
  const CodesInfo& info = info_of(w.type);
  long block = w.block_columns;
  if (block >= w.columns) {
    long unit = std::min(MOST, round_up(w.columns, info.step));
    return {unit, 1, (w.columns + unit - 1) / unit};
  }
  if (block % MOST == 0) return {MOST, 1, block / MOST};
  if (block % info.step == 0) return {block, 1, 1};
  long a = block, b = info.step;  // their greatest common divisor
  while (b) std::swap(a, b), b %= a;
  if (info.run == 0 || a % info.run) return {0, 0, 0};
  return {info.step, info.step / a, block / a};
}
