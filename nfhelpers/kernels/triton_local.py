"""The windowed scan of local_scan.py in Triton: the step of a pixel, or the pixel of a step, by divisions."""

import torch
import triton
import triton.language as tl

TILE = 4096  # tokens x channels that a program moves


@triton.jit(do_not_specialize=["height", "width", "tall", "wide", "band"])
def local_scan_kernel(
    source_ptr, target_ptr, length, channels, height, width, tall, wide, band,
    source_b, source_c, source_l, target_b, target_c, target_l,
    REVERSE: tl.constexpr, FLIP: tl.constexpr, COLUMN_FIRST: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    # One program fills BLOCK_L tokens of the target, in the order of its memory, times BLOCK_C channels.
    # (height, width) is the grid as it is walked, transposed if COLUMN_FIRST; tall x wide a whole window.
    blocks_l = tl.cdiv(length, BLOCK_L)
    blocks_c = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    token = program % blocks_l * BLOCK_L + tl.arange(0, BLOCK_L)
    c = program // blocks_l % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    b = (program // blocks_l // blocks_c).to(tl.int64)

    at = tl.minimum(token, length - 1)  # a position that exists, so that no window is empty
    if REVERSE:  # from pixel to step
        r = at % height if COLUMN_FIRST else at // width
        q = at // height if COLUMN_FIRST else at % width
        i, j = r // tall, q // wide
        h = tl.minimum(height - i * tall, tall)
        w = tl.minimum(width - j * wide, wide)
        at = i * band + j * wide * h + (r - i * tall) * w + (q - j * wide)
        if FLIP:
            at = length - 1 - at
    else:  # from step to pixel
        if FLIP:
            at = length - 1 - at
        i = at // band
        at -= i * band
        h = tl.minimum(height - i * tall, tall)
        j = at // (h * wide)
        at -= j * (h * wide)
        w = tl.minimum(width - j * wide, wide)
        r, q = i * tall + at // w, j * wide + at % w
        at = q * height + r if COLUMN_FIRST else r * width + q

    if CHANNELS_LAST:  # the last dimension of a tile is the one side by side in memory
        at, token, c = at[:, None], token[:, None], c[None, :]
    else:
        at, token, c = at[None, :], token[None, :], c[:, None]
    mask = (token < length) & (c < channels)
    source_at = b * source_b + at.to(tl.int64) * source_l + c.to(tl.int64) * source_c
    target_at = b * target_b + token.to(tl.int64) * target_l + c.to(tl.int64) * target_c
    tl.store(target_ptr + target_at, tl.load(source_ptr + source_at, mask=mask), mask=mask)


def move(source, target, height, width, window, reverse, flip, column_first):
    """Tokens (B, C, L) of source, of an integer dtype, into target."""
    batch, channels, length = source.shape
    height, width = (width, height) if column_first else (height, width)
    tall, wide = min(window, height), min(window, width)
    channels_last = not target.is_contiguous()
    block_c, block_l = triton.next_power_of_2(channels), triton.next_power_of_2(length)
    if channels_last:  # 64 channels or 256 tokens side by side in memory, at most
        block_c = min(64, block_c)
        block_l = min(TILE // block_c, block_l)
    else:
        block_l = min(256, block_l)
        block_c = min(TILE // block_l, block_c)
    programs = batch * triton.cdiv(channels, block_c) * triton.cdiv(length, block_l)
    with torch.cuda.device_of(source):  # Triton launches on the current device
        local_scan_kernel[(programs,)](
            source, target, length, channels, height, width, tall, wide, tall * width,
            *source.stride(), *target.stride(), REVERSE=reverse, FLIP=flip, COLUMN_FIRST=column_first,
            CHANNELS_LAST=channels_last, BLOCK_C=block_c, BLOCK_L=block_l,
        )  # fmt: skip
