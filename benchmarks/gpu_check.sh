#!/usr/bin/env bash
# Everything that only a GPU can show, in one go:  benchmarks/gpu_check.sh [RESULTS] [STAGE ...]
#
# Stages: build, test, sanitize, pass, rules, linear, step, scaling, replay (default: all). Uses $PYTHON (default: python3) as it is, with no network. A stage
# that fails does not stop the next; the exit status is that of the worst.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results}
shift || true
stages=${*:-build test sanitize pass rules linear step scaling replay}
python=${PYTHON:-python3}
export PYTHONPATH=.:python PYTHONUNBUFFERED=1
mkdir -p "$results"
worst=0

stage() {
  local name=$1
  shift
  case " $stages " in *" $name "*) ;; *) return 0 ;; esac
  local start=$SECONDS
  echo "== $name: $*"
  "$@" || worst=1
  echo "== $name took $((SECONDS - start)) s"
}

stage build env ZO_KERNELS_CUDA=1 "$python" setup.py -q build_ext --inplace
"$python" -m zo_kernels || worst=1
stage test "$python" -m pytest -q -m gpu -p no:cacheprovider tests
if command -v compute-sanitizer >/dev/null; then
  stage sanitize compute-sanitizer --tool memcheck --error-exitcode 9 "$python" tests/kernels/sanitize_cuda.py
  stage sanitize compute-sanitizer --tool racecheck --error-exitcode 9 "$python" tests/kernels/sanitize_cuda.py
else
  echo "== compute-sanitizer is not installed: skipped"
fi
stage pass "$python" benchmarks/gpu_pass.py --out "$results/gpu_pass.csv"
stage rules "$python" benchmarks/rule_pass.py --device cuda --out "$results/gpu_rule_pass.csv"
stage linear "$python" benchmarks/gpu_linear.py --out "$results/gpu_linear.csv"
stage step "$python" benchmarks/step.py --out "$results/gpu_step.csv"
stage scaling "$python" benchmarks/scaling.py --out "$results/gpu_scaling.csv"
stage replay "$python" benchmarks/replay.py --device cuda --out "$results/gpu_replay.csv"
exit $worst
