#!/usr/bin/env bash
# Collects what a GPU box without a network lacks, to be carried there for benchmarks/gpu_notebooks.sh:
#
#     bash benchmarks/gpu_pack.sh        folders .gpu/1, .gpu/2 and .gpu/3, one for each call, and their sizes
#
# The box has Python 3.12, torch, triton and the usual scientific packages (BOX below); wheels of the rest, in the
# versions of constraints.txt, are in .gpu/1. Data and checkpoints lie with the notebooks that read them: 01 to 03
# in .gpu/1, 04 and 05 in .gpu/2, 06 and 07 in .gpu/3. Call them in this order while the box keeps its files, from a
# sparse checkout: git sparse-checkout set --no-cone '/*' '!/checkpoints/' '!/figures/'
#
#     PYTHON    an interpreter with pip                          (.venv/bin/python, else python3)
#     NF_DATA   folder of cifar-10-batches-bin and fsdd-recordings.zip   (../shared/data)

set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
data=${NF_DATA:-../shared/data}
# What nbclient, nbconvert, ipykernel, ipywidgets, pooch and soundfile need and the box has not; diffusers (notebook
# 07) goes with the third call. Without jedi and debugpy, 9 MiB, kernels run: nobody completes names or debugs there.
packages=(nbclient nbformat nbconvert ipykernel ipywidgets pooch soundfile
    jupyter_client jupyter_core platformdirs pyzmq tornado traitlets fastjsonschema jsonschema
    jsonschema-specifications referencing rpds-py beautifulsoup4 soupsieve bleach webencodings tinycss2 defusedxml
    jupyterlab_pygments mistune pandocfilters comm ipython ipython_pygments_lexers matplotlib-inline
    nest-asyncio2 pexpect ptyprocess prompt_toolkit wcwidth stack-data executing asttokens pure_eval
    widgetsnbextension jupyterlab_widgets cffi pycparser attrs psutil)
checkpoints_1=(v1-cifar10 multidir-cifar10)
checkpoints_2=(v2-cifar10 field-photos diffae-photos diffae-cifar10)
checkpoints_3=(diffae-cifar10-128 diffae-cifar10-128-latent localmamba-fsdd)

rm -rf .gpu
mkdir -p .gpu/{1,2,3}/{checkpoints,data} .gpu/1/wheels
platforms=(--platform manylinux2014_x86_64)
for glibc in 2_34 2_28 2_27 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
# wheels FOLDER NAME...: of the versions of constraints.txt.
wheels() {
    local folder=$1 name versions=()
    shift
    for name in "$@"; do versions+=("$(grep -i "^${name//[-_]/[-_]}==" constraints.txt)"); done
    "$PYTHON" -m pip --quiet --quiet download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" --dest "$folder" "${versions[@]}"
}
wheels .gpu/1/wheels "${packages[@]}"
wheels .gpu/3/wheels diffusers importlib_metadata
for call in 1 2 3; do
    names="checkpoints_$call[@]"
    for name in "${!names}"; do
        if [ -d "checkpoints/$name" ]; then
            cp -r "checkpoints/$name" ".gpu/$call/checkpoints/"
        else # a sparse checkout, so that they do not travel twice
            git archive HEAD "checkpoints/$name" | tar -x -C ".gpu/$call"
        fi
    done
done
cp -r "$data/cifar-10-batches-bin" .gpu/1/data/
cp "$data/fsdd-recordings.zip" .gpu/3/data/
tree=$(git ls-files -z | grep -zv '^checkpoints/\|^figures/' | xargs -0 -r du -ck --apparent-size | tail -n 1 | cut -f 1)
echo "working tree without checkpoints and figures: $((tree / 1024)) MiB"
du -sm --apparent-size .gpu/* .gpu/1/wheels .gpu/1/data
