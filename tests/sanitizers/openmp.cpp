// What GCC's code calls for the OpenMP of csrc/cpu, as threads that the thread sanitizer sees: it knows pthreads and
// atomics, but GCC's own runtime waits on futexes that it does not see, and every barrier would be reported as a race.
// Only what the standard promises orders memory here: the start and the end of a region, and its barriers. Work is handed
// out by relaxed atomics, so that a race between two tiles is not hidden by the order in which they were handed out.
// Outside of a region the thread is a team of its own. A use of OpenMP that is not here fails to link.
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <vector>

namespace {

constexpr int kMostLoops = 64;  // of a region, and singles; each is used once

struct Team {
  void (*work)(void*);
  void* data;
  int threads;
  pthread_barrier_t barrier;
  std::atomic<long> next[kMostLoops];    // iteration of each loop that nobody has
  std::atomic<int> singles[kMostLoops];  // threads that came to it
};

struct Loop {
  long end, step, chunk;
};

struct Member {
  Team* team = nullptr;
  int index = 0, loops = 0, singles = 0;
  Loop loop = {0, 0, 0};
};

thread_local Member member;

void wait_for_all() {
  if (member.team != nullptr) pthread_barrier_wait(&member.team->barrier);
}

int limited(int used) { return used < kMostLoops ? used : (std::abort(), 0); }

struct Start {
  Team* team;
  int index;
};

void* enter(void* given) {
  const Start start = *static_cast<Start*>(given);
  const Member outer = member;
  member = {start.team, start.index, 0, 0, {0, 0, 0}};
  start.team->work(start.team->data);
  member = outer;
  return nullptr;
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return member.index; }
int omp_get_num_threads() { return member.team == nullptr ? 1 : member.team->threads; }
int omp_get_max_threads() { return 1; }
int omp_get_num_procs() { return 1; }
int omp_in_parallel() { return omp_get_num_threads() > 1; }

void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned) {
  const auto team = std::make_unique<Team>();
  team->work = work;
  team->data = data;
  team->threads = std::max(int(threads), 1);
  pthread_barrier_init(&team->barrier, nullptr, unsigned(team->threads));
  std::vector<Start> starts;
  for (int i = 0; i < team->threads; ++i) starts.push_back({team.get(), i});
  std::vector<pthread_t> others(size_t(team->threads - 1));
  for (size_t i = 0; i < others.size(); ++i)
    if (pthread_create(&others[i], nullptr, enter, &starts[i + 1]) != 0) std::abort();
  enter(&starts[0]);
  for (const pthread_t other : others) pthread_join(other, nullptr);
  pthread_barrier_destroy(&team->barrier);
}

void GOMP_barrier() { wait_for_all(); }

bool GOMP_single_start() {
  if (member.team == nullptr) return true;
  return member.team->singles[limited(member.singles++)].fetch_add(1, std::memory_order_relaxed) == 0;
}

// Of the loop that this thread is in.
bool GOMP_loop_nonmonotonic_dynamic_next(long* begin, long* end) {
  if (member.team == nullptr) return false;
  const Loop& loop = member.loop;
  const long taken = member.team->next[member.loops - 1].fetch_add(1, std::memory_order_relaxed);
  *begin = taken * loop.chunk;
  *end = std::min(*begin + loop.chunk, loop.end);
  return *begin < loop.end;
}

// Of loops from 0 by steps of 1.
bool GOMP_loop_nonmonotonic_dynamic_start(long from, long end, long step, long chunk, long* first, long* last) {
  if (from != 0 || step != 1) std::abort();
  if (member.team == nullptr) {
    *first = 0;
    *last = end;
    return end > 0;
  }
  limited(member.loops++);
  member.loop = {end, step, chunk};
  return GOMP_loop_nonmonotonic_dynamic_next(first, last);
}

void GOMP_loop_end() { wait_for_all(); }
void GOMP_loop_end_nowait() {}

}  // extern "C"
