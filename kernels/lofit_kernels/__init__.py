"""The LoFiT op: scale and offset vectors on attention heads, inside the output projection.

    y = ((1 + a) * z + v) W^T + b

Knows torch and, on a GPU, Triton; knows nothing of models or trainers.
"""

from lofit_kernels.dispatch import Plan, plan
from lofit_kernels.functional import fold_offset, fold_offsets, head_affine, head_affine_linear, head_index

__all__ = ["Plan", "fold_offset", "fold_offsets", "head_affine", "head_affine_linear", "head_index", "plan"]
