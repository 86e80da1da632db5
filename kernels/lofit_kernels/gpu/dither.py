"""Rounding up or down by a fixed pattern, so that what is too small for 16 bits acts on the average."""

from __future__ import annotations

import triton
import triton.language as tl

from lofit_kernels.gpu.launch import round_to


@triton.jit
def dither_to(value, z, columns, dtype: tl.constexpr):
    """value, float32, rounded to `dtype`: up with the share of the gap that it has come, by a hash of (z, column)

    See `lofit_kernels.aten.dithered`, the same bit for bit. z, of `dtype`, is what value was made of: a token's numbers
    depend on that token alone. What `dtype` can hold is left as it is.
    """
    # mantissa bits of float32 that dtype lacks
    LACKS: tl.constexpr = 16 if dtype == tl.bfloat16 else 13
    KEPT: tl.constexpr = -65536 if dtype == tl.bfloat16 else -8192
    mixed = (z.to(tl.float32).to(tl.int32, bitcast=True) >> LACKS) * -1640531535 + columns * -2048144777
    mixed = (mixed ^ ((mixed >> 15) & 0x1FFFF)) * -1028477379
    raised = value.to(tl.int32, bitcast=True) + ((mixed >> (32 - LACKS)) & ~KEPT)
    # NaN would be raised beyond its exponent
    rounded = tl.where(value == value, (raised & KEPT).to(tl.float32, bitcast=True), value)
    return round_to(rounded, dtype)
