#!/bin/bash
# Call 3 (595 s): the flow on photographs, whole steps, latents; I = folder of phase 1 (/tmp/ae/phase1 while warm).
export PYTHONPATH=$PWD:$PWD/.gpu/ae/site PYTHONUNBUFFERED=1
[ -e /tmp/ae/windows.npz ] || python3 .gpu/ae/prep.py || exit 1
timeout -s INT 580 python3 benchmarks/autoencoder.py photos --data /tmp/ae/windows.npz:0.9 photos:0.1 --init ${I:-/tmp/ae/phase1} \
    --out /tmp/ae/diffae-photos --seconds 0 ${S:-190 60 40} >$OUT/photos.log 2>&1
for f in diffae-photos diffae-photos-latent; do mkdir -p $OUT/$f; cp /tmp/ae/$f/*.* $OUT/$f/; done; tail -n 50 $OUT/photos.log
