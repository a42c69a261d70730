/* The C ABI of dbmtl_kernels: plain structs of pointers and sizes, no torch, no Python.
 *
 * csrc/cpu and csrc/cuda implement it; ctypes loads them (python/dbmtl_kernels/backends/c_library.py). Rules:
 *   - A call takes one struct. It returns DBMTL_OK (or DBMTL_NOTED), or dbmtl_last_error() says what was wrong. No
 *     exception crosses the boundary: none is thrown.
 *   - A call that fails has written nothing: pointers that are null, dtypes, sizes and numbers are checked, and memory is
 *     allocated, before. Only the caller knows whether there is as much memory as the sizes say, each pointer on a multiple
 *     of its elements' size. A device may still fail later, or a second launch of one call after the first:
 *     DBMTL_LAUNCH_FAILED.
 *   - Sizes, offsets and strides are int64_t and count elements, not bytes. A pointer to no elements may be null. Tasks
 *     and segments are fewer than 2^31, an array has at most 2^47 bytes.
 *   - Sums are made of fixed chunks added in a fixed order: the same input gives the same bits, run after run, on a CPU
 *     for any number of threads and any instruction set. bf16 and f16 are rounded to nearest, ties to even.
 *   - On a GPU, pointers are to device memory, except `segments`, `grads` and `grad_dtypes`, which are read before the
 *     call returns. The current device must be the pointers' own. A call waits for nothing.
 */
#ifndef DBMTL_H
#define DBMTL_H

#include <stdint.h>

#if defined(__GNUC__)
#define DBMTL_API __attribute__((visibility("default")))
#else
#define DBMTL_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define DBMTL_ABI_VERSION 7
#define DBMTL_MAX_OUTS 4

typedef enum {
  DBMTL_NOTED = -1, /* done; dbmtl_last_error() has something to say about it, once for each device */
  DBMTL_OK = 0,
  DBMTL_INVALID_ARGUMENT = 1,
  DBMTL_UNSUPPORTED_DTYPE = 2,
  DBMTL_OUT_OF_MEMORY = 3,
  DBMTL_UNAVAILABLE = 4, /* the library loaded, but there is no device or driver to run on */
  DBMTL_LAUNCH_FAILED = 5
} dbmtl_status;

typedef enum { DBMTL_F32 = 0, DBMTL_F64 = 1, DBMTL_BF16 = 2, DBMTL_F16 = 3 } dbmtl_dtype;

/* How alpha is formed from the norms of the tasks whose norm is finite. */
typedef enum {
  DBMTL_SCALE_MAX = 0,
  DBMTL_SCALE_MEAN = 1,
  DBMTL_SCALE_MEDIAN = 2,
  DBMTL_SCALE_MIN = 3,
  DBMTL_SCALE_CONSTANT = 4 /* alpha is `constant` */
} dbmtl_scale;

typedef struct {
  void* data;
  int64_t dtype;
} dbmtl_array;

/* [num_tasks, num_params], contiguous within a row. A state is f32, f64 or bf16. */
typedef struct {
  void* data;
  int64_t dtype, stride, num_tasks, num_params;
} dbmtl_rows;

/* eps is positive and finite, constant finite, whatever the scale. */
typedef struct {
  double eps, constant;
  int64_t scale;
} dbmtl_weighting;

/* On a CPU: how many threads at most; less than 1 is 1, and beyond 64 there is one for each processor. On a GPU: the CUDA
 * stream to launch on, and dbmtl_workspace_bytes() of its memory, set to zero once and used by no other stream; a call
 * leaves it as the next one needs it. */
typedef struct {
  int64_t num_threads;
  void *workspace, *stream;
} dbmtl_where;

/* ema   <- beta * ema + (1 - beta) * grads                 [num_tasks, num_params], in place; beta in [0, 1)
 * norms <- ||ema_t||                                        [num_tasks], f64 if ema is f64, else f32;
 *                                                            a finite one is at most the largest f32
 * out   <- sum_t alpha / (norms_t + eps) * ema_t            [num_params]
 *
 * With one task and any scale but CONSTANT the weight is exactly 1. A task whose norm is not finite has weight 0 and
 * its row of ema is set to zero. */
