#!/usr/bin/env bash
# All that only a GPU can show, step by step, each within a time of its own: bash benchmarks/on_gpu.sh OUT [STEP...]
#
#   tests          the test suite on the GPU, files in parallel
#   sanitizer      the tests of the kernels under compute-sanitizer, where it is installed
#   attention      layers at batch 64, bfloat16 and float32; what compiles is left out, as in all steps but `compiled`
#   r1             the same, R1 steps
#   batch1 batch16 core nhwc tf32 compiled     layers at batch 1 and 16, the product alone, NHWC, TF32, against compilers
#   spectral_norm training sampling swap scaling
#   tune           half an hour of tilings
#
# Without steps, all but `tune`, what has been waiting longest first. Results lie in OUT, named after PREFIX (gpu), as the
# files of benchmarks/results are; a step that its time cut short has kept what it measured.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?on_gpu.sh: name a folder for the results}
mkdir -p "$out" && out=$(cd "$out" && pwd)
shift
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
prefix=${PREFIX:-gpu}
export TRITON_DEFAULT_FP_FUSION=1 PYTHONUNBUFFERED=1

suite() { # name, seconds, expression, variables
    local name=$1 seconds=$2 expression=$3
    shift 3
    # interrupted, pytest-benchmark writes what it has
    env "$@" timeout -s INT -k 15 "$seconds" "$python" -m pytest benchmarks -q --benchmark-only --tb=line \
        --show-capture=no --benchmark-json="$out/${prefix}_$name.json" -k "$expression and not smoke" >"$out/$name.log" 2>&1
    echo "$name: $(grep -E '(passed|failed|deselected).* in ' "$out/$name.log" || echo "cut short, or broken: see $name.log")"
}

both="BENCH_DTYPES=bfloat16 float32" large="BENCH_BATCHES=64" quick="BENCH_COMPILERS=0"
((BASH_VERSINFO[0] >= 4)) || { echo "on_gpu.sh: needs bash 4, got $BASH_VERSION" >&2; exit 1; }
[ $# -gt 0 ] || set -- tests r1 spectral_norm training attention core batch1 batch16 nhwc tf32 swap sampling scaling compiled sanitizer
for step in "$@"; do
    case $step in
    tests)
        mkdir -p "$out/tests"
        printf '%s\n' tests/test_*.py | timeout 600 xargs -P "$(nproc)" -I{} sh -c \
            "$python -m pytest {} -q --tb=short --show-capture=no -p no:cacheprovider >'$out'/tests/\$(basename {}).log 2>&1"
        grep -hE "^(FAILED|ERROR)|(passed|failed).* in " "$out"/tests/*.log
        ;;
    sanitizer)
        if command -v compute-sanitizer >/dev/null; then
            timeout 600 compute-sanitizer --error-exitcode 9 "$python" -m pytest -q -p no:cacheprovider \
                tests/test_attention_kernels.py tests/test_spectral_norm_kernels.py >"$out/sanitizer.log" 2>&1
            tail -n 3 "$out/sanitizer.log"
        else
            echo "sanitizer: needs compute-sanitizer, which comes with the CUDA toolkit; not run"
        fi
        ;;
    attention) suite attention 300 "attention_layer and NCHW and not R1" "$large" "$quick" "$both" ;;
    r1) suite attention_r1 300 "attention_layer and NCHW and R1" "$large" "$quick" "$both" ;;
    batch1) suite attention_batch1 120 "attention_layer and NCHW" BENCH_BATCHES=1 "$quick" BENCH_DTYPES=bfloat16 ;;
    batch16) suite attention_batch16 200 "attention_layer and NCHW" BENCH_BATCHES=16 "$quick" BENCH_DTYPES=bfloat16 ;;
    core) suite attention_core 200 "attention_core and NCHW" "$large" "$quick" BENCH_DTYPES=bfloat16 ;;
    nhwc) suite attention_nhwc 200 "attention_layer and NHWC" "$large" "$quick" BENCH_DTYPES=bfloat16 ;;
    tf32) suite attention_tf32 200 "attention_layer and NCHW and not R1" "$large" "$quick" BENCH_DTYPES=tf32 ;;
    compiled) suite attention_compiled 400 "attention_layer and NCHW and not R1 and (BigGAN or D64)" "$large" "$both" ;;
    spectral_norm) suite spectral_norm 200 "spectral_norm and not compiled" "$quick" ;;
    training) suite training 120 "train_step" "$quick" ;;
    sampling) suite sampling 120 "sampling" "$quick" ;;
    swap) suite swap 200 "swap" "$quick" ;;
    scaling)
        timeout 300 "$python" -m benchmarks.scaling --out "$out/${prefix}_scaling.json" --processes 1 >"$out/scaling.log" 2>&1
        echo "scaling: $(tail -n 1 "$out/scaling.log")"
        ;;
    tune) timeout 2000 "$python" -m benchmarks.tune --minutes 30 --out "$out/tuned.json" | tee "$out/tuned.txt" ;;
    *)
        echo "on_gpu.sh: unknown step '$step'; the head of this file lists them" >&2
        exit 2
        ;;
    esac
done
