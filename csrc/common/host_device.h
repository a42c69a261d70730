// What nvcc compiles for both sides, and what a C++ compiler sees as plain functions.
#pragma once

#ifdef __CUDACC__
#define DBMTL_HD __host__ __device__
#else
#define DBMTL_HD
#endif
