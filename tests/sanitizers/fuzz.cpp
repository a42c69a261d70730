// fuzz LIBRARY GPU SEED COUNT: random structs for every entry point of the C ABI.
//
// Each case has memory of exactly the size that its struct claims, and then up to three of its 8-byte words, or of the
// arrays that it points to, are changed: to sizes up to the ends of int64, null, dtypes that there are not, NaN. An oracle
// in 128 bits tells what must be refused; what claims more memory than is there is not called. On a refusal nothing may be
// written, and neither where an allocation fails: each of a call fails in turn. Prints how many cases were of which kind.
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "dbmtl.h"

namespace {

using Wide = __int128;

int allocations_left = -1;  // until one fails; negative: none does
bool one_failed = false;

struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return int64_t(next() % uint64_t(n)); }
  template <class T>
  T of(std::initializer_list<T> values) { return values.begin()[below(int64_t(values.size()))]; }
};
Random random_;
bool on_gpu;
int64_t workspace_bytes;
void* workspace;

int64_t size_of(int64_t dtype) { return dtype == DBMTL_F64 ? 8 : dtype == DBMTL_F32 ? 4 : 2; }

uint64_t word() {
  const auto bits = [](double x) {
    uint64_t u;
    std::memcpy(&u, &x, 8);
    return u;
  };
  const double inf = std::numeric_limits<double>::infinity();
  switch (random_.below(4)) {
    case 0: return uint64_t(random_.below(12)) - 3;
    case 1: {
      const uint64_t power = uint64_t(1) << random_.of({4, 14, 31, 32, 45, 46, 47, 48, 60, 61, 62, 63});
      return (random_.below(4) ? power : -power) + uint64_t(random_.below(3)) - 1;
    }
    case 2: return bits(random_.of({0.0, -0.0, 1.0, -1.0, 0.5, 5e-324, 1.7e308, inf, -inf, double(NAN), 1 - 0x1p-53}));
    default: return 0;
  }
}

// What a struct claims of memory.
struct Claim {
  const void* at;
  Wide bytes;
};

struct Case {
  std::vector<std::pair<char*, size_t>> blocks;
  std::vector<Claim> claims;
  bool illegal = false, unreadable = false;  // what a check reads is not there
  ~Case() {
    for (auto& block : blocks) std::free(block.first);
  }

  void* take(int64_t bytes) {
    char* block = static_cast<char*>(std::malloc(size_t(bytes)));  // so that a sanitizer knows where it ends
    for (int64_t i = 0; i < bytes; ++i) block[i] = char(random_.next());
    blocks.emplace_back(block, size_t(bytes));
    return block;
  }
  template <class T>
  T* copy(const std::vector<T>& values) {
    void* block = take(int64_t(values.size() * sizeof(T)));
    if (!values.empty()) std::memcpy(block, values.data(), values.size() * sizeof(T));
    return static_cast<T*>(block);
  }
  std::vector<std::string> contents() const {
    std::vector<std::string> found;
    for (auto& block : blocks) found.emplace_back(block.first, block.second);
    return found;
  }
  bool holds(const Claim& claim) const {
    if (claim.bytes <= 0) return true;
    if (claim.at == workspace) return claim.bytes <= workspace_bytes;
    for (auto& block : blocks)
      if (block.first == claim.at) return claim.bytes <= Wide(block.second);
    return false;
  }

  // --- structs that are right ---------------------------------------------------------------------------------------

  int64_t tasks = random_.below(6), params = on_gpu || random_.below(5) ? random_.below(300) : random_.below(60000);

  dbmtl_array array(int64_t count, int64_t dtype) { return {take(count * size_of(dtype)), dtype}; }
  dbmtl_rows rows(int64_t dtype) {
    const int64_t stride = params + random_.of({0, 0, 3, 32});
    return {take((tasks > 0 ? (tasks - 1) * stride + params : 0) * size_of(dtype)), dtype, stride, tasks, params};
  }
  dbmtl_weighting weighting() { return {1e-8, random_.of({0.0, 2.0, -1.0}), random_.below(5)}; }
  dbmtl_where where() { return {random_.below(5), workspace, nullptr}; }
  double* doubles(int64_t count) {
    std::vector<double> values;
    for (int64_t i = 0; i < count; ++i)
      values.push_back(random_.of({0.0, 1.0, 1e300, 4.0, double(INFINITY), double(NAN)}));
    return copy(values);
  }
  dbmtl_array one() { return random_.below(2) ? dbmtl_array{nullptr, 0} : array(1, random_.below(4)); }