typedef struct {
  dbmtl_rows grads, ema;
  dbmtl_array out;
  void* norms;
  double beta;
  dbmtl_weighting weighting;
  dbmtl_where where;
} dbmtl_balance_args;

/* One row of the task-gradient buffer, gathered from a list of gradients:
 *   row[offset_i : offset_i + numel_i] <- decay * row[...] + gain / loss_scale * grads[i]
 *   sumsq[0] <- sum of squares of the segments afterwards
 * A null grads[i] counts as zeros. loss_scale is one number or null. Where it is 0, or the gain, gradients count as zeros,
 * NaN too.
 * With a null row nothing is stored, and sumsq is that of gain / loss_scale * grads, in the arithmetic of row.dtype (f32
 * or f64): a row's with a decay of 0. */
typedef struct {
  dbmtl_array row;
  double* sumsq;
  const double* coefficients; /* decay, gain; a GPU reads them when the kernel runs */
  dbmtl_array loss_scale;
  int64_t num_segments;
  const int64_t* segments; /* pairs of offset and numel, in any order; of a row that is there none overlap */
  const void* const* grads;
  const uint8_t* grad_dtypes;
  dbmtl_where where;
} dbmtl_accumulate_args;

/* out <- (accumulate ? out : 0) + sum_t weights[t] * rows[t]; a row whose weight is 0 does not count. */
typedef struct {
  dbmtl_rows rows;
  dbmtl_array weights, out;
  int64_t accumulate;
  dbmtl_where where;
} dbmtl_combine_args;

/* Where columns [start, start + numel) of the balanced gradient go. */
typedef struct {
  void* data;
  int64_t dtype, start, numel;
} dbmtl_out;

/* The end of an engine step; `balance_rows_` in python/dbmtl_kernels/ops says what it does. Arrays of num_tasks; active
 * and loss_scale may be null. */
typedef struct {
  dbmtl_rows rows;
  double *sumsq, *norms, *weights;
  uint8_t* nonfinite;
  int64_t* nonfinite_steps;
  const uint8_t* active;
  dbmtl_array loss_scale;
  double propagate_above; /* not NaN */
  dbmtl_out outs[DBMTL_MAX_OUTS];
  int64_t num_outs, fresh, accumulate;
  dbmtl_weighting weighting;
  dbmtl_where where;
} dbmtl_balance_rows_args;

/* gramian[i * num_tasks + j] <- <rows[i], rows[j]>, f32 or f64. */
typedef struct {
  dbmtl_rows rows;
  dbmtl_array gramian;
  dbmtl_where where;
} dbmtl_gramian_args;

DBMTL_API int32_t dbmtl_balance(const dbmtl_balance_args* args);
DBMTL_API int32_t dbmtl_accumulate(const dbmtl_accumulate_args* args);
DBMTL_API int32_t dbmtl_combine(const dbmtl_combine_args* args);
DBMTL_API int32_t dbmtl_balance_rows(const dbmtl_balance_rows_args* args);
DBMTL_API int32_t dbmtl_gramian(const dbmtl_gramian_args* args);

DBMTL_API int32_t dbmtl_abi_version(void);

/* Whether the library can run here: DBMTL_OK, or DBMTL_UNAVAILABLE. */
DBMTL_API int32_t dbmtl_available(void);

/* What was wrong in this thread's last failing call. */
DBMTL_API const char* dbmtl_last_error(void);

/* Bytes of workspace that every call with up to num_tasks tasks needs on the current device; 0 on a CPU. */
DBMTL_API int64_t dbmtl_workspace_bytes(int64_t num_tasks);

/* --- of the CPU library alone --- */

/* The instruction set in use: "avx512", "avx2" or "baseline". */
DBMTL_API const char* dbmtl_isa(void);

/* Use another instruction set than the best one found; null goes back to the best. DBMTL_INVALID_ARGUMENT if the
 * machine lacks it. */
DBMTL_API int32_t dbmtl_set_isa(const char* name);

/* Ask for huge pages under a large buffer that nothing has touched yet: its first write then costs a page fault in
 * every 2 MiB, not in every 4 KiB. A hint. */
DBMTL_API void dbmtl_advise_huge_pages(void* buffer, int64_t num_bytes);

#ifdef __cplusplus
}
#endif
#endif /* DBMTL_H */
