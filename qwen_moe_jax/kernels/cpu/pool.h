// Work shared among XLA's own threads: the caller works, and idle threads of the pool help.
#pragma once
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

// Nothing ever waits for a thread that has not begun: a helper that comes late finds no work left. So
// kernels that run at once (several devices, independent operations) cannot block one another. A helper looks
// for the next kernel's work for a moment before it gives its thread back, since waking one takes as long as
// reading some hundred kilobytes.
class Pool {
 public:
  explicit Pool(xla::ffi::ThreadPool& threads) : threads_(threads) { shared().callers++; }
  ~Pool() { shared().callers--; }

  using Work = std::function<void(long, long)>;

  // Calls work(begin, end) for runs that together are 0 .. count, in no order, and returns when all are done;
  // `alone` where there is so little to do that waking a thread costs more than its help. Runs are long at
  // first, at most `longest`, since each begins with a wait for memory, and short in the end, when the other
  // threads would wait for the last one.
  void run_ranges(long count, long longest, const Work& work, bool alone = false) {
    if (count <= 0) return;
    long threads = alone || crowded() ? 1 : std::min(workers(), count), helpers = threads - 1;
    if (helpers == 0) return work(0, count);
    auto job = std::make_shared<Job>(count, longest, threads, &work);
    {
      std::lock_guard<std::mutex> lock(shared().mutex);
      shared().latest = job;
    }
    shared().published++;
    for (long i = shared().looking; i < helpers; i++) threads_.Schedule([job] { help(job); });
    job->take_all();
    while (job->busy.load(std::memory_order_acquire)) pause();
  }

  // Calls work(i) for i in 0 .. count - 1, in no order.
  void run(long count, const std::function<void(long)>& work, bool alone = false) {
    auto each = [&](long begin, long end) {
      for (long i = begin; i < end; i++) work(i);
    };
    run_ranges(count, 1, each, alone);
  }

 private:
  struct Job {
    Job(long count, long longest, long threads, const Work* work)
        : count(count),
          longest(longest),
          shortest(std::max(1L, longest / 16)),
          threads(threads),
          work(work) {}
    void join() {
      busy++;  // before looking for work: the caller leaves when nobody is busy
      take_all();
      busy.fetch_sub(1, std::memory_order_release);
    }
    void take_all() {
      for (long begin = next; begin < count;) {
        long length = std::clamp((count - begin) / (2 * threads), shortest, longest);
        length = std::min(length, count - begin);
        if (!next.compare_exchange_weak(begin, begin + length)) continue;
        (*work)(begin, begin + length);
        begin = next;
      }
    }
    std::atomic<long> next{0};
    std::atomic<int> busy{0};
    const long count, longest, shortest, threads;
    const Work* work;
  };

  struct Shared {
    std::atomic<int> callers{0};  // kernels that run
    std::atomic<int> looking{0};  // helpers without work
    std::atomic<long> published{0};
    std::mutex mutex;
    std::shared_ptr<Job> latest;
  };

  static Shared& shared() {
    static Shared one;
    return one;
  }

  // How many may work at once. A helper that is busy in another kernel comes when it is done there.
  long workers() const { return std::clamp((long)threads_.num_threads(), 1L, cores()); }
  static long cores() { return std::max(1u, std::thread::hardware_concurrency()); }
  // Every core has a kernel of its own, as with many devices.
  static bool crowded() { return shared().callers > cores(); }

  static void pause() {
#if defined(__x86_64__)
    for (int i = 0; i < 16; i++) __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
  }

  static void help(std::shared_ptr<Job> job) {
    using Clock = std::chrono::steady_clock;
    for (;;) {
      long seen = shared().published;
      job->join();
      shared().looking++;
      auto give_up = Clock::now() + std::chrono::microseconds(LOOK);
      while (shared().published == seen && !crowded() && Clock::now() < give_up) pause();
      shared().looking--;
      if (shared().published == seen) return;
      std::lock_guard<std::mutex> lock(shared().mutex);
      job = shared().latest;
    }
  }

  static constexpr int LOOK = 50;  // microseconds
  xla::ffi::ThreadPool& threads_;
};

// Calls work(i, first, last) for each piece of begin .. end that lies in the i-th stretch of `size`, counted
// from that stretch's beginning.
template <class Work>
inline void by_stretch(long begin, long end, long size, const Work& work) {
  while (begin < end) {
    long i = begin / size, stop = std::min(end, (i + 1) * size);
    work(i, begin - i * size, stop - i * size);
    begin = stop;
  }
}

// Memory that outlives the call, to be used by the next one: fresh pages cost more than what is written to
// them.
class Workspace {
 public:
  explicit Workspace(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex());
    auto& spare = spares();
    size_t best = spare.size();
    for (size_t i = 0; i < spare.size(); i++)
      if (best == spare.size() || spare[i].size > spare[best].size) best = i;
    if (best < spare.size()) {
      block_ = spare[best];
      spare.erase(spare.begin() + best);
    }
    if (block_.size < bytes) {
      free(block_.memory);
      block_.size = (bytes + 4095) / 4096 * 4096;
      block_.memory = aligned_alloc(4096, block_.size);
    }
  }
  ~Workspace() {
    std::lock_guard<std::mutex> lock(mutex());
    spares().push_back(block_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  template <class T>
  T* as() {
    return (T*)block_.memory;
  }

 private:
  struct Block {
    void* memory = nullptr;
    size_t size = 0;
  };
  static std::mutex& mutex() {
    static std::mutex one;
    return one;
  }
  static std::vector<Block>& spares() {
    static std::vector<Block> all;
    return all;
  }
  Block block_;
};