  void make(dbmtl_balance_args& a) {
    a.ema = rows(random_.below(3));
    a.grads = rows(on_gpu ? a.ema.dtype : random_.below(4));
    a.out = array(params, on_gpu ? a.grads.dtype : random_.below(4));
    a.norms = take(tasks * (a.ema.dtype == DBMTL_F64 ? 8 : 4));
    a.beta = random_.of({0.0, 0.9});
    a.weighting = weighting();
  }
  void make(dbmtl_accumulate_args& a) {
    struct Span {
      int64_t begin, numel;
    };
    std::vector<Span> spans;
    int64_t end = 0;
    for (int64_t i = 0; i < tasks; ++i) {
      spans.push_back({end, random_.below(3) ? random_.below(20) : params});
      end += spans.back().numel + random_.of({0, 8});
    }
    for (size_t i = spans.size(); i > 1; --i) std::swap(spans[i - 1], spans[size_t(random_.below(int64_t(i)))]);
    a.row = random_.below(5) ? array(end, random_.below(3)) : dbmtl_array{nullptr, random_.below(2)};
    std::vector<int64_t> segments;
    std::vector<const void*> grads;
    std::vector<uint8_t> dtypes;
    for (const Span& span : spans) {
      const dbmtl_array grad = array(span.numel, random_.below(4));
      segments.insert(segments.end(), {span.begin, span.numel});
      grads.push_back(random_.below(5) ? grad.data : nullptr);
      dtypes.push_back(uint8_t(grad.dtype));
    }
    if (tasks > 0 && random_.below(4) == 0) segments[size_t(random_.below(2 * tasks))] = int64_t(word());
    if (tasks > 0 && random_.below(8) == 0) dtypes[size_t(random_.below(tasks))] = uint8_t(random_.below(6));
    a.sumsq = doubles(1);
    a.coefficients = doubles(2);
    a.loss_scale = one();
    a.num_segments = tasks;
    a.segments = copy(segments);
    a.grads = copy(grads);
    a.grad_dtypes = copy(dtypes);
  }
  void make(dbmtl_combine_args& a) {
    a.rows = rows(random_.below(3));
    a.weights = array(tasks, random_.below(4));
    a.out = array(params, random_.below(4));
    a.accumulate = random_.below(2);
  }
  void make(dbmtl_balance_rows_args& a) {
    a.rows = rows(random_.below(3));
    a.sumsq = doubles(tasks);
    a.norms = doubles(tasks);
    a.weights = doubles(tasks);
    a.nonfinite = static_cast<uint8_t*>(take(tasks));
    a.nonfinite_steps = copy(std::vector<int64_t>(size_t(tasks), 3));
    a.active = random_.below(2) ? nullptr : static_cast<uint8_t*>(take(tasks));
    a.loss_scale = one();
    a.propagate_above = random_.of({1.0, -1.0, double(INFINITY)});
    a.num_outs = random_.below(DBMTL_MAX_OUTS + 1);
    int64_t start = 0;
    for (int64_t i = 0; i < a.num_outs; ++i) {
      const int64_t numel = (params - start) / (a.num_outs - i);
      const dbmtl_array out = array(numel, random_.below(4));
      a.outs[i] = {out.data, out.dtype, start, numel};
      start += numel;
    }
    a.fresh = random_.below(2);
    a.accumulate = random_.below(2);
    a.weighting = weighting();
  }
  void make(dbmtl_gramian_args& a) {
    a.rows = rows(random_.below(3));
    a.gramian = array(tasks * tasks, random_.below(2));
  }

  // --- what a struct claims -----------------------------------------------------------------------------------------

