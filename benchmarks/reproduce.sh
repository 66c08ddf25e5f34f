#!/usr/bin/env bash
# Trains every model and writes every table of the README, on a GPU box, in one call or in slices:
#
#     bash benchmarks/reproduce.sh                        all stages, one after the other
#     SLICE=480 bash benchmarks/reproduce.sh              at most 8 minutes; the next call goes on
#     bash benchmarks/reproduce.sh train-v1 means-photos  these stages only
#     DRY=1 bash benchmarks/reproduce.sh                  print the commands
#
# Stages: train-v1, train-multidir, train-v2, train-field, train-diffae_phase1, train-diffae_phase2 (on phase 1),
# train-localmamba; then means-*, samples-* (posterior means and samples of all models), scales-photos, pca-* (the
# autoencoder), generated-* (LocalMamba); and scan, train-step, sampling.
# A stage that is done leaves a mark in $OUT/done and is passed over. A training is resumed at the step where it
# was stopped, by SLICE, Ctrl-C, SIGTERM or SIGKILL; the other stages take minutes and start again.
#
#     OUT       folder of runs, results and tables             (runs/reproduce/$PRESET)
#     PRESET    of presets.toml; smoke runs everything small    (full)
#     SLICE     seconds after which the call ends with exit status 75, "call again"; none: no limit
#     COMPILE   models to train with torch.compile, or all      (v1; none in smoke)
#     SET       settings of all trainings, such as "train.epochs=20 train.batch_size=128"
#     NF_DATA   folder of cifar-10-batches-bin and fsdd-recordings.zip (../shared/data if it is there; else
#               CIFAR-10 is downloaded)
#     DEVICE    cuda or cpu                                     (cuda where there is one)
#     PYTHON    interpreter                                     (.venv/bin/python, else python3)
#
# Precision is bf16 on a GPU, the scan is the fused one (`python -m nfhelpers doctor` says which).
# Exit status: 0 all is done, 1 a stage failed, 2 there is no such stage, 75 the slice is over.

set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
PRESET=${PRESET:-full}
OUT=${OUT:-runs/reproduce/$PRESET}
SLICE=${SLICE:-}
[ "$PRESET" = smoke ] && COMPILE=${COMPILE:-} || COMPILE=${COMPILE-v1}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if [ -z "${NF_DATA:-}" ] && [ -d ../shared/data/cifar-10-batches-bin ]; then
    NF_DATA=$(cd ../shared/data && pwd)
fi
[ -n "${NF_DATA:-}" ] && export NF_DATA
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
read -ra set <<<"${SET:-}"
device=()
[ -n "${DEVICE:-}" ] && device=(--device "$DEVICE")

sections=(v1 multidir v2 field diffae_phase1 diffae_phase2 localmamba)
fields=(v1 multidir v2 field)
if [ "$PRESET" = smoke ]; then
    sources=(photos) grids=(chirps --size 32) mean_images=2 images=2 steps=2 scales=(32 64) quick=(--quick)
else
    sources=(photos cifar10) grids=(fsdd --size 64) mean_images=64 images=16 steps=50
    scales=(32 64 96 128) quick=()
fi
# The autoencoder is shown the images that its phases were trained on.
pictures=${sources[-1]}
stages=("${sections[@]/#/train-}" "${sources[@]/#/means-}" "${sources[@]/#/samples-}" scales-photos
    "pca-$pictures" "generated-${grids[0]}" scan train-step sampling)
models=()
for name in "${fields[@]}"; do models+=("$OUT/$name/best"); done

