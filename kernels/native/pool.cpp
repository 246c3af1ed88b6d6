// Workers spin for a moment after each job, since the next kernel usually follows within microseconds, then sleep.
//
// A job is open from `open = epoch` to `open = 0`. A worker announces itself in `active` before it looks at
// `open`; the caller closes the job and then waits until `active` is 0. So a worker that wakes late finds the
// job closed, and no one waits for a worker that never came (it may have no core, or be on the other side of
// a fork).
#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace pd {
namespace {

// Lets the core's other thread, or its power, have a loop that only waits.
inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr auto kSpin = std::chrono::microseconds(100);

class Pool {
 public:
  explicit Pool(int num_workers) {
    for (int i = 0; i < num_workers; ++i) threads_.emplace_back([this] { work(); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(sleep_mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  void run(int64_t num_tasks, TaskFn f, void* context) {
    num_tasks_ = num_tasks;
    f_ = f;
    context_ = context;
    next_.store(0, std::memory_order_relaxed);
    open_.store(++epoch_);
    if (sleeping_.load() > 0) {
      { std::lock_guard<std::mutex> lock(sleep_mutex_); }
      wake_.notify_all();
    }
    take_tasks();
    open_.store(0);
    for (int i = 0; active_.load() != 0; ++i) i < 4096 ? relax() : std::this_thread::yield();
  }

 private:
  void take_tasks() {
    for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < num_tasks_;) f_(context_, task);
  }

  bool has_new_job(uint64_t last) const {
    uint64_t open = open_.load();
    return stop_ || (open != 0 && open != last);
  }

  void wait_for_job(uint64_t last) {
    auto deadline = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 64; ++i) {
        if (has_new_job(last)) return;
        relax();
      }
    } while (std::chrono::steady_clock::now() < deadline);
    std::unique_lock<std::mutex> lock(sleep_mutex_);
    sleeping_.fetch_add(1);
    wake_.wait(lock, [&] { return has_new_job(last); });
    sleeping_.fetch_sub(1);
  }

  void work() {
    for (uint64_t last = 0; !stop_;) {
      wait_for_job(last);
      active_.fetch_add(1);
      if (uint64_t open = open_.load()) {
        last = open;
        take_tasks();
      }
      active_.fetch_sub(1);
    }
  }

  std::vector<std::thread> threads_;
  int64_t num_tasks_ = 0;
  TaskFn f_ = nullptr;
  void* context_ = nullptr;
  uint64_t epoch_ = 0;
  alignas(64) std::atomic<uint64_t> open_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> active_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<bool> stop_{false};
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
};

std::mutex g_caller;           // held by the one caller that uses the pool
Pool* g_pool = nullptr;        // leaked at exit: joining threads from a static destructor may hang
std::atomic<int> g_threads{1};

}  // namespace

int num_threads() { return g_threads.load(std::memory_order_relaxed); }

void run_tasks(int64_t num_tasks, TaskFn f, void* context) {
  if (num_tasks > 1 && num_threads() > 1 && g_caller.try_lock()) {
    std::lock_guard<std::mutex> lock(g_caller, std::adopt_lock);
    g_pool->run(num_tasks, f, context);
    return;
  }
  for (int64_t task = 0; task < num_tasks; ++task) f(context, task);
}

void* scratch(size_t num_bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t size = 0;
  if (num_bytes > size) {
    size = (num_bytes + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(4096, size));
    if (memory == nullptr) std::abort();
  }
  return memory.get();
}

}  // namespace pd

extern "C" void pd_set_num_threads(int num_threads) {
  std::lock_guard<std::mutex> lock(pd::g_caller);
  if (num_threads == pd::g_threads.load()) return;
  delete pd::g_pool;
  pd::g_pool = new pd::Pool(num_threads - 1);
  pd::g_threads.store(num_threads);
}
