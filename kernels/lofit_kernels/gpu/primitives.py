"""The Triton primitives, under the names and signatures of `lofit_kernels.aten`."""

from lofit_kernels.gpu.affine import affine_bwd, affine_delta_fwd, affine_fwd
from lofit_kernels.gpu.offset import column_sum, offset_bwd, offset_fold

__all__ = ["affine_bwd", "affine_delta_fwd", "affine_fwd", "column_sum", "offset_bwd", "offset_fold"]
