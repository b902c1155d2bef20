// What a machine can do, as one line of JSON: reading memory, float32 multiply-adds, bfloat16 products.
// Built and run by cpu.py:  g++ -O2 -march=native -pthread machine.cc (-O3 reads a quarter slower)
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

static int threads;
static volatile double sink;

// Seconds of work(thread) on all threads at once, the median of some runs.
static double seconds(const std::function<void(int)>& work) {
  std::vector<double> taken;
  for (int run = 0; run < 9; run++) {
    auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> team;
    for (int i = 0; i < threads; i++) team.emplace_back(work, i);
    for (auto& t : team) t.join();
    taken.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(taken.begin(), taken.end());
  return taken[taken.size() / 2];
}

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
typedef float Floats __attribute__((vector_size(BYTES)));
typedef uint64_t Words __attribute__((vector_size(BYTES)));

int main(int count, char** given) {
  threads = count > 1 ? atoi(given[1]) : (int)std::thread::hardware_concurrency();

  size_t size = 1024ul << 20;
  char* memory = (char*)aligned_alloc(2 << 20, size);
#if defined(MADV_HUGEPAGE)
  madvise(memory, size, MADV_HUGEPAGE);
#endif
  memset(memory, 1, size);
  size_t part = size / threads / 512 * 512;
  double read = 1e9;  // the best of several distances to fetch ahead
  for (long ahead : {1024, 2048, 4096, 8192, 16384})
    read = std::min(read, seconds([&](int thread) {
                      Words sums[8] = {};
                      for (char *from = memory + part * thread, *end = from + part; from < end;
                           from += 8 * BYTES)
                        for (int i = 0; i < 8; i++) {
                          __builtin_prefetch(from + i * BYTES + ahead);
                          Words words;
                          memcpy(&words, from + i * BYTES, BYTES);
                          sums[i] += words;
                        }
                      for (int i = 1; i < 8; i++) sums[0] += sums[i];
                      sink = (double)sums[0][0];
                    }));

  long rounds = 20000000;
  constexpr int SUMS = 12;
  double multiply = seconds([&](int) {
    Floats sums[SUMS], x = Floats{} + 0.999f, y = Floats{} + 1e-6f;
#pragma GCC unroll 12
    for (int i = 0; i < SUMS; i++) sums[i] = Floats{} + (float)i;
    for (long r = 0; r < rounds / SUMS; r++)
#pragma GCC unroll 12
      for (int i = 0; i < SUMS; i++) sums[i] = sums[i] * x + y;
#pragma GCC unroll 12
    for (int i = 1; i < SUMS; i++) sums[0] += sums[i];
    sink = sums[0][0];
  });

  double pairs = 0;  // GFLOP/s of bfloat16 products, if the processor has instructions for them
#if defined(__AVX512BF16__)
  double dots = seconds([&](int) {
    __m512 sums[SUMS];
    __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f003f00);
    for (int i = 0; i < SUMS; i++) sums[i] = _mm512_set1_ps(i);
    for (long r = 0; r < rounds / SUMS; r++)
#pragma GCC unroll 12
      for (int i = 0; i < SUMS; i++) sums[i] = _mm512_dpbf16_ps(sums[i], x, x);
    for (int i = 1; i < SUMS; i++) sums[0] = _mm512_add_ps(sums[0], sums[i]);
    sink = _mm512_reduce_add_ps(sums[0]);
  });
  pairs = threads * (double)(rounds / SUMS * SUMS) * 64 / dots / 1e9;
#endif
#if defined(__AMX_BF16__)
  if (syscall(SYS_arch_prctl, 0x1023, 18) == 0) {
    long products = 400000;
    double tiles = seconds([&](int) {
      struct {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } config;
      _tile_loadconfig(&config);
      _tile_zero(4);
      _tile_zero(5);
      _tile_zero(6);
      _tile_zero(7);
      for (long i = 0; i < products / 4; i++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_release();
    });
    pairs = std::max(pairs, threads * (double)products * 16384 / tiles / 1e9);
  }
#endif
  double floats = threads * (double)(rounds / SUMS * SUMS) * (BYTES / 4) * 2 / multiply / 1e9;
  printf("{\"threads\": %d, \"read\": %.1f, \"float32\": %.0f, \"bfloat16\": %.0f}\n", threads,
         part * threads / read / 1e9, floats, pairs);
}
