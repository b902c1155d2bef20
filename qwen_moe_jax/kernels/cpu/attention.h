// Causal softmax attention over keys and values in pages, with the new ones written in place (online softmax:
// Milakov & Gimelshein, arXiv:1805.02867; pages: Kwon et al., arXiv:2309.06180). Scores stand as
// [key][query], so that a softmax runs along vectors of queries, and the second product takes them as an
// MLP's does (panels.h).
#pragma once
#include <deque>

#include "linear.h"

struct Attention {
  long batch, seq, heads, kv_heads, dim, pages, page, width;
  Type type, cache_type;
  const char* query;       // [batch, seq, heads, dim]
  const int* positions;    // [batch, seq]: a query sees its row's positions 0 .. position
  const int* tables;       // [batch, width]: the pages of each row
  char *k, *v;             // [pages, page, kv_heads, dim]
  char* out;               // as query
  std::vector<long> held;  // [batch]: positions that a row has pages for

  long group() const { return heads / kv_heads; }
  void count_pages() {
    held.assign(batch, 0);
    for (long b = 0; b < batch; b++)
      while (held[b] < width * page && page_of(b, held[b]) >= 0) held[b] += page;
  }
  // the page of a position, -1 for none
  long page_of(long b, long position) const {
    if (position < 0 || position >= width * page) return -1;
    long found = tables[b * width + position / page];
    return found >= 0 && found < pages ? found : -1;
  }
  long last(long b, long s) const { return std::min((long)positions[b * seq + s], held[b] - 1); }
  long longest() const {  // keys that some query sees
    long most = 0;
    for (long b = 0; b < batch; b++)
      for (long s = 0; s < seq; s++) most = std::max(most, last(b, s) + 1);
    return most;
  }
  // Keys from a position on to the end of its page.
  Matrix keys(long b, long head, long position) const {
    long stride = kv_heads * dim * size_of(cache_type), inside = position % page;
    const char* data = k + (page_of(b, position) * page + inside) * stride + head * dim * size_of(cache_type);
    return {data, cache_type, page - inside, dim, stride};
  }
  Matrix values(long b, long head, long position) const {
    Matrix m = keys(b, head, position);
    m.data = v + ((const char*)m.data - k);
    return m;
  }
  // What all keys have in common.
  Matrix any_keys() const { return {k, cache_type, page, dim, kv_heads * dim * size_of(cache_type)}; }
};

// New keys and values [batch, seq, kv_heads, dim] of a.type to their places in their rows; one that its row
// has no page for is dropped.
inline void append_keys(const Attention& a, const char* key, const char* value, const int* places) {
  long width = a.kv_heads * a.dim, from_size = size_of(a.type), to_size = size_of(a.cache_type);
  for (long b = 0; b < a.batch; b++)
    for (long s = 0; s < a.seq; s++) {
      long place = places[b * a.seq + s], page = a.page_of(b, place);
      if (page < 0) continue;
      long slot = page * a.page + place % a.page;
      for (int both = 0; both < 2; both++) {
        const char* from = (both ? value : key) + (b * a.seq + s) * width * from_size;
        char* to = (both ? a.v : a.k) + slot * width * to_size;
        if (a.type == a.cache_type)
          memcpy(to, from, width * to_size);
        else if (a.type == Type::F32)
          write_row((const float*)from, width, Type::BF16, to);
        else
          for (long i = 0; i < width; i++) ((float*)to)[i] = from_bf16(((const uint16_t*)from)[i]);
      }
    }
}

// Keys looked at together, and most queries (seq x group) of a task.
constexpr long KEYS = 128, QUERIES = 128;
constexpr float NOTHING = -1e30f;  // below every score, and its differences are finite

// A task's queries: those of some tokens and of the heads that share a key head. As columns of a matrix they
// are padded to a whole vector by repeating the last one.
struct Queries {
  long count, padded, end = 0;  // no query sees key `end`
  int rows[QUERIES];            // of a.query, without its last dimension
  alignas(64) float last[QUERIES];

  Queries(const Attention& a, long b, long head, long first, long tokens)
      : count(tokens * a.group()), padded(round_up(count, LANES)) {
    for (long q = 0; q < padded; q++) {
      long s = first + std::min(q, count - 1) / a.group();
      last[q] = (float)a.last(b, s);
      end = std::max(end, a.last(b, s) + 1);
      if (q < count) rows[q] = (int)((b * a.seq + s) * a.heads + head * a.group() + q % a.group());
    }
  }
  Operand pack(const Attention& a, const Matrix& k, char* memory) const {
    Operand x = operand(count, k, a.type, memory);
    for (long q = 0; q < count; q += Operand::group(x.way)) pack_group(x, a.query, a.type, rows, q);
    return x;
  }
};