  void claim(const void* at, Wide count, int64_t size) {
    count = std::min(count, Wide(1) << 64);
    illegal |= count < 0 || count * size > Wide(1) << 47 || (at == nullptr && count > 0);
    claims.push_back({at, count * size});
  }
  void may_be_null(const void* at, Wide count, int64_t size) {
    if (at != nullptr) claim(at, count, size);
  }
  void dtype(int64_t dtype, int64_t most) { illegal |= dtype < 0 || dtype > most; }
  void check(const dbmtl_array& a, Wide count, int64_t most = DBMTL_F16) {
    dtype(a.dtype, most);
    claim(a.data, count, size_of(a.dtype));
  }
  void check(const dbmtl_rows& r, int64_t most = DBMTL_BF16) {
    dtype(r.dtype, most);
    illegal |= r.num_tasks < 0 || r.num_tasks > INT32_MAX || r.num_params < 0;
    if (r.num_tasks < 1 || illegal) return;
    illegal |= r.num_tasks > 1 && r.stride < r.num_params;
    const Wide end = r.num_params + (r.num_tasks > 1 ? Wide(r.num_tasks - 1) * r.stride : 0);
    illegal |= end * size_of(r.dtype) > Wide(1) << 47;  // where there are no columns too
    if (r.num_params > 0) claim(r.data, end, size_of(r.dtype));
  }
  void check(const dbmtl_weighting& w) {
    illegal |= !(w.eps > 0 && std::isfinite(w.eps)) || !std::isfinite(w.constant);
    illegal |= w.scale < 0 || w.scale > DBMTL_SCALE_CONSTANT;
  }
  void check(const dbmtl_balance_args& a) {
    check(a.grads, DBMTL_F16);
    check(a.ema);
    illegal |= a.grads.num_tasks != a.ema.num_tasks || a.grads.num_params != a.ema.num_params;
    check(a.out, a.ema.num_params);
    illegal |= !(a.beta >= 0 && a.beta < 1);
    check(a.weighting);
    claim(a.norms, a.ema.num_tasks, a.ema.dtype == DBMTL_F64 ? 8 : 4);
  }
  void check(const dbmtl_accumulate_args& a) {
    const int64_t count = a.num_segments;
    illegal |= count > INT32_MAX;
    claim(a.segments, count, 16);
    claim(a.grads, count, 8);
    claim(a.grad_dtypes, count, 1);
    dtype(a.row.dtype, DBMTL_BF16);
    claim(a.sumsq, 1, 8);
    claim(a.coefficients, 2, 8);
    dtype(a.loss_scale.dtype, DBMTL_F16);
    may_be_null(a.loss_scale.data, 1, size_of(a.loss_scale.dtype));
    const bool readable = a.segments && a.grads && a.grad_dtypes;
    for (size_t i = 0; i < 3; ++i) unreadable |= readable && count <= INT32_MAX && !holds(claims[i]);
    if (unreadable || !readable || count > INT32_MAX) return;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t offset = a.segments[2 * i], numel = a.segments[2 * i + 1];
      illegal |= offset < 0 || numel < 0;
      dtype(a.grad_dtypes[i], DBMTL_F16);
      may_be_null(a.row.data, Wide(offset) + numel, size_of(a.row.dtype));
      may_be_null(a.grads[i], numel, size_of(a.grad_dtypes[i]));
      if (a.grads[i] == nullptr) claim(workspace, numel, 1);  // a sum of so many zeros
      for (int64_t j = 0; j < i && a.row.data != nullptr; ++j) {
        const Wide other = a.segments[2 * j], end = other + a.segments[2 * j + 1];
        illegal |= numel > 0 && end > other && offset < end && other < Wide(offset) + numel;
      }
    }
  }
  void check(const dbmtl_combine_args& a) {
    check(a.rows);
    check(a.weights, a.rows.num_tasks);
    check(a.out, a.rows.num_params);
  }
  void check(const dbmtl_balance_rows_args& a) {
    check(a.rows);
    const int64_t count = a.rows.num_tasks;
    for (const void* at : {static_cast<const void*>(a.sumsq), static_cast<const void*>(a.norms),
                           static_cast<const void*>(a.weights), static_cast<const void*>(a.nonfinite_steps)}) {
      claim(at, count, 8);
      illegal |= at == nullptr;
    }
    claim(a.nonfinite, count, 1);
    illegal |= a.nonfinite == nullptr;
    may_be_null(a.active, count, 1);
    dtype(a.loss_scale.dtype, DBMTL_F16);
    may_be_null(a.loss_scale.data, 1, size_of(a.loss_scale.dtype));
    illegal |= std::isnan(a.propagate_above);
    check(a.weighting);
    illegal |= a.num_outs < 0 || a.num_outs > DBMTL_MAX_OUTS;
    for (int64_t i = 0; !illegal && i < a.num_outs; ++i) {
      const dbmtl_out& out = a.outs[i];
      illegal |= out.start < 0 || Wide(out.start) + out.numel > a.rows.num_params;
      check(dbmtl_array{out.data, out.dtype}, out.numel);
    }
  }
  void check(const dbmtl_gramian_args& a) {
    check(a.rows);
    check(a.gramian, Wide(a.rows.num_tasks) * a.rows.num_tasks, DBMTL_F64);
  }
};

struct Counts {
  long done = 0, refused = 0, without_memory = 0, left_out = 0;
} counts;

[[noreturn]] void wrong(const char* entry, const char* what, int status) {
  std::fprintf(stderr, "WRONG: %s: %s, status %d\n", entry, what, status);
  std::exit(1);
}

