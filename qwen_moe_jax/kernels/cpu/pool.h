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

  // How many may work at once: cores, divided among the kernels that run now.
  long workers() const {
    long cores = std::max(1u, std::thread::hardware_concurrency());
    long share = cores / std::max(1, shared().callers.load());
    return std::max(1L, std::min(share, (long)threads_.num_threads()));
  }

  // Calls work(i) for i in 0 .. count - 1, in no order, and returns when all are done; `alone` where there is
  // so little to do that waking a thread costs more than its help.
  void run(long count, const std::function<void(long)>& work, bool alone = false) {
    long helpers = alone ? 0 : std::min(workers(), count) - 1;
    if (helpers <= 0) {
      for (long i = 0; i < count; i++) work(i);
      return;
    }
    auto job = std::make_shared<Job>(count, &work);
    {
      std::lock_guard<std::mutex> lock(shared().mutex);
      shared().latest = job;
    }
    shared().published++;
    for (long i = shared().looking; i < helpers; i++) threads_.Schedule([job] { help(job); });
    job->take_all();
    while (job->busy.load(std::memory_order_acquire)) pause();
  }

 private:
  struct Job {
    Job(long count, const std::function<void(long)>* work) : count(count), work(work) {}
    void join() {
      busy++;  // before looking for work: the caller leaves when nobody is busy
      take_all();
      busy.fetch_sub(1, std::memory_order_release);
    }
    void take_all() {
      for (long i; next.load() < count && (i = next++) < count;) (*work)(i);
    }
    std::atomic<long> next{0};
    std::atomic<int> busy{0};
    const long count;
    const std::function<void(long)>* work;
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
      while (shared().published == seen && Clock::now() < give_up) pause();
      shared().looking--;
      if (shared().published == seen) return;
      std::lock_guard<std::mutex> lock(shared().mutex);
      job = shared().latest;
    }
  }

  static constexpr int LOOK = 50;  // microseconds
  xla::ffi::ThreadPool& threads_;
};

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
