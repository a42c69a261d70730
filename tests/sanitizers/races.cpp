// races HOW: what openmp.cpp must tell apart, once for each part of OpenMP that csrc/cpu uses. Prints a sum.
#include <cstdio>
#include <cstring>

int main(int, char** arguments) {
  const bool loop = std::strcmp(arguments[1], "loop") == 0, single = std::strcmp(arguments[1], "single") == 0,
             barrier = std::strcmp(arguments[1], "barrier") == 0;
  constexpr int kCount = 4000;
  static int numbers[kCount], once, all;
#pragma omp parallel num_threads(4)
  {
#pragma omp for schedule(dynamic, 4)
    for (int i = 0; i < kCount; ++i) {
      numbers[i] = i;
      if (loop) numbers[(i + kCount / 2) % kCount] = i;  // another thread's
    }
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
  std::printf("%d\n", all);
  return 0;
}