// What a task knows of its queries so far.
struct Softmax {
  const Queries& queries;
  alignas(64) float top[QUERIES], total[QUERIES], correction[QUERIES];

  explicit Softmax(const Queries& queries) : queries(queries) {
    std::fill(top, top + queries.padded, NOTHING);
    std::fill(total, total + queries.padded, 0.f);
  }
  // scores [keys][queries.padded] of keys first .. first + count -> weights, in place
  void weigh(float* scores, long first, long count, float scale) {
    long ldc = queries.padded;
    for (long q = 0; q < ldc; q += LANES) {
      Floats limit = load<Floats>(queries.last + q), old = load<Floats>(top + q), most = old;
      for (long k = 0; k < count; k++) {
        Floats s = load<Floats>(scores + k * ldc + q) * scale;
        s = limit < (float)(first + k) ? splat(-INFINITY) : s;
        store(scores + k * ldc + q, s);
        most = s > most ? s : most;
      }
      Floats sum = {};
      for (long k = 0; k < count; k++) {
        Floats w = exponential(load<Floats>(scores + k * ldc + q) - most);
        store(scores + k * ldc + q, w);
        sum += w;
      }
      Floats shrink = exponential(old - most);
      store(top + q, most);
      store(correction + q, shrink);
      store(total + q, load<Floats>(total + q) * shrink + sum);
    }
  }
};

// out[q][dim] += sum_k weights[k][ldc] * value[k][dim], for up to 8 queries; `out` holds, for bfloat16, first
// elements of pairs and second ones apart as LANES each. Meanwhile as many values are fetched from `ahead`.
template <bool PAIRS, int COUNT>
inline void add_values(const Matrix& v, const char* ahead, long count, const float* weights, long ldc,
                       long queries, float* out, long stride) {
  constexpr long WIDE = 2 * LANES, SIZE = PAIRS ? 2 : 4;
  for (long d = 0; d < v.columns; d += WIDE) {
    Floats total[COUNT][2] = {};  // columns behind `queries` are computed and not used
    bool whole = d + WIDE <= v.columns;
    for (long k = 0; k < count; k++) {
      const char* row = v.row(k) + d * SIZE;
      __builtin_prefetch(ahead + k * v.stride + d * SIZE, 0, 2);
      Floats part[2];
      alignas(64) char padded[WIDE * SIZE];
      if (!whole) {
        memset(padded, 0, sizeof padded);
        memcpy(padded, row, (v.columns - d) * SIZE);
        row = padded;
      }
      if (PAIRS) {
        Words pairs = load<Words>(row);
        part[0] = first_of_pair(pairs), part[1] = second_of_pair(pairs);
      } else {
        part[0] = load<Floats>(row), part[1] = load<Floats>(row + 4 * LANES);
      }
      for (int q = 0; q < COUNT; q++) {
        total[q][0] += weights[k * ldc + q] * part[0];
        total[q][1] += weights[k * ldc + q] * part[1];
      }
    }
    for (long q = 0; q < queries; q++)
      for (int i = 0; i < 2; i++) {
        float* to = out + q * stride + d + i * LANES;
        store(to, load<Floats>(to) + total[q][i]);
      }
  }
}

template <bool PAIRS>
inline void add_some_values(const Matrix& v, const char* ahead, long count, const float* weights, long ldc,
                            long queries, float* out, long stride) {
  if (queries == 1)
    add_values<PAIRS, 1>(v, ahead, count, weights, ldc, queries, out, stride);
  else if (queries == 2)
    add_values<PAIRS, 2>(v, ahead, count, weights, ldc, queries, out, stride);
  else if (queries <= 4)
    add_values<PAIRS, 4>(v, ahead, count, weights, ldc, queries, out, stride);
  else
    add_values<PAIRS, 8>(v, ahead, count, weights, ldc, queries, out, stride);
}

// The queries of a key head, and what a task knows of them.
struct Asked {
  Queries queries;
  Softmax softmax;
  Operand x;
  float* sums;  // [queries][dim], padded

  Asked(const Attention& a, long b, long head, char* memory, float* sums)
      : queries(a, b, head, 0, a.seq),
        softmax(queries),
        x(queries.pack(a, a.any_keys(), memory)),
        sums(sums) {}
};

