// DOT's products with codes: sums of a unit of columns are scaled instead of the codes, which is exact, and
// zero points are taken off a unit's sum, as so many times the sum of its tokens, which stands before them.
#pragma once
#include <utility>
#include <vector>

#include "products.h"

#define INLINE __attribute__((always_inline))

// f(0), f(1) .. f(COUNT - 1), each a constant.
template <class F, int... N>
INLINE inline void each_of(std::integer_sequence<int, N...>, F f) {
  (f(std::integral_constant<int, N>()), ...);
}
template <int COUNT, class F>
INLINE inline void each(F f) {
  each_of(std::make_integer_sequence<int, COUNT>(), f);
}

// A panel of a matrix of codes.
struct ScaledPanel {
  const Matrix& w;
  long first, count;
  Units units;
  Ints lanes;     // which of a unit's scales is a lane's
  long room;      // scales of a row in float32: `across` of each unit, and a vector of zeros
  float* scales;  // [PANEL][room]
  float* zeros;   // likewise, zero points over BIAS; null where all are BIAS

  long row(long r) const { return first + std::min(r, count - 1); }  // the last one again behind it
};

// ROWS rows of a panel from `row` on, columns begin .. end (whole units, or up to the last), times COUNT
// tokens, added to total [ROWS][COUNT]; what is `ahead` bytes behind is fetched.
template <Type T, int ROWS, int COUNT>
inline void scaled_rows(const ScaledPanel& p, long row, long begin, long end, long ahead, const float* x,
                        long x_stride, Floats* totals) {
  using Of = Codes<T>;
  constexpr long STEP = Of::PARTS * LANES;
  const long unit = p.units.unit, across = p.units.across, room = p.room;
  const Ints lanes = p.lanes;
  const char* from[ROWS];
  Words last[ROWS] = {};  // the codes of the last step, zeros behind the depth
  Floats total[ROWS][COUNT];
  for (int r = 0; r < ROWS; r++) {
    from[r] = p.w.row(p.row(row + r)) + begin / STEP * VECTOR_BYTES;
    if (long rest = end % STEP)
      memcpy(&last[r], p.w.row(p.row(row + r)) + end / STEP * VECTOR_BYTES, rest * VECTOR_BYTES / STEP);
    for (int m = 0; m < COUNT; m++) total[r][m] = totals[r * COUNT + m];
  }
  const float* scales = p.scales + row * room + begin / unit * across;
  const float* zeros = p.zeros ? p.zeros + row * room + begin / unit * across : nullptr;
  for (long first = begin; first < end; first += unit, scales += across) {
    Floats part[ROWS][COUNT] = {};
    if constexpr (Of::BIAS != 0) {
      for (int m = 0; m < COUNT; m++) {
        Floats sums = load<Floats>(x + m * x_stride);
        for (int r = 0; r < ROWS; r++) part[r][m] = sums;
      }
      if (zeros) {
        for (int r = 0; r < ROWS; r++) {
          Floats points = pick(zeros + r * room, lanes);
          for (int m = 0; m < COUNT; m++) part[r][m] *= points;
        }
        zeros += across;
      }
      x += LANES;
    }
    for (long k = first, stop = std::min(end, first + unit); k < stop; k += STEP, x += STEP) {
      decltype(Of::read(Words{})) codes[ROWS];
      bool whole = k + STEP <= end;
      for (int r = 0; r < ROWS; r++) {
        __builtin_prefetch(from[r] + ahead, 0, 2);
        codes[r] = Of::read(load<Words>(whole ? from[r] : (const char*)&last[r]));
        from[r] += VECTOR_BYTES;
      }
      each<(int)Of::PARTS>([&](auto n) INLINE {
        Floats numbers[ROWS];
        for (int r = 0; r < ROWS; r++) numbers[r] = Of::template part<n()>(codes[r]);
        for (int m = 0; m < COUNT; m++) {
          Floats tokens = load<Floats>(x + m * x_stride + n() * LANES);
          for (int r = 0; r < ROWS; r++) part[r][m] += numbers[r] * tokens;
        }
      });
    }
    for (int r = 0; r < ROWS; r++) {
      Floats scale = pick(scales + r * room, lanes);
      for (int m = 0; m < COUNT; m++) total[r][m] += scale * part[r][m];
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int m = 0; m < COUNT; m++) totals[r * COUNT + m] = total[r][m];
}

// A row of scales, and of zero points, in float32, each as often as `units` repeat it.
inline void read_scales(const ScaledPanel& p, long r) {
  const Matrix& w = p.w;
  long count = w.scales_across(), first = p.row(r) / w.block_rows * count, repeat = p.units.repeat;
  float *scales = p.scales + r * p.room, *zeros = p.zeros + r * p.room;
  widen_scales(w, first, count, scales);
  if (p.zeros) {
    const float inverse = 1.f / (float)zero_of(w.type);  // a power of two
    for (long i = 0; i < count; i++) zeros[i] = (float)w.zeros[first + i] * inverse;
  }
  for (long i = repeat > 1 ? count : 0; i-- > 0;)
    for (long j = repeat; j-- > 0;) {
      scales[i * repeat + j] = scales[i];
      if (p.zeros) zeros[i * repeat + j] = zeros[i];
    }
  // lanes behind the depth, whose tokens are zeros
  std::fill_n(scales + count * repeat, LANES, 0.f);
  if (p.zeros) std::fill_n(zeros + count * repeat, LANES, 0.f);
}

// The panel times COUNT tokens from `token` on. Columns go through in as many as leave the tokens in the
// first cache while all rows pass by.
template <Type T, int COUNT>
inline void scaled_panel(const ScaledPanel& p, const Operand& x, long token, float* c, long ldc) {
  constexpr int ROWS = LANES == 16 ? (COUNT <= 4 ? 4 : 2) : COUNT <= 2 ? 4 : 1;
  static_assert(PANEL % ROWS == 0);
  constexpr long CACHED = 16384 / 4 / COUNT;
  long stride = p.w.stride, ahead = rows_ahead(stride), unit = p.units.unit;
  long columns = std::max(1L, CACHED / unit) * unit;
  Floats total[PANEL * COUNT] = {};
  for (long begin = 0; begin < x.depth; begin += columns) {
    long end = std::min(x.depth, begin + columns);
    const float* from = x.token(token) + begin + (x.packing.unit ? begin / unit * LANES : 0);
    for (long r = 0; r < p.count; r += ROWS) {
      long bytes = p.first + r + ROWS + ahead <= p.w.rows ? ahead * stride : 0;
      scaled_rows<T, ROWS, COUNT>(p, r, begin, end, bytes, from, x.numbers(), total + r * COUNT);
    }
  }
  for (long r = 0; r < p.count; r++)
    for (long m = 0; m < COUNT; m++) c[r * ldc + token + m] = Codes<T>::UNIT * sum(total[r * COUNT + m]);
}

template <Type T>
inline void scaled_tokens(const ScaledPanel& p, const Operand& x, float* c, long ldc) {
  Subnormals count;
  by_tokens(x.tokens, [&](auto group, long t) { scaled_panel<T, group()>(p, x, t, c, ldc); });
}

// Rows of a panel times tokens that are packed for them.
inline void scaled_all(const Matrix& w, long first, long count, const Operand& x, float* c, long ldc) {
  static thread_local std::vector<float> own;
  ScaledPanel p{w, first, count, units_of(w), {}, 0, nullptr, nullptr};
  p.room = w.scales_across() * p.units.repeat + LANES;
  if ((long)own.size() < 2 * PANEL * p.room) own.resize(2 * PANEL * p.room);
  p.scales = own.data();
  if (w.zeros) p.zeros = p.scales + PANEL * p.room;
  for (long i = 0; i < LANES; i++) p.lanes[i] = (int)(i * p.units.across / LANES);
  for (long r = 0; r < round_up(count, 4); r++) read_scales(p, r);
  if (w.type == Type::F8) return scaled_tokens<Type::F8>(p, x, c, ldc);
  if (w.type == Type::I8) return scaled_tokens<Type::I8>(p, x, c, ldc);
  if (w.type == Type::I4) return scaled_tokens<Type::I4>(p, x, c, ldc);
  scaled_tokens<Type::E2M1>(p, x, c, ldc);
}
