#!/usr/bin/env bash
# Trains the weights in checkpoints/ anew, by their names, and writes every table of the README, on a GPU box, in one
# call or in slices:
#
#     bash benchmarks/reproduce.sh                               all stages, one after the other
#     SLICE=480 bash benchmarks/reproduce.sh                     at most 8 minutes; the next call goes on
#     bash benchmarks/reproduce.sh footing-v1 footing            these stages only
#     DRY=1 bash benchmarks/reproduce.sh                         print the commands
#
# Stages: train-NAME of folders in checkpoints/ (diffae-cifar10-128-latent comes with its autoencoder); footing-NAME,
# models of fields at equal seconds (v1-cifar10, multidir-cifar10 and v2-cifar10 of checkpoints/), with the table
# footing; then means-*, samples-* (posterior means and samples of all models of fields), scales-photos, pca-cifar10
# and drawn-cifar10 (autoencoders), generated-* (LocalMamba); scan, train-step, sampling; documents-NAME, at the
# design documents' sizes, with the table documents.
# A stage that is done leaves a mark in $OUT/done and is passed over. A training is resumed at the step where it
# was stopped, by SLICE, Ctrl-C, SIGTERM or SIGKILL; the other stages, flagships and autoencoders take minutes and
# start again.
#
#     OUT       folder of runs, results and tables             (runs/reproduce/$PRESET)
#     PRESET    full, or smoke: everything small, without flagships and autoencoders    (full)
#     SLICE     seconds after which the call ends with exit status 75, "call again"; none: no limit
#     SET       settings of all trainings but flagships and autoencoders, such as "train.epochs=20 train.batch_size=64"
#     NF_DATA   folder of cifar-10-batches-bin and fsdd-recordings.zip (../shared/data if it is there; else they
#               are downloaded)
#     CIFAR     source of the footing and the documents, such as an .npz          (cifar10)
#     WINDOWS   an .npz of photographs of 128 px beside the named source of flagships and autoencoders     (none)
#     LABELLED  an .npz of x_train and y_train for drawn-cifar10 in place of CIFAR-10's files              (none)
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
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if [ -z "${NF_DATA:-}" ] && [ -d ../shared/data/cifar-10-batches-bin ]; then
    NF_DATA=$(cd ../shared/data && pwd)
fi
[ -n "${NF_DATA:-}" ] && export NF_DATA
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
read -ra set <<<"${SET:-}"
device=()
[ -n "${DEVICE:-}" ] && device=(--device "$DEVICE")

# What the cards say, but for the preset: section of presets.toml, then settings.
declare -A recipes=(
    [localmamba-fsdd]="localmamba model.dims=[64,128,192] model.depths=[1,2,4] model.mlp_ratio=2.0
        model.mapping_width=128 train.epochs=80 train.learning_rate=1e-3"
)
names=(localmamba-fsdd)
declare -A mean_images
models=("$OUT"/footing/{v1,multidir,lightweight,v2}/best)
if [ "$PRESET" = smoke ]; then
    sources=(photos) grids=(chirps --size 32) mean_images=([photos]=2) images=2 steps=2 scales=(32 64) quick=(--quick) latent=()
else
    names+=(field-photos field-cifar10 diffae-photos diffae-cifar10 diffae-cifar10-128)
    latent=(pca-cifar10 drawn-cifar10)
    models+=("$OUT"/field-photos "$OUT"/field-cifar10)
    sources=(photos cifar10) grids=(fsdd --size 64) mean_images=([photos]=64 [cifar10]=517) images=16 steps=50
    scales=(32 64 96 128) quick=()
fi
footing=(v1 multidir lightweight v2 field) documents=(v1 multidir v2)
stages=("${names[@]/#/train-}" "${footing[@]/#/footing-}" footing "${sources[@]/#/means-}" "${sources[@]/#/samples-}"
    scales-photos "${latent[@]}" "generated-${grids[0]}" scan train-step sampling "${documents[@]/#/documents-}" documents)