// Few queries a key head (decode): keys are divided among tasks, whose results are merged. A task takes all
// heads, which lie side by side: memory is fetched in longer pieces than one head's.
inline void attend_few(Pool& pool, const Attention& a) {
  long group = a.group(), queries = a.seq * group, padded = round_up(a.dim, 2 * LANES);
  // keys of a task, always the same, so that a row's sums do not depend on the others of its batch
  constexpr long SPAN = 4 * KEYS;
  long spans = (a.longest() + SPAN - 1) / SPAN;
  bool pairs = a.cache_type == Type::BF16;
  // of a head and a task: each query's sum, then its top and total
  long record = queries * (padded + 2);
  Workspace memory(4 * record * a.batch * a.kv_heads * spans + 64);
  float* records = memory.as<float>();
  pool.run(a.batch * spans, [&](long task) {
    long b = task / spans, begin = task % spans * SPAN;
    long packed = round_up(operand_bytes(queries, a.any_keys(), a.type), 64);
    char* room = thread_memory(a.kv_heads * packed);
    Tiles tiles;
    std::deque<Asked> heads;
    long end = 0;
    for (long head = 0; head < a.kv_heads; head++) {
      float* sums = records + ((b * a.kv_heads + head) * spans + task % spans) * record;
      std::fill(sums, sums + record, 0.f);
      std::fill(sums + queries * padded, sums + queries * (padded + 1), NOTHING);
      heads.emplace_back(a, b, head, room + head * packed, sums);
      end = std::min(heads.back().queries.end, begin + SPAN);
    }
    if (begin >= end) return;
    float* scores = PanelScratch::mine().c[0];
    for (long first = begin; first < end; first += KEYS)
      for (long head = 0; head < a.kv_heads; head++) {
        Asked& asked = heads[head];
        long count = std::min(KEYS, end - first), ldc = asked.queries.padded;
        for (long p = 0; p < count; p += PANEL) {
          long next = first + KEYS + p;
          if (next < a.held[b]) fetch_rows(a.keys(b, head, next), 0, PANEL);
          Matrix k = a.keys(b, head, first + p);
          multiply_panel(k, 0, std::min(PANEL, count - p), asked.x, scores + p * ldc, ldc);
        }
        asked.softmax.weigh(scores, first, count, 1 / sqrtf((float)a.dim));
        for (long q = 0; q < queries; q++)
          for (long d = 0; d < padded; d++) asked.sums[q * padded + d] *= asked.softmax.correction[q];
        for (long q = 0; q < queries; q += 8) {
          long some = std::min(8L, queries - q);
          float* sums = asked.sums + q * padded;
          for (long p = 0; p < count;) {
            Matrix v = a.values(b, head, first + p);
            long here = std::min(v.rows, count - p), next = first + KEYS + p;
            const char* ahead = next < a.held[b] ? a.values(b, head, next).row(0) : v.row(0);
            if (pairs)
              add_some_values<true>(v, ahead, here, scores + p * ldc + q, ldc, some, sums, padded);
            else
              add_some_values<false>(v, ahead, here, scores + p * ldc + q, ldc, some, sums, padded);
            p += here;
          }
        }
      }
    for (Asked& asked : heads)
      for (long q = 0; q < queries; q++) {
        asked.sums[queries * padded + q] = asked.softmax.top[q];
        asked.sums[queries * (padded + 1) + q] = asked.softmax.total[q];
      }
  });
  pool.run(a.batch * a.kv_heads, [&](long i) {
    long head = i % a.kv_heads, b = i / a.kv_heads;
    std::vector<float> sum(padded), result(a.dim);
    for (long q = 0; q < queries; q++) {
      float top = NOTHING, total = 0;
      for (long s = 0; s < spans; s++)
        top = std::max(top, records[(i * spans + s) * record + queries * padded + q]);
      std::fill(sum.begin(), sum.end(), 0.f);
      for (long s = 0; s < spans; s++) {
        const float* from = records + (i * spans + s) * record;
        const float* tops = from + queries * padded;
        if (tops[queries + q] == 0) continue;  // saw no key
        float share = expf(tops[q] - top);
        total += share * tops[queries + q];
        for (long d = 0; d < padded; d++) sum[d] += share * from[q * padded + d];
      }
      for (long d = 0; d < a.dim; d++) result[d] = total > 0 ? sum[pairs ? place_of_pair(d) : d] / total : 0;
      long row = (b * a.seq + q / group) * a.heads + head * group + q % group;
      write_row(result.data(), a.dim, a.type, a.out + row * a.dim * size_of(a.type));
    }
  });
}

