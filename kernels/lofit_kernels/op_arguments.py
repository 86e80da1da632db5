"""The arguments of the projection, as one value, and its flat form for torch, which takes no dataclass in an op.

This is the only file that knows the order of the flat form.
"""

from typing import NamedTuple

from torch import Tensor

from lofit_kernels.answers import Path

AUTO = Path("auto", "auto", "auto")


# a tuple, since one is made in every forward and backward pass, where a frozen dataclass takes ten times as long
class Arguments(NamedTuple):
    """One projection y = ((1 + a) * z + v) W^T + b.

    z: (..., K), any float dtype; None in a backward pass that needs no activation. weight: (N, K) of z's dtype.
    bias: (N,) or None. scale, offset: (h, D) float32 (float64 when z is), or None; scale_heads, offset_heads: (h,)
    int64, the heads of their rows. folded: (N,), W v computed beforehand, in the dtype of the offset, or None.
    path: how to compute it; a part that is "auto" is still to be chosen.
    """

    z: Tensor | None
    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    scale_heads: Tensor | None
    offset: Tensor | None
    offset_heads: Tensor | None
    folded: Tensor | None
    path: Path = AUTO

    @property
    def head_dim(self) -> int:
        """D; 1 without any vectors, when no head is touched."""
        vectors = self.offset if self.scale is None else self.scale
        return 1 if vectors is None else vectors.shape[1]

    def leaves(self) -> tuple[Tensor | None, ...]:
        """What may want a gradient: (z, weight, bias, scale, offset, folded)."""
        z, weight, bias, scale, _, offset, _, folded, _ = self
        return z, weight, bias, scale, offset, folded

    def given(self) -> list[Tensor]:
        """Those of `leaves` that there are."""
        return [x for x in self.leaves() if x is not None]

    def flat(self) -> tuple[Tensor | str | None, ...]:
        """The flat form, the inputs of `ops.affine_linear`: eight tensors or None, then form, backend and gemm."""
        return (*self[:8], *self.path)

    @staticmethod
    def rebuilt(flat: tuple) -> "Arguments":
        """From the flat form."""
        return Arguments(*flat[:8], Path(*flat[8:]))

    def saved(self, keep_z: bool) -> tuple[Tensor | None, ...]:
        """What a backward pass reads, for `of_saved`: z, the only activation, where it is needed, and the rest."""
        z = self.z if keep_z else None
        return z, self.weight, self.bias, self.scale, self.scale_heads, self.offset, self.offset_heads

    @staticmethod
    def of_saved(saved: tuple[Tensor | None, ...], path: Path) -> "Arguments":
        """From what `saved` gave, and the path that the forward pass took."""
        return Arguments(*saved, None, path)

    @staticmethod
    def needed(asked: tuple[bool, ...], has_folded: bool) -> list[bool]:
        """Of (z, weight, bias, scale, offset, folded), which need a gradient, from `asked` of each input of the op.

        has_folded: the offset then gets none, since y depends on folded alone.
        """
        z, weight, bias, scale, _, offset, _, folded, *_ = asked
        return [z, weight, bias, scale, offset and not has_folded, folded]

    @staticmethod
    def placed(gradients: list[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The gradients of (z, weight, bias, scale, offset, folded) at their places in the flat form."""
        z, weight, bias, scale, offset, folded = gradients
        return z, weight, bias, scale, None, offset, None, folded
