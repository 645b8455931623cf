// Parts of one call shared by the threads of XLA's pool.

#ifndef JAXSTACK_KERNELS_THREADS_H_
#define JAXSTACK_KERNELS_THREADS_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace {

// Calls run(0) .. run(parts - 1), and returns when all are done. Threads claim parts from a counter, and only claimed
// ones are waited for: one that comes too late finds nothing, and touches nothing but the counter.
template <typename Run>
void OnAllThreads(xla::ffi::ThreadPool& pool, int64_t parts, Run run) {
  struct Work {
    Run run;
    int64_t parts;
    std::atomic<int64_t> next{0}, done{0};

    Work(Run run, int64_t parts) : run(run), parts(parts) {}
    void Claim() {
      for (int64_t part; (part = next.fetch_add(1)) < parts; done.fetch_add(1)) run(part);
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), parts) - 1;
  if (helpers < 1) {
    for (int64_t part = 0; part < parts; ++part) run(part);
    return;
  }
  auto work = std::make_shared<Work>(run, parts);
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work->Claim(); });
  work->Claim();
  while (work->done.load(std::memory_order_acquire) < parts) std::this_thread::yield();
}

}  // namespace

#endif  // JAXSTACK_KERNELS_THREADS_H_
