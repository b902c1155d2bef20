// Copying what was read from a file, and looking for NaN and infinities on the way.
#pragma once
#include "matrix.h"

// Bytes of float32, bfloat16 or finite float8 numbers to `to`; whether all of them are finite, that is
// whether no exponent (in float8_e4m3fn, which has no infinity, no exponent and mantissa) is all ones.
template <class V>
inline bool copy_finite_as(char* to, const char* from, long bytes, uint32_t ones) {
  V mask = V{} + (decltype(V{}[0]))ones;
  V found = {};
  auto look = [&](V bits) { found |= (V)((bits & mask) == mask); };
  long i = 0;
  for (; i + (long)sizeof(V) <= bytes; i += sizeof(V)) {
    V bits = load<V>(from + i);
    store(to + i, bits);
    look(bits);
  }
  if (i < bytes) {
    V bits = {};
    memcpy(&bits, from + i, bytes - i);
    memcpy(to + i, &bits, bytes - i);
    look(bits);
  }
  for (long lane = 0; lane < (long)(sizeof(V) / sizeof(found[0])); lane++)
    if (found[lane]) return false;
  return true;
}

inline bool copy_finite(char* to, const char* from, long bytes, Type type) {
  typedef uint16_t Shorts __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint8_t Bytes __attribute__((vector_size(VECTOR_BYTES)));
  if (type == Type::F32) return copy_finite_as<Words>(to, from, bytes, 0x7f800000u);
  if (type == Type::BF16) return copy_finite_as<Shorts>(to, from, bytes, 0x7f80u);
  return copy_finite_as<Bytes>(to, from, bytes, 0x7fu);
}
