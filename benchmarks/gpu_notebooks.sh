#!/usr/bin/env bash
# Runs the notebooks on a GPU box that may have no network, one after the other, and collects what they made:
#
#     bash benchmarks/gpu_notebooks.sh                      all of them
#     SLICE=570 bash benchmarks/gpu_notebooks.sh 01 02 03   these, in at most 570 s; the next call goes on
#
# What the box lacks lies in .gpu/ (benchmarks/gpu_pack.sh): wheels are unpacked into .gpu/site, checkpoints and data
# put where notebooks look for them. A notebook that fails is said at once, kept as far as it came, and the next one
# runs. One that ended well leaves a mark in build/notebooks and is passed over by the next call.
#
#     OUT      folder of log.txt (seconds and GPU memory of each notebook) and notebooks.tar.gz, executed notebooks
#              and figures, in parts of 16 MiB where it is larger    (build/gpu)
#     LIMIT    seconds for a notebook                                (420)
#     SLICE    seconds for the call                                  (no limit)
#     NEED     seconds of it that must be left to start a notebook   (200)
#     NF_PRESET                                                      (auto)
#     PYTHON   interpreter                                           (.venv/bin/python, else python3)
#
# Exit status: 0 all ended well, 1 one failed, 75 the slice is over.

set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
OUT=${OUT:-build/gpu}
LIMIT=${LIMIT:-420}
SLICE=${SLICE:-1000000}
NEED=${NEED:-200}
mkdir -p "$OUT" build/notebooks
OUT=$(cd "$OUT" && pwd)
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

if compgen -G '.gpu/*/wheels/*.whl' >/dev/null; then
    if ! "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target .gpu/site .gpu/*/wheels/*.whl; then
        echo "the wheels cannot be installed" >&2
        exit 2
    fi
    export PYTHONPATH=$PWD:$PWD/.gpu/site JUPYTER_PATH=$PWD/.gpu/site/share/jupyter
fi
for folder in .gpu/*/checkpoints/*/; do
    if [ -d "$folder" ] && [ ! -f "checkpoints/$(basename "$folder")/model.safetensors" ]; then
        mkdir -p checkpoints && cp -r "$folder" checkpoints/
    fi
done
if compgen -G '.gpu/*/data/*' >/dev/null; then
    mkdir -p .gpu/data
    for path in .gpu/*/data/*; do ln -sfn "$PWD/$path" ".gpu/data/$(basename "$path")"; done
    export NF_DATA=$PWD/.gpu/data
fi

# say LINE: to the screen and the log.
say() { echo "$*" | tee -a build/notebooks/log.txt; }

# collect: everything that was made so far.
collect() {
    cp build/notebooks/log.txt "$OUT/"
    rm -f "$OUT"/notebooks.tar.gz*
    tar -czf "$OUT/notebooks.tar.gz" --exclude '*.html' build/notebooks $([ -d build/figures ] && echo build/figures)
    if [ "$(stat -c %s "$OUT/notebooks.tar.gz")" -gt $((16 << 20)) ]; then
        split --bytes=16000000 --numeric-suffixes "$OUT/notebooks.tar.gz" "$OUT/notebooks.tar.gz."
        rm "$OUT/notebooks.tar.gz" # cat notebooks.tar.gz.* | tar -xz
    fi
}

"$PYTHON" -c 'import platform, torch
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"{gpu}, Python {platform.python_version()}, torch {torch.__version__}")' | tee -a build/notebooks/log.txt
[ $# -eq 0 ] && set -- 01 02 03 04 05 06 07
failed=0
for number in "$@"; do
    name=$(basename notebooks/"$number"_*.ipynb)
    left=$((SLICE - SECONDS))
    [ -e "build/notebooks/$name.done" ] && continue
    if [ "$left" -lt "$NEED" ]; then
        say "$name: the slice is over; call again to go on"
        collect
        exit 75
    fi
    limit=$((left < LIMIT ? left - 20 : LIMIT))
    timeout --kill-after=10 "$limit" "$PYTHON" notebooks/run_all.py "$name" --timeout $((limit - 15)) \
        >build/notebooks/"$name".log 2>&1
    status=$?
    say "$(grep -E "^$name (ok|FAILED)" build/notebooks/"$name".log || echo "$name ended with exit status $status")"
    if [ "$status" -eq 0 ]; then
        touch "build/notebooks/$name.done"
    else
        failed=1
        tail -n 25 build/notebooks/"$name".log | sed 's/\x1b\[[0-9;]*m//g' | cut -c 1-200
    fi
    collect
done
say "$SECONDS s in all"
collect
exit "$failed"
