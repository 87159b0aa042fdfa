#!/usr/bin/env bash
# What only a GPU can show, as named stages:  benchmarks/gpu_check.sh FOLDER [STAGE ...]
#
#   build smoke parity    the first ten minutes (default)      steps passes learn      the second
#   offload               models of 13 and 30 billion weights in host memory: 26 and 60 GB, pinned, each tensor rounded up to a power of two
#   large                 by name alone: models of 6.7 and 13 billion weights, scaling
#
# Each stage has a limit in seconds of its own, LIMIT_NAME=SECONDS in the environment overrides it, and writes CSV files of its own into FOLDER, row
# by row, each row with its commit (where there is no repository: COMMIT): what is cut off keeps what was done. stages.csv says how each one ended.
# Uses $PYTHON (default: python3) as it is, with no network. A stage that fails does not stop the next; the exit status is that of the worst.
# TINY=1: a dry run on the CPU, tiny and with the emulated graph, which proves this script and measures nothing.
set -uo pipefail
[ $# -ge 1 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; }
results=$(mkdir -p "$1" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
stages=${*:-build smoke parity}
python=${PYTHON:-python3}
export PYTHONPATH=.:python PYTHONUNBUFFERED=1
export COMMIT=${COMMIT:-$(git rev-parse --short=10 HEAD 2>/dev/null)}
[ -n "$COMMIT" ] || { echo "here is no repository: set COMMIT to the commit that is checked"; exit 2; }
if [ -n "${TINY:-}" ]; then
  device=cpu; quick=--quick
  step="--device cpu --model-shape llama-tiny --tokens 2x4 --modes forwards scratch --rounds 1 --calls 1 --dtype float32"
  large=$step
else
  device=cuda; quick=
  step="--model-shape opt-1.3b --rounds 5"
  large="--model-shape opt-6.7b opt-13b --tokens 16x32 --rounds 3"
fi
worst=0
[ -f "$results/stages.csv" ] || echo "commit,stage,command,limit_s,took_s,status" >"$results/stages.csv"

limits="build=110 smoke=60 parity=420 steps=240 passes=200 learn=150 offload=300 large=590"
for stage in $stages; do case " $limits " in *" $stage="*) ;; *) echo "there is no stage $stage: build smoke parity steps passes learn offload large"; exit 2 ;; esac; done

run() { # what is left of the stage's limit is this command's
  local left=$((until - SECONDS)) start=$SECONDS status
  [ "$left" -gt 0 ] || { echo "== $stage: no time left for $*"; echo "$COMMIT,$stage,$(basename "${2:-$1}"),0,0,124" >>"$results/stages.csv"; worst=1; return; }
  echo "== $stage: $* (at most $left s)"
  timeout -k 5 "$left" "$@"
  status=$?
  [ $status = 0 ] || worst=1
  echo "$COMMIT,$stage,$(basename "${2:-$1}"),$left,$((SECONDS - start)),$status" >>"$results/stages.csv"
}

for stage in $stages; do
  name=LIMIT_${stage^^}
  limit=$(sed -E "s/.*\b$stage=([0-9]+).*/\1/" <<<"$limits")
  until=$((SECONDS + ${!name:-$limit}))
  case $stage in
  build)
    if [ $device = cuda ]; then run env ZO_KERNELS_CUDA=1 "$python" setup.py -q build_ext --inplace; fi
    run "$python" -m zo_kernels
    ;;
  smoke) run "$python" benchmarks/gpu_smoke.py --device $device --out "$results/smoke.csv" ;;
  parity) run "$python" benchmarks/gpu_parity.py --out "$results/parity.csv" ${TINY:+--dry} ;;
  steps)
    for tokens in 16x32 16x400; do # a file each: what is cut off is the second
      run "$python" benchmarks/step.py $step $([ -n "${TINY:-}" ] || echo --tokens $tokens) --out "$results/steps_$tokens.csv"
      [ -z "${TINY:-}" ] || break
    done
    ;;
  passes)
    run "$python" benchmarks/rule_pass.py --device $device $quick --out "$results/rules.csv"
    run "$python" benchmarks/replay.py --device $device $quick --out "$results/replay.csv"
    run "$python" benchmarks/gpu_linear.py --device $device --quick --out "$results/linear.csv"
    if [ $device = cuda ]; then run "$python" benchmarks/gpu_pass.py --out "$results/passes.csv"; fi
    ;;
  learn) # what a model learns on a GPU, until a little before the stage's limit; LIMIT_LEARN=480 for the whole of it
    if [ -d ../shared/models/stories15m ] && [ -d ../shared/data/sst2 ]; then
      run "$python" benchmarks/learn_gpu.py --device $device $quick --limit $((until - SECONDS - 20)) --out "$results/learn_gpu.csv"
    else
      echo "== learn: ../shared has no models/stories15m or no data/sst2: left out"
    fi
    ;;
  offload) # a process each: what one has pinned, it keeps
    for shape in opt-13b opt-30b; do
      run "$python" benchmarks/offload.py --visits $shape --device $device $quick ${TINY:+--tokens 2x4} --out "$results/offload_$shape.csv"
    done
    ;;
  large)
    run "$python" benchmarks/scaling.py --device $device $quick --out "$results/scaling.csv"
    run "$python" benchmarks/step.py $large --out "$results/large.csv"
    ;;
  esac
done
exit $worst
