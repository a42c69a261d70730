#!/usr/bin/env bash
# One command for a GPU: bash benchmarks/gpu_suite.sh [--dry-run] OUT_DIR
#
# Builds, runs the tests that need a GPU with compute-sanitizer beside them, then the benchmarks; ends within eight
# minutes on an H200. From a bare checkout: it needs torch >= 2.7, triton >= 3.3, numpy and pytest, for the CUDA kernels
# nvcc >= 12.4 (on PATH or in /usr/local/cuda/bin), and installs nothing.
# --dry-run (or DBMTL_GPU_SUITE_DRY=1) tries the benchmarks on a CPU, at tiny sizes. PYTHON chooses the interpreter.
# What it writes, and its exit codes: benchmarks/gpu/suite.py.
set -eu
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu/suite.py" "$@"