template <class A>
void fuzz(const char* entry, int32_t (*call)(const A*)) {
  Case made;
  A args = {};
  made.make(args);
  args.where = made.where();
  constexpr int64_t kWords = sizeof(A) / 8;
  for (int64_t changes = random_.of({0, 1, 1, 1, 2, 3}); changes > 0; --changes) {
    const uint64_t value = word();
    std::memcpy(reinterpret_cast<char*>(&args) + 8 * random_.below(kWords), &value, 8);
  }
  made.check(args);
  if (on_gpu && args.where.workspace != nullptr) made.claim(args.where.workspace, workspace_bytes, 1);
  bool there = !made.unreadable;
  for (const Claim& claim : made.claims) there = there && (made.illegal || made.holds(claim));
  if (!there) {
    ++counts.left_out;
    return;
  }
  const std::vector<std::string> before = made.contents();
  if (!made.illegal && !on_gpu && random_.below(4) == 0) {
    args.where.num_threads = 1;  // to start a thread takes memory too
    for (int n = 0;; ++n) {
      one_failed = false;
      allocations_left = n;
      const int32_t status = call(&args);
      allocations_left = -1;
      if (!one_failed) return;  // done, as there was memory for all
      if (status != DBMTL_OUT_OF_MEMORY) wrong(entry, "an allocation failed", status);
      if (made.contents() != before) wrong(entry, "without memory, but something written", status);
      ++counts.without_memory;
    }
  }
  const int32_t status = call(&args);
  if (made.illegal && status <= 0) wrong(entry, "was to be refused", status);
  if (!made.illegal && !on_gpu && status != DBMTL_OK) wrong(entry, "was refused", status);
  if (status > 0 && made.contents() != before) wrong(entry, "was refused, and something was written", status);
  ++(status > 0 ? counts.refused : counts.done);
}

template <class F>
F found(void* library, const char* name) {
  void* symbol = dlsym(library, name);
  if (symbol == nullptr) wrong(name, dlerror(), 0);
  return reinterpret_cast<F>(symbol);
}

template <class A>
void run(void* library, const char* entry, int64_t cases) {
  const auto call = found<int32_t (*)(const A*)>(library, entry);
  if (call(nullptr) != DBMTL_INVALID_ARGUMENT) wrong(entry, "without a struct", 0);
  for (int64_t i = 0; i < cases; ++i) fuzz(entry, call);
}

}  // namespace

#ifndef __SANITIZE_THREAD__  // which needs its own before a thread of it has begun
// Of the library too, as this program's own come first.
extern "C" void* calloc(size_t count, size_t size) {
  if (allocations_left == 0) {
    one_failed = true;
    return nullptr;
  }
  size_t bytes;
  if (__builtin_mul_overflow(count, size, &bytes) || bytes > size_t(1) << 30) return nullptr;
  if (allocations_left > 0) --allocations_left;
  void* found = std::malloc(bytes);
  return found == nullptr ? nullptr : std::memset(found, 0, bytes);
}
#endif

int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (library == nullptr) wrong(arguments[1], dlerror(), 0);
  on_gpu = std::atoi(arguments[2]) != 0;
  random_.state = std::strtoull(arguments[3], nullptr, 10);
  const int64_t count = std::atoll(arguments[4]);
  const auto bytes_for = found<int64_t (*)(int64_t)>(library, "dbmtl_workspace_bytes");
  workspace_bytes = bytes_for(256);
  workspace = std::calloc(size_t(workspace_bytes) + 1, 1);
  for (int64_t round = 0; round < count; round += 50) {
    bytes_for(int64_t(word()));
    if (!on_gpu) {
      found<int32_t (*)(const char*)>(library, "dbmtl_set_isa")(random_.of({"baseline", "avx2", "avx512", "", "sse9"}));
      found<void (*)(void*, int64_t)>(library, "dbmtl_advise_huge_pages")(workspace, int64_t(word()));
    }
    run<dbmtl_balance_args>(library, "dbmtl_balance", 10);
    run<dbmtl_accumulate_args>(library, "dbmtl_accumulate", 10);
    run<dbmtl_combine_args>(library, "dbmtl_combine", 10);
    run<dbmtl_balance_rows_args>(library, "dbmtl_balance_rows", 10);
    run<dbmtl_gramian_args>(library, "dbmtl_gramian", 10);
  }
  if (!on_gpu) {
    found<int32_t (*)(const char*)>(library, "dbmtl_set_isa")(nullptr);
    std::printf("on %s: ", found<const char* (*)()>(library, "dbmtl_isa")());
  }
  std::printf("done %ld, refused %ld, without memory %ld, left out %ld\n", counts.done, counts.refused,
              counts.without_memory, counts.left_out);
  std::free(workspace);
  return 0;
}
