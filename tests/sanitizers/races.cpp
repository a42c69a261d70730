// races HOW: what openmp.cpp must tell apart, once for each part of OpenMP that csrc/cpu uses. Prints a sum.
#include <sched.h>

#include <atomic>
#include <cstdio>
#include <cstring>

int main(int, char** arguments) {
  const bool loop = std::strcmp(arguments[1], "loop") == 0, single = std::strcmp(arguments[1], "single") == 0,
             barrier = std::strcmp(arguments[1], "barrier") == 0;
  constexpr int kCount = 4000;
  static int numbers[kCount], once, all, shared;
  static std::atomic<int> begun;
#pragma omp parallel num_threads(4)
  {
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < 4; ++i) {  // one for each thread, however slow it is to come
      begun.fetch_add(1, std::memory_order_relaxed);
      while (begun.load(std::memory_order_relaxed) < 4) sched_yield();
      if (loop) shared = i;
    }
#pragma omp for schedule(dynamic, 4)
    for (int i = 0; i < kCount; ++i) numbers[i] = i;
    if (single) {
#pragma omp single nowait
      once = kCount;
    } else {
#pragma omp single
      once = kCount;
    }
    int mine = once;  // before it is there, of a single that nobody waits for
#pragma omp for schedule(dynamic, 4) nowait
    for (int i = 0; i < kCount; ++i) mine += numbers[i];
    if (barrier) {
#pragma omp barrier
      all += mine;  // by all at once
    } else {
#pragma omp atomic
      all += mine;
    }
  }
  std::printf("%d\n", all + (loop ? shared : 0));
  return 0;
}