# command_of STAGE: what to run, in the array `command`.
command_of() {
    local what=${1#*-} name
    local result=(--out "$OUT/results/$1.json")
    local folder=(--out "$OUT/results/$1")
    case $1 in
    train-step | sampling)
        command=("$PYTHON" "benchmarks/${1/-/_}.py" "${quick[@]}" "${device[@]}" "${result[@]}") ;;
    scan)
        command=("$PYTHON" benchmarks/scan.py "${quick[@]}" "${device[@]}" "${result[@]}" --figure "$OUT/scan.png") ;;
    train-*)
        command=("$PYTHON" -m nfhelpers train "$what" --preset "$PRESET" --output "$OUT/$what" "${device[@]}")
        [ "$what" = diffae_phase2 ] && command+=(--init "$OUT/diffae_phase1/best")
        for name in ${COMPILE/#all/${sections[*]}}; do
            [ "$name" = "$what" ] && command+=(--set train.compile=true)
        done
        for name in "${set[@]}"; do command+=(--set "$name"); done ;;
    means-*)
        command=("$PYTHON" -m nfhelpers evaluate "${models[@]}" --data "$what" --images "$mean_images" "${device[@]}"
            "${folder[@]}") ;;
    samples-*)
        command=("$PYTHON" -m nfhelpers evaluate "${models[@]}" --data "$what" --images "$images" --samplers heun
            --steps "$steps" "${device[@]}" "${folder[@]}") ;;
    scales-photos)
        command=("$PYTHON" -m nfhelpers evaluate "${models[@]}" --sizes "${scales[@]}" --images "$images"
            "${device[@]}" "${folder[@]}") ;;
    pca-*)
        command=("$PYTHON" benchmarks/diffae.py "$OUT/diffae_phase1/best" --data "$what" --images "$mean_images"
            "${device[@]}" "${result[@]}") ;;
    generated-*)
        command=("$PYTHON" benchmarks/localmamba.py generated "$OUT/localmamba/best" --data "${grids[@]}"
            --steps "$steps" --guidance 1 2.5 "${device[@]}" "${result[@]}") ;;
    esac
}

[ $# -eq 0 ] && set -- "${stages[@]}"
for stage in "$@"; do
    if [[ " ${stages[*]} " != *" $stage "* ]]; then
        echo "there is no stage $stage; stages are: ${stages[*]}" >&2
        exit 2
    fi
done

[ -n "${DRY:-}" ] || mkdir -p "$OUT/done" "$OUT/logs" "$OUT/tables"
first=1
for stage in "$@"; do
    command_of "$stage"
    if [ -n "${DRY:-}" ]; then
        printf '%q ' "${command[@]}"
        echo
        continue
    fi
    if [ -e "$OUT/done/$stage" ]; then
        echo "$stage: done before"
        continue
    fi
    limited=()
    if [ -n "$SLICE" ]; then
        left=$((SLICE - SECONDS))
        if [ "$left" -le 0 ]; then
            echo "$stage: the slice is over; call again to go on"
            exit 75
        fi
        # SIGTERM: a training saves its state; SIGKILL if it does not end by then.
        limited=(timeout --preserve-status --signal=TERM --kill-after=60 "$left")
    fi
    echo "$stage: ${command[*]}"
    started=$SECONDS
    "${limited[@]}" "${command[@]}" >"$OUT/tables/$stage.txt" 2> >(tee -a "$OUT/logs/$stage.log" >&2)
    status=$?
    echo "$stage: exit $status, $((SECONDS - started)) s"
    if [ "$status" -eq 0 ]; then
        cat "$OUT/tables/$stage.txt"
        touch "$OUT/done/$stage"
    elif [ -n "$SLICE" ] && [ "$status" -ge 137 ] && [ "$SECONDS" -ge "$SLICE" ]; then
        resumable=0
        [[ $stage = train-* && $stage != train-step ]] && resumable=1
        if [ "$first" -eq 1 ] && [ "$resumable" -eq 0 ]; then
            echo "$stage needs more than SLICE=$SLICE seconds: call again with more" >&2
            exit 1
        fi
        echo "$stage: the slice is over; call again to go on"
        exit 75
    else
        echo "$stage failed; $OUT/logs/$stage.log says why" >&2
        exit 1
    fi
    first=0
done
