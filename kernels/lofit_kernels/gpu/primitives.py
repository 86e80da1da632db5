"""The Triton primitives, under the names and signatures of `lofit_kernels.aten`, and the products that fuse them."""

from lofit_kernels.gpu.affine import affine_bwd, affine_delta_fwd, affine_fwd
from lofit_kernels.gpu.linear_backward import affine_linear_bwd
from lofit_kernels.gpu.linear_forward import delta_linear, prologue_linear
from lofit_kernels.gpu.offset import column_sum, offset_bwd, offset_fold
from lofit_kernels.gpu.offset_grouped import grouped_bwd, grouped_fold, layer_table

__all__ = [
    "affine_bwd",
    "affine_delta_fwd",
    "affine_fwd",
    "affine_linear_bwd",
    "column_sum",
    "delta_linear",
    "grouped_bwd",
    "grouped_fold",
    "layer_table",
    "offset_bwd",
    "offset_fold",
    "prologue_linear",
]
