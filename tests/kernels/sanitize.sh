#!/bin/sh
# The parity tests on an extension compiled with AddressSanitizer and UndefinedBehaviorSanitizer: make sanitize.
#
# Python itself is not instrumented: the sanitizer's library has to be loaded before everything else, and the C++ library with it, since
# it looks for __cxa_throw when it starts. Leaks are not looked for, because the interpreter frees nothing when it exits. gcc only.
set -eu
python=$(command -v "${1:?usage: sanitize.sh PYTHON [pytest arguments]}")
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
shift
cd "$(dirname "$0")/../.."
copy=build/sanitized # a copy, so that the extension of the working tree stays what it is
rm -rf "$copy"
mkdir -p "$copy"
cp -r zo_kernels csrc tests setup.py pyproject.toml README.md LICENSE "$copy"
rm -f "$copy"/zo_kernels/*.so
cd "$copy"
cxx=${CXX:-g++}
CXX="$cxx -g -fsanitize=address,undefined -fno-sanitize-recover=undefined" ZO_KERNELS_CUDA=0 "$python" setup.py -q build_ext --inplace
LD_PRELOAD="$($cxx -print-file-name=libasan.so) $($cxx -print-file-name=libstdc++.so.6)"
export LD_PRELOAD
export ASAN_OPTIONS=detect_leaks=0:log_path=stderr UBSAN_OPTIONS=print_stacktrace=1
export ZO_KERNELS_BACKEND=cpu PYTHONPATH=.:python OMP_NUM_THREADS=2
# test_sanitizers compiles programs of its own; what runs an emulator, a compiler or another process has nothing to gain here.
"$python" -m pytest -q --capture=sys -m "not gpu and not slow" -p no:cacheprovider --deselect tests/kernels/test_cpu.py::test_sanitizers \
  tests/kernels/test_vectors.py tests/kernels/test_ops.py tests/kernels/test_cpu.py tests/kernels/test_sequence.py "$@"
