// Threads: those of the caller's TBB arena, so that INFERENCE_NUM_THREADS and CPU pinning hold here too.
#pragma once

#include <cstddef>

// ThreadSanitizer does not see how TBB, which is not built for it, synchronizes: it gets plain threads.
#if defined(RELU2_STD_THREADS)
#include <atomic>
#include <thread>
#include <vector>
#else
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>
#endif

namespace relu2 {

#if defined(RELU2_STD_THREADS)
inline size_t thread_count() {
  return 4;
}

template <class F>
void parallel_for(size_t n, const F& f) {
  std::atomic<size_t> next{0};
  std::vector<std::thread> threads;
  for (size_t i = 0; i < thread_count(); i++)
    threads.emplace_back([&] {
      for (size_t k = next++; k < n; k = next++) f(k);
    });
  for (auto& thread : threads) thread.join();
}
#else
inline size_t thread_count() {
  return static_cast<size_t>(tbb::this_task_arena::max_concurrency());
}

template <class F>
void parallel_for(size_t n, const F& f) {
  tbb::parallel_for(size_t(0), n, f);
}
#endif

}  // namespace relu2
