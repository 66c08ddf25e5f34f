#!/bin/bash
# Call 2 (590 s): phase 1 on photographs; its model comes back and stays in /tmp/ae. carry: .gpu/ae
export PYTHONPATH=$PWD:$PWD/.gpu/ae/site PYTHONUNBUFFERED=1 S=${S:-340}
python3 .gpu/ae/prep.py || exit 1
CUDA_VISIBLE_DEVICES=0 timeout -s INT 575 python3 benchmarks/autoencoder.py photos --data /tmp/ae/windows.npz:0.9 photos:0.1 \
    --out /tmp/ae/phase1 --seconds $S 0 0 0 >$OUT/phase1.log 2>&1
mkdir -p $OUT/phase1; cp /tmp/ae/phase1/*.* $OUT/phase1/; tail -n 40 $OUT/phase1.log