// Many queries a key head (prefill): queries are divided among tasks, values transposed once for all of them.
inline void attend_many(Pool& pool, const Attention& a) {
  long group = a.group(), at_once = QUERIES / group, blocks = (a.seq + at_once - 1) / at_once;
  std::vector<long> longest_of(a.batch, 0);  // keys that some query of a row sees
  for (long b = 0; b < a.batch; b++)
    for (long s = 0; s < a.seq; s++) longest_of[b] = std::max(longest_of[b], a.last(b, s) + 1);
  long longest = a.longest(), columns = round_up(longest, KEYS), size = size_of(a.cache_type),
       heads = a.batch * a.kv_heads;
  long one = a.dim * columns * size;
  Workspace transposed(heads * one + 64);
  long parts = columns / KEYS;
  pool.run(heads * parts, [&](long task) {  // values [key][dim] -> [dim][key], zeros behind the last key
    long i = task / parts, first = task % parts * KEYS, b = i / a.kv_heads;
    char* to = transposed.as<char>() + i * one;
    long end = std::min(longest_of[b], first + KEYS);
    for (long from = first; from < first + KEYS; from += PANEL) {
      Matrix v = from < end ? a.values(b, i % a.kv_heads, from) : a.any_keys();
      for (long d = 0; d < a.dim; d += 16) {
        long wide = std::min(16L, a.dim - d);
        for (long key = from; key < from + PANEL; key++)
          for (long j = 0; j < wide; j++) {
            char* place = to + ((d + j) * columns + key) * size;
            if (key >= end)
              memset(place, 0, size);
            else
              memcpy(place, v.row(key - from) + (d + j) * size, size);
          }
      }
    }
  });
  pool.run(heads * blocks, [&](long task) {
    // the last queries see the most keys, so they are first
    long i = task % heads, block = blocks - 1 - task / heads, b = i / a.kv_heads, head = i % a.kv_heads;
    long begin = block * at_once, tokens = std::min(at_once, a.seq - begin), queries = tokens * group;
    Queries asked(a, b, head, begin, tokens);
    Softmax softmax(asked);
    long ldc = asked.padded;
    Tiles tiles;
    Matrix v{transposed.as<char>() + i * one, a.cache_type, a.dim, columns, columns * size};
    Operand weights = operand(queries, a.any_keys(), a.type, nullptr);
    long bytes = round_up(weights.bytes(), 64);
    weights.depth = KEYS;
    long weight_bytes = round_up(weights.bytes(), 64);
    // its queries, their weights, and their sums
    char* memory = thread_memory(bytes + weight_bytes + 4 * round_up(a.dim, PANEL) * ldc);
    Operand x = asked.pack(a, a.any_keys(), memory);
    weights.data = memory + bytes;
    float* sums = (float*)(memory + bytes + weight_bytes);  // [dim][ldc]
    std::fill(sums, sums + a.dim * ldc, 0.f);
    float *scores = PanelScratch::mine().c[0], *part = PanelScratch::mine().c[1];
    for (long first = 0; first < asked.end; first += KEYS) {
      long count = std::min(KEYS, asked.end - first);
      for (long p = 0; p < count; p += PANEL)
        multiply_panel(a.keys(b, head, first + p), 0, std::min(PANEL, count - p), x, scores + p * ldc, ldc);
      softmax.weigh(scores, first, count, 1 / sqrtf((float)a.dim));
      long even = round_up(count, 2);
      if (even > count) std::fill(scores + count * ldc, scores + even * ldc, 0.f);
      weights.depth = even;
      for (long p = 0; p < even; p += 2) put_pair(weights, p, scores + p * ldc, scores + (p + 1) * ldc);
      finish(weights);
      Matrix some = v;
      some.data = (const char*)v.data + first * size;
      some.columns = even;
      for (long d = 0; d < a.dim; d += PANEL) {
        long wide = std::min(PANEL, a.dim - d);
        multiply_panel(some, d, wide, weights, part, ldc);
        for (long r = 0; r < wide; r++)
          for (long q = 0; q < ldc; q += LANES) {
            float* sum = sums + (d + r) * ldc + q;
            Floats old = load<Floats>(sum) * load<Floats>(softmax.correction + q);
            store(sum, old + load<Floats>(part + r * ldc + q));
          }
      }
    }
    for (long q = 0; q < queries; q++) {
      float inverse = softmax.total[q] > 0 ? 1 / softmax.total[q] : 0;
      for (long d = 0; d < a.dim; d++) part[d] = sums[d * ldc + q] * inverse;
      write_row(part, a.dim, a.type, a.out + asked.rows[q] * a.dim * size_of(a.type));
    }
  });
}

inline void attend(Pool& pool, const Attention& a) {
  if (a.seq * a.group() <= 16)
    attend_few(pool, a);
  else
    attend_many(pool, a);
}
