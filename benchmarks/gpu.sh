#!/usr/bin/env bash
# GPU tests, benchmark and kernel profiles in one command of at most 8 minutes:
#
#     bash benchmarks/gpu.sh
#
# Needs a CUDA GPU and a Python with torch, triton, scipy, pytest, hypothesis and matplotlib; no network, nothing
# is installed.
# mamba_ssm is measured beside ours where it is installed, or where a source archive mamba_ssm-*.tar.gz lies in
# benchmarks/ or .mamba/: its scan is then built while the tests run (nvcc, ninja, einops). Else its rows are
# missing, with the reason.
#
#     OUT                  folder for logs and results                 (build/gpu)
#     PYTHON               interpreter                                 (python3)
#     MAMBA_SSM_SDIST      the source archive, or a folder that has it (benchmarks/, .mamba/)
#     MAMBA_SSM_PREBUILT   selective_scan_cuda.so of an earlier build, tried before building
#
# Every step has a time limit of its own. Exit status: 1 when a test or the benchmark failed, 2 without a GPU.

set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu}
export PYTHONPATH=$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
unset TRITON_INTERPRET NF_SCAN_BACKEND

check='import sys, torch
if not torch.cuda.is_available(): sys.exit("no CUDA device")
print(torch.cuda.get_device_name())'
if ! GPU=$("$PYTHON" -c "$check" 2>&1); then
    echo "benchmarks/gpu.sh cannot run: ${GPU##*$'\n'}" >&2
    exit 2
fi
GPU=${GPU##*$'\n'}
slug=$(tr '[:upper:]' '[:lower:]' <<<"$GPU" | tr -cs 'a-z0-9' '-' | sed 's/^-*//; s/-*$//')
mkdir -p "$OUT"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
echo "$GPU; logs and results in $OUT"

failed=0
summary=()

# finished NAME STATUS STARTED: one line of the summary.
finished() {
    local line="$1: exit $2, $((SECONDS - $3)) s"
    [ "$2" -eq 124 ] && line+=", stopped at its time limit"
    summary+=("$line")
    echo "$line"
}

# step NAME LOG SECONDS SIGNAL COMMAND...: output is added to $OUT/LOG.log; returns the command's status.
step() {
    local name=$1 log=$2 limit=$3 signal=$4 started=$SECONDS status
    shift 4
    timeout --signal="$signal" --kill-after=15 "$limit" "$@" >>"$OUT/$log.log" 2>&1
    status=$?
    finished "$name" "$status" "$started"
    return "$status"
}

rm -f "$OUT"/{tests,mamba_ssm,scan,mean,profile}.log

# ---------------------------------------------------------------------- mamba_ssm, built while the tests run
builder=""
profiled=(triton)
if ! "$PYTHON" -c 'import mamba_ssm.ops.selective_scan_interface' 2>/dev/null; then
    sdist=${MAMBA_SSM_SDIST:-}
    if [ ! -f "$sdist" ]; then
        # shellcheck disable=SC2086  # two folders when none is named
        sdist=$(find ${sdist:-benchmarks .mamba} -maxdepth 1 -name 'mamba_ssm-*.tar.gz' 2>/dev/null | sort | tail -n 1)
    fi
    if [ -n "$sdist" ]; then
        timeout --kill-after=10 150 "$PYTHON" benchmarks/build_mamba_ssm.py --sdist "$sdist" \
            --out "$scratch/mamba" ${MAMBA_SSM_PREBUILT:+--prebuilt "$MAMBA_SSM_PREBUILT"} \
            >"$OUT/mamba_ssm.log" 2>&1 &
        builder=$!
    else
        summary+=("mamba_ssm: not measured, no mamba_ssm-*.tar.gz in ${MAMBA_SSM_SDIST:-benchmarks/ or .mamba/}")
    fi
fi

# ------------------------------------- the benchmark's kernels, compiled into Triton's cache beside the tests
warming=()
for shape in v1 multi local length; do
    timeout --kill-after=10 180 "$PYTHON" benchmarks/scan.py --device cuda --backends triton --shapes "$shape" \
        >/dev/null 2>&1 &
    warming+=($!)
done

# ------------------------------------------------------------------------------------------------- the tests
parallel=()
"$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n $(($(nproc) > 31 ? 16 : ($(nproc) + 1) / 2)))
step tests tests 190 TERM "$PYTHON" -m pytest -q -p no:cacheprovider "${parallel[@]}" \
    tests/test_triton.py || failed=1
wait "${warming[@]}"  # their results are not used

if [ -n "$builder" ]; then
    wait "$builder"
    status=$?
    summary+=("mamba_ssm: exit $status: $(tail -n 1 "$OUT/mamba_ssm.log" | cut -c 1-200)")
    if [ "$status" -eq 0 ]; then
        export PYTHONPATH="$scratch/mamba:$PYTHONPATH"
        profiled+=(mamba_ssm)
        if ! grep -q '^uses ' "$OUT/mamba_ssm.log"; then
            cp "$scratch/mamba/selective_scan_cuda.so" "$OUT/"
        fi
    fi
fi

# --------------------------------------------------------------------------------- benchmark, then profiles
# An interrupt makes the benchmark print what it has.
step scan scan 180 INT "$PYTHON" benchmarks/scan.py --device cuda --out "$OUT/scan-$slug.json" \
    --figure "$OUT/scan_gpu.png" || failed=1
step mean mean 40 TERM "$PYTHON" - <<'PY' || failed=1
import common, torch
from nfhelpers.images import grid_coords
from nfhelpers.models import load_model
from nfhelpers.samplers import posterior_mean

model, asked = load_model("checkpoints/field-photos").cuda(), grid_coords(256, 256)[None].cuda()
given = grid_coords(32, 32)[torch.randperm(1024)[:205]][None].cuda()
values = torch.zeros(1, 205, 3, device="cuda")
run = lambda: posterior_mean(model, asked, given, values, footprint=1 / 256)
for dtype in (torch.float32, torch.bfloat16):
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.bfloat16):
        milliseconds = 1e3 * common.best_seconds(run, torch.device("cuda"))
    print(f"a 256 px posterior mean of field-photos, {dtype}: {milliseconds:.1f} ms (target: <= 35)")
PY
step profile profile 25 TERM "$PYTHON" benchmarks/scan.py --profile table --backends "${profiled[@]}"
if command -v ncu >/dev/null; then
    step ncu profile 30 TERM ncu --clock-control none --profile-from-start off --launch-count 2 \
        --kernel-name 'regex:^(forward|backward)_kernel' --print-details all --section SpeedOfLight \
        --section ComputeWorkloadAnalysis --section Occupancy --section LaunchStats --section WarpStateStats \
        "$PYTHON" benchmarks/scan.py --profile ncu --backends triton
else
    summary+=("ncu: not on this machine")
fi

# ----------------------------------------------------- the end of the output is what a reader may only see
show='Duration|Registers Per Thread|Local Memory Spilling|Achieved Occupancy|Issue Slots Busy|pipe_xu'
show+='|(Compute \(SM\)|DRAM|L1/TEX Cache) Throughput|Executed Ipc Active|_kernel.*Context'
grep -hE "^(FAILED|ERROR)" "$OUT/tests.log" | head -n 15 | cut -c 1-150
tail -n 1 "$OUT/tests.log"
grep -E "kernels of one|^ +[0-9.]+ +[0-9]+  |$show" "$OUT/profile.log" | cut -c 1-100
cat "$OUT/scan.log"
tail -n 2 "$OUT/mean.log"
printf '%s\n' "" "$GPU" "${summary[@]}"
exit "$failed"
