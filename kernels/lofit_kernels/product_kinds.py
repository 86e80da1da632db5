"""How a product with a frozen weight may be computed in 8 bits, and where: one row per kind, and what tries it.

    x W^T = s_t s_n (q_x - zero) q_W^T    x: (T, K)    W: (N, K)    s_t: per row of x    s_n: per row of W

A row of either operand is scaled so that its largest magnitude becomes `top`; the products are exact in int32 (float32
for fp8), so that rounding the operands is the only error.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# what the rows of a narrow product are filled up to: torch._int_mm takes more than 16
_LEAST_ROWS = 32


@dataclass(frozen=True)
class ProductKind:
    """One way to compute a product in 8 bits.

    name: of the row. rows, row_top, zero: dtype, largest magnitude and zero point of quantized activations.
    weights, weight_top: of quantized weights. multiple: what T, K and N of a product must be divisible by, T aside.
    accumulators: what `run` returns. scales_weights: whether it has multiplied by the weights' scales.
    pack: quantized (N, K) and scales (N,) -> what `run` multiplies by. run: rows (T, K) and that -> (T, N).
    """

    name: str
    rows: torch.dtype
    row_top: float
    zero: int
    quantize: Callable[[Tensor], tuple[Tensor, Tensor]]
    weights: torch.dtype
    weight_top: float
    multiple: int
    accumulators: torch.dtype
    scales_weights: bool
    pack: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    run: Callable[..., Tensor]


# numbers in their code are constants to torch.compile, where those of a row would become inputs of the graph; what is
# written in place is their own, and saves eager mode a pass each
def _unsigned_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    top = _largest(x)
    return (x * (127.0 / top)).round_().add_(128.0).to(torch.uint8), top * (1 / 127.0)


def _signed_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    top = _largest(x)
    return (x * (127.0 / top)).round_().to(torch.int8), top * (1 / 127.0)


def _float8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    top = _largest(x)
    return (x * (448.0 / top)).clamp_(-448.0, 448.0).to(torch.float8_e4m3fn), top * (1 / 448.0)


def _largest(x: Tensor) -> Tensor:
    # the reciprocal of a row of zeros must be finite
    return x.abs().amax(-1, keepdim=True).clamp_min(1e-30)


def _onednn_pack(weight: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
    zeros = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
    # what is packed goes to the very op that packs: no other reads its layout
    return torch.ops.onednn.qlinear_prepack(weight.contiguous(), None), scales.contiguous(), zeros


def _onednn_run(rows: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    # input scale 1 and zero point 128, no bias, output scale 1 and zero point 0, no operation after it
    after = (None, 1.0, 0, torch.float32, "none", [], "")
    return torch.ops.onednn.qlinear_pointwise(rows, 1.0, 128, packed, scales, zeros, *after)


def _int_mm_run(rows: Tensor, weight: Tensor) -> Tensor:
    T = len(rows)
    if T < _LEAST_ROWS:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, _LEAST_ROWS - T))
    return torch._int_mm(rows, weight.t())[:T]


def _scaled_mm_run(rows: Tensor, weight: Tensor, one: Tensor) -> Tensor:
    return torch._scaled_mm(rows, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)


def _plain_pack(weight: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
    return (weight.contiguous(),)


def _scaled_pack(weight: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
    return weight.contiguous(), scales.new_ones(())


# a processor without VNNI adds two products of 8 bits in 16 before it goes on, and saturates: 2 * 255 * 64 fits, and
# 2 * 255 * 127 does not. weights get the short side: their rows have fewer outliers than those of activations
_ON_CPU = {"rows": torch.uint8, "row_top": 127.0, "zero": 128, "quantize": _unsigned_rows}
_ON_CPU |= {"weights": torch.int8, "multiple": 1}
_ON_CPU |= {"scales_weights": True, "accumulators": torch.float32, "pack": _onednn_pack, "run": _onednn_run}
_ON_GPU = {"rows": torch.int8, "row_top": 127.0, "zero": 0, "quantize": _signed_rows}
_ON_GPU |= {"weights": torch.int8, "multiple": 8, "accumulators": torch.int32, "scales_weights": False}
_ON_GPU |= {"pack": _plain_pack, "run": _int_mm_run}
_FP8 = torch.float8_e4m3fn
_IN_FP8 = {"rows": _FP8, "row_top": 448.0, "zero": 0, "quantize": _float8_rows}
_IN_FP8 |= {"weights": _FP8, "multiple": 16, "accumulators": torch.float32, "scales_weights": False}
_IN_FP8 |= {"pack": _scaled_pack, "run": _scaled_mm_run}
KINDS = {
    kind.name: kind
    for kind in (
        ProductKind("onednn", weight_top=127.0, **_ON_CPU),
        ProductKind("onednn_pairs", weight_top=64.0, **_ON_CPU),
        ProductKind("int_mm", weight_top=127.0, **_ON_GPU),
        ProductKind("scaled_mm", weight_top=448.0, **_IN_FP8),
    )
}
# (device, precision) -> compute capability from which it is there
_CAPABILITIES = {"int8": (8, 0), "fp8": (8, 9)}


def kind_for(precision: str, device: torch.device) -> ProductKind:
    """The kind of "int8" or "fp8" on a device, tried there.

    Raises ValueError where device, processor or torch has no such product, or computes a wrong one.
    """
    if device.type == "cpu":
        kind = _cpu_kind(precision)
    elif device.type == "cuda":
        kind = _cuda_kind(precision, device)
    else:
        raise ValueError(f"{precision} products with frozen weights are known on CPUs and CUDA devices, got {device}")
    if error := trial_error(kind, device):
        raise ValueError(f"{precision} products cannot be used here: {error}")
    return kind


def is_fast_on_cpu() -> bool:
    """Whether int8 products are known to be faster than float32 ones on this processor: oneDNN's, from AVX2 on."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and _has_onednn() and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def trial_error(kind: ProductKind, device: torch.device) -> str | None:
    """What a kind computes wrong in a product of the largest and of random operands; None where it is right."""
    # whatever the default device is
    how = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float32, "device": "cpu"}
    shape = (kind.multiple * 5, kind.multiple * 37 + 32 * (kind.multiple == 1), kind.multiple * 3)
    N, K, T = shape[0], shape[1], shape[2]
    rows = torch.randint(-int(kind.row_top), int(kind.row_top) + 1, (T, K), **how)
    weight = torch.randint(-int(kind.weight_top), int(kind.weight_top) + 1, (N, K), **how)
    # the largest sums of either sign
    rows[0], rows[1] = kind.row_top, -kind.row_top
    weight[0], weight[1] = kind.weight_top, -kind.weight_top
    rows, weight = (rows + kind.zero).to(kind.rows), weight.to(kind.weights)
    exact = (rows.double() - kind.zero) @ weight.double().t()
    try:
        packed = kind.pack(weight.to(device), torch.ones(N, device=device, dtype=torch.float32))
        got = kind.run(rows.to(device), *packed).double().cpu()
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return f"{kind.name} failed: {str(error).splitlines()[0]}"
    # one rounding of a float32 result; tensor cores add products of fp8 with fewer bits than float32 has
    allowed = 2**-10 if kind.rows.is_floating_point else 2**-23
    if (got - exact).abs().max() <= exact.abs().max() * allowed:
        return None
    return (
        f"{kind.name} computes a wrong product: the largest error is {(got - exact).abs().max():.3g} where the largest "
        f"result is {exact.abs().max():.3g}"
    )


def _cpu_kind(precision: str) -> ProductKind:
    if precision == "fp8":
        raise ValueError("fp8 products are for GPUs: a CPU has none, use frozen_products='int8'")
    if not _has_onednn():
        raise ValueError("int8 products on a CPU are oneDNN's, which this torch has been built without")
    vnni = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
    return KINDS["onednn" if vnni() else "onednn_pairs"]


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")


def _cuda_kind(precision: str, device: torch.device) -> ProductKind:
    needed, found = _CAPABILITIES[precision], torch.cuda.get_device_capability(device)
    if torch.version.hip is not None:
        raise ValueError(f"{precision} products with frozen weights are known on NVIDIA's GPUs, got one of AMD's")
    if found < needed:
        raise ValueError(f"{precision} products take compute capability {needed}, got {found} on {device}")
    return KINDS["int_mm" if precision == "int8" else "scaled_mm"]
