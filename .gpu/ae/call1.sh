#!/bin/bash
# Call 1 (two GPUs, 590 s at most): both CIFAR-10 autoencoders. carry: .gpu/ae
export PYTHONPATH=$PWD:$PWD/.gpu/ae/site PYTHONUNBUFFERED=1 S=${S:-380}
python3 .gpu/ae/prep.py || exit 1
one() { CUDA_VISIBLE_DEVICES=$1 timeout -s INT 570 python3 benchmarks/autoencoder.py cifar10 --data /tmp/ae/cifar.npz:1 \
    --out /tmp/ae/$2 --seconds $S 0 0 0 "${@:3}" >$OUT/$2.log 2>&1; mkdir -p $OUT/$2; cp /tmp/ae/$2/*.* $OUT/$2/; }
one 0 diffae-cifar10 & one 1 diffae-cifar10-128 --set '{"latent_dim": 128}' & 
wait; tail -n 30 $OUT/*.log
