// Threads that go through one program together: each phase of it is work items, which whoever is there takes.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>

#ifdef TERNARY_X86
#include <immintrin.h>
#endif

namespace ternary {

// What the threads share. A thread that comes late, or never, holds nobody up: a phase ends when its items
// are done, and one that finds it over goes on to the next.
struct Crew {
  std::atomic<uint64_t> at{0};    // the phase, and in the low half the items taken of it
  std::atomic<uint64_t> done{0};  // items of the phase
  std::atomic_flag failed;        // whether `error` is being or has been written
  std::exception_ptr error;       // for whoever has waited for all threads
};

// A thread of the crew. All go through the same calls of `run` and `lead` with the same numbers of items.
class Member {
 public:
  Member(Crew& crew, int64_t threads, bool leads) : crew_(crew), threads_(threads), leads_(leads) {}

  // kernel(args, begin, end) on parts of 0 .. n; when it returns, all of them are done.
  template <class Args>
  void run(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t n) {
    // Two parts a thread: one that is interrupted leaves the second to another.
    phase(n, (n + 2 * threads_ - 1) / (2 * threads_), true,
          [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }

  // What only the thread that leads may do.
  template <class Work>
  void lead(const Work& work) {
    phase(1, 1, leads_, [&](int64_t, int64_t) { work(); });
  }

 private:
  static constexpr uint64_t kItems = 0xffffffff;

  template <class Work>
  void phase(int64_t n, int64_t part, bool takes, const Work& work) {
    const uint64_t items = static_cast<uint64_t>(n);
    if (items == 0) return;
    uint64_t at = crew_.at.load(std::memory_order_acquire);
    for (int waited = 0; at >> 32 == phase_;) {
      const uint64_t first = at & kItems, count = std::min<uint64_t>(part, items - first);
      if (!takes || count == 0) {
        wait(waited++);
      } else if (crew_.at.compare_exchange_weak(at, at + count, std::memory_order_acq_rel)) {
        try {
          work(first, first + count);
        } catch (...) {
          if (!crew_.failed.test_and_set()) crew_.error = std::current_exception();
        }
        if (crew_.done.fetch_add(count, std::memory_order_acq_rel) + count == items) {
          crew_.done.store(0, std::memory_order_relaxed);
          crew_.at.store((phase_ + 1) << 32, std::memory_order_release);
        }
        waited = 0;
      }
      at = crew_.at.load(std::memory_order_acquire);
    }
    ++phase_;
  }

  static void wait(int waited) {
    if (waited % 256 == 255) return std::this_thread::yield();  // there may be more threads than cores
#ifdef TERNARY_X86
    _mm_pause();
#endif
  }

  Crew& crew_;
  int64_t threads_;
  bool leads_;
  uint64_t phase_ = 0;
};

}  // namespace ternary