# command_of STAGE: what to run, in the array `command`.
command_of() {
    local what=${1#*-} section settings word
    local result=(--out "$OUT/results/$1.json")
    local folder=(--out "$OUT/results/$1")
    case $1 in
    train-step | sampling)
        command=("$PYTHON" "benchmarks/${1/-/_}.py" "${quick[@]}" "${device[@]}" "${result[@]}") ;;
    scan)
        command=("$PYTHON" benchmarks/scan.py "${quick[@]}" "${device[@]}" "${result[@]}" --figure "$OUT/scan.png") ;;
    footing | documents)
        local -n made=$1
        command=("$PYTHON" benchmarks/footing.py)
        for word in "${made[@]}"; do # those that are trained
            [ -n "${DRY:-}" ] || [ -e "$OUT/$1/$word.json" ] && command+=("$OUT/$1/$word.json")
        done ;;
    footing-* | documents-*)
        command=("$PYTHON" benchmarks/footing.py "$what" --data "${CIFAR:-${sources[-1]}}" --out "$OUT/${1%%-*}")
        [[ $1 = documents-* ]] && command+=(--epochs 20 --preset full)
        [ "$PRESET" = smoke ] && command+=(--preset smoke --images 2 --seconds 1)
        for word in "${set[@]}"; do command+=(--set "$word"); done ;;
    train-field-* | train-diffae-*)
        command=("$PYTHON" benchmarks/flagship.py "$what" --out "$OUT/$what" --data)
        case $what in
        diffae-photos) command[1]=benchmarks/autoencoder.py command[2]=photos ;;
        diffae-*) command[1]=benchmarks/autoencoder.py command[2]=cifar10 ;;
        esac
        case $what${WINDOWS:+ with windows} in
        *-photos) command+=(photos:1) ;;
        *"-photos with windows") command+=("$WINDOWS:0.9" photos:0.1) ;;
        *"-cifar10"*" with windows") command+=(cifar10:0.7 "$WINDOWS:0.3") ;;
        *) command+=(cifar10:1) ;;
        esac
        [ "$what" = diffae-cifar10-128 ] && command+=(--set '{"latent_dim": 128}' --seconds 400 430 230 40
            --flow '{"width": 256, "depth": 4}')
        [ "$what" = field-cifar10 ] && command+=(--seconds 684 310) ;;
    train-*)
        read -r -d '' -a settings <<<"${recipes[$what]}"
        section=${settings[0]}
        command=("$PYTHON" -m nfhelpers train "$section" --preset "$PRESET" --output "$OUT/$what" "${device[@]}")
        [ "$PRESET" = smoke ] && settings=("$section")
        for word in "${settings[@]:1}" "${set[@]}"; do command+=(--set "$word"); done ;;
    means-*)
        command=("$PYTHON" -m nfhelpers evaluate "${models[@]}" --data "$what" --images "${mean_images[$what]}" "${device[@]}"
            "${folder[@]}") ;;
    samples-*)
        command=("$PYTHON" -m nfhelpers evaluate "${models[@]}" --data "$what" --images "$images" --samplers heun
            --steps "$steps" "${device[@]}" "${folder[@]}") ;;
    scales-photos)
        command=("$PYTHON" -m nfhelpers evaluate "${models[@]}" --sizes "${scales[@]}" --images "$images"
            "${device[@]}" "${folder[@]}") ;;
    pca-*)
        command=("$PYTHON" benchmarks/diffae.py "$OUT/diffae-cifar10" "$OUT/diffae-cifar10-128"
            --data "$what" --images "${mean_images[$what]}" "${device[@]}" "${result[@]}") ;;
    drawn-*)
        command=("$PYTHON" benchmarks/frechet.py "$OUT/diffae-cifar10-128" --flow "$OUT/diffae-cifar10-128-latent"
            --data "${LABELLED:-cifar10}" "${device[@]}" "${result[@]}") ;;
    generated-*)
        command=("$PYTHON" benchmarks/localmamba.py generated "$OUT/localmamba-fsdd/best" --data "${grids[@]}"
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
        [[ $stage = footing-* || $stage = documents-* ]] && resumable=1
        [[ $stage = train-* && $stage != train-step && $stage != train-field-* && $stage != train-diffae-* ]] && resumable=1
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
