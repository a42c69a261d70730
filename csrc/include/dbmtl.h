/* The C ABI of dbmtl_kernels: plain pointers and sizes, no torch, no Python.
 *
 * Libraries that implement this header (csrc/cpu, csrc/cuda) are loaded with ctypes. Rules:
 *   - every size, offset and stride is int64_t and counts elements, not bytes;
 *   - rows lie `row_stride` elements apart and are contiguous within;
 *   - a call either returns DBMTL_OK or has written nothing (a device may still fail later, or a second launch of one
 *     call after the first: DBMTL_LAUNCH_FAILED); no exception crosses the boundary;
 *   - sums are made of fixed chunks added in a fixed order: the same input gives the same bits, run after run, on a
 *     CPU for any number of threads and any instruction set;
 *   - `stochastic` not 0 rounds a bf16 state stochastically with the random numbers of `seed`, the same ones in every
 *     implementation (python/dbmtl_kernels/rounding.py specifies them); 0 rounds to nearest and ignores `seed`.
 *     DBMTL_INVALID_ARGUMENT if the state is not bf16;
 *   - `num_threads` is for a CPU. `workspace` and `stream` are for a GPU: the CUDA stream to launch on, and
 *     dbmtl_workspace_bytes() of its memory, set to zero once, used by no other stream, and left as a next call needs
 *     it. There, pointers are to device memory, except arrays of pointers, offsets, sizes and dtypes, which are read
 *     before the call returns; a call waits for nothing. The current device must be the pointers' own.
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

#define DBMTL_ABI_VERSION 4

typedef enum {
  DBMTL_OK = 0,
  DBMTL_INVALID_ARGUMENT = 1, /* dbmtl_last_error() names the argument */
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
  DBMTL_SCALE_CONSTANT = 4
} dbmtl_scale;

DBMTL_API int32_t dbmtl_abi_version(void);

/* Whether the library can run here: DBMTL_OK, or DBMTL_UNAVAILABLE with the reason in dbmtl_last_error(). */
DBMTL_API int32_t dbmtl_available(void);

/* What was wrong in this thread's last failing call. */
DBMTL_API const char* dbmtl_last_error(void);

/* Bytes of workspace that every call with up to num_tasks tasks needs on the current device; 0 on a CPU. */
DBMTL_API int64_t dbmtl_workspace_bytes(int64_t num_tasks);

/* ema   <- beta * ema + (1 - beta) * grads                 [num_tasks, num_params], in place
 * norms <- ||ema_t||                                        [num_tasks], f64 if ema is f64, else f32
 * out   <- sum_t alpha / (norms_t + eps) * ema_t            [num_params]
 *
 * alpha: see dbmtl_scale. With one task and any scale but CONSTANT the weight is exactly 1. A task whose
 * norm is not finite has weight 0 and its row of ema is set to zero. state_dtype: f32, bf16 or f64. Stochastic
 * rounding: task t is row t. */
DBMTL_API int32_t dbmtl_balance(const void* grads, int32_t grad_dtype, int64_t grad_row_stride,  //
                                void* ema, int32_t state_dtype, int64_t state_row_stride,        //
                                void* out, int32_t out_dtype, void* norms,                       //
                                int64_t num_tasks, int64_t num_params, double beta, double eps, int32_t scale,
                                double constant, int32_t stochastic, uint64_t seed, int32_t num_threads,
                                void* workspace, void* stream);

/* One row of the task-gradient buffer, gathered straight from a list of gradients:
 *   row[offset_i : offset_i + numel_i] <- decay * row[...] + gain / loss_scale * grads[i]
 *   sumsq[0] <- sum of squares of the segments afterwards
 * segments holds (offset, numel) pairs. A null grads[i] counts as zeros. loss_scale points to one number of
 * loss_scale_dtype, or is null; where it is 0, gradients count as zeros. Stochastic rounding: row 0, and the column
 * is the offset in the row. coefficients points to three doubles, or is null: decay, gain, and the 64 bits of the seed,
 * which then replace those given, and which a GPU reads when the kernel runs. */
DBMTL_API int32_t dbmtl_accumulate(void* row, int32_t state_dtype, int64_t num_segments, const int64_t* segments,
                                   const void* const* grads, const uint8_t* grad_dtypes, double decay, double gain,
                                   const void* loss_scale, int32_t loss_scale_dtype, double* sumsq, int32_t stochastic,
                                   uint64_t seed, const void* coefficients, int32_t num_threads, void* workspace,
                                   void* stream);

/* out <- (accumulate ? out : 0) + sum_t weights[t] * rows[t]; a row whose weight is 0 does not count. */
DBMTL_API int32_t dbmtl_combine(const void* rows, int32_t state_dtype, int64_t row_stride, int64_t num_tasks,
                                int64_t num_params, const void* weights, int32_t weights_dtype, void* out,
                                int32_t out_dtype, int32_t accumulate, int32_t num_threads, void* workspace,
                                void* stream);

/* The end of an engine step; `balance_rows_` in python/dbmtl_kernels/ops.py says what it does. All arrays of num_tasks;
 * active and loss_scale may be null. Output i (of num_outs, at most 4) is of columns [starts[i], starts[i] + numels[i]). */
DBMTL_API int32_t dbmtl_balance_rows(void* rows, int32_t state_dtype, int64_t row_stride, int64_t num_tasks,  //
                                     double* sumsq, uint8_t* broken, int64_t* nonfinite_steps, double* norms,
                                     double* weights,  //
                                     int32_t num_outs, void* const* outs, const int32_t* out_dtypes,
                                     const int64_t* starts, const int64_t* numels,  //
                                     const uint8_t* active, const void* loss_scale, int32_t loss_scale_dtype,
                                     double eps, int32_t scale, double constant, int32_t fresh, int32_t accumulate,
                                     int32_t num_threads, void* workspace, void* stream);

/* gramian[i * num_tasks + j] <- <rows[i], rows[j]>, in out_dtype (f32 or f64). */
DBMTL_API int32_t dbmtl_gramian(const void* rows, int32_t state_dtype, int64_t row_stride, int64_t num_tasks,
                                int64_t num_params, void* gramian, int32_t out_dtype, int32_t num_threads,
                                void* workspace, void* stream);

/* --- of the CPU library alone --- */

/* The instruction set in use: "avx512", "avx2" or "baseline". */
DBMTL_API const char* dbmtl_isa(void);

/* Use another instruction set than the best one found (tests do). DBMTL_INVALID_ARGUMENT if the
 * machine lacks it or the name is unknown. NULL goes back to the best one. */
DBMTL_API int32_t dbmtl_set_isa(const char* name);

/* Ask the system for huge pages under a large buffer that nothing has touched yet: its first write then costs a
 * page fault in every 2 MiB, not in every 4 KiB. A hint; does nothing where it cannot be had. */
DBMTL_API void dbmtl_advise_huge_pages(void* buffer, int64_t num_bytes);

#ifdef __cplusplus
}
#endif
#endif /* DBMTL_H */
