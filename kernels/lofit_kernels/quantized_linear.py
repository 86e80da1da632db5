"""y = x W^T + c and dz = G W with a frozen weight, both computed in 8 bits.

    y[t, n]  = s_t s_n sum_k q_x[t, k] q_W[n, k] + c[n]      s_t = max_k |x[t, k]| / top    s_n = max_k |W[n, k]| / top
    dz[t, k] = r_t r_k sum_n q_G[t, n] q_V[n, k]             r_t = max_n |G[t, n]| / top    r_k = max_n |W[n, k]| / top

The weight is quantized once for each direction, when it is first asked for. Rounding and scaling are plain operations,
which a compiler fuses with their neighbours; the product is one op that finds the packed weight by a number.

A few columns of x can be left out of y's product in 8 bits and multiplied in float32: those whose magnitudes set s_t.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lofit_kernels.eager_scopes import as_written, autocast_is_on, once
from lofit_kernels.held_weight import HeldWeight, held_weight
from lofit_kernels.product_kinds import KINDS, ProductKind


class FullColumns:
    """Columns of x (T, K) that are multiplied in full. Linears that read one x share it: x is then rounded once.

    kept: (C,) int64, which. rest: (K,) float32, 0 in these columns and 1 in all others.
    """

    def __init__(self, kept: Tensor, width: int) -> None:
        self.kept = nn.Parameter(kept, requires_grad=False)
        ones = torch.ones(width, device=kept.device, dtype=torch.float32)
        self.rest = nn.Parameter(ones.index_fill_(0, kept, 0), requires_grad=False)


class FrozenWeight(HeldWeight):
    """A weight (N, K), quantized for both directions, see `HeldWeight`.

    columns: those of x that y takes in full, by `thin`, (C, N) float32; None for none.
    y_scales: (N,), z_scales: (K,) float32 on the weight's device, or None where the product itself multiplies by them.
    All are parameters, whose shapes a compiler takes for constants.
    """

    done, scope = "quantized", "the scope of frozen_products"

    def __init__(self, weight: nn.Parameter, kind: ProductKind, columns: FullColumns | None = None) -> None:
        self.kind, self.columns = kind.name, columns
        self.y_scales = self.z_scales = self.thin = None
        if columns is not None:
            thin = weight.detach()[:, columns.kept].t().float().contiguous()
            self.thin = nn.Parameter(thin, requires_grad=False)
        if not kind.scales_weights:
            self.y_scales, self.z_scales = (
                nn.Parameter(weight_scales(self._multiplied(weight, backward), kind), requires_grad=False)
                for backward in (False, True)
            )
        self._copies: list[FrozenWeight] = []
        super().__init__(weight)

    def is_used(self) -> bool:
        """Whether a layout, scales or columns of the weight are kept."""
        return super().is_used() or self.y_scales is not None or self.thin is not None

    def pack(self, backward: bool) -> tuple[Tensor, ...]:
        """What the kind's `run` multiplies by."""
        kind, weight = KINDS[self.kind], self._multiplied(self.weight, backward)
        scales = weight_scales(weight, kind)
        return kind.pack(quantized_weight(weight, scales, kind), scales)

    def _multiplied(self, weight: Tensor, backward: bool) -> Tensor:
        """What a direction multiplies by in 8 bits, a row per output: W without its columns in full, or W^T."""
        weight = weight.detach()
        if backward:
            return weight.t()
        return weight if self.columns is None else weight.index_fill(1, self.columns.kept, 0)

    def close(self) -> None:
        """Forget the packed weights, those of copies too: what computes with them afterwards is refused."""
        super().close()
        for copied in self._copies:
            copied.close()

    def __deepcopy__(self, memo: dict) -> FrozenWeight:
        # a copied model has weights of its own, which may be given other numbers
        columns = None if self.columns is None else copy.deepcopy(self.columns, memo)
        self._copies.append(FrozenWeight(copy.deepcopy(self.weight, memo), KINDS[self.kind], columns))
        return self._copies[-1]

    def __reduce__(self) -> tuple:
        # its number means nothing in another process, or another weight
        raise TypeError(
            f"expected to pickle a model as it was loaded, got one whose weights are {self.done}: save it after "
            f"{self.scope}, or save its state_dict"
        )


def weight_scales(weight: Tensor, kind: ProductKind) -> Tensor:
    """s of every row of a weight (N, K): (N,) float32."""
    return weight.abs().amax(1).float().clamp_min(1e-30) / kind.weight_top


def quantized_weight(weight: Tensor, scales: Tensor, kind: ProductKind) -> Tensor:
    """The rows of a weight (N, K) divided by their scales (N,), in the kind's dtype."""
    scaled = weight.float() / scales[:, None]
    scaled = scaled.clamp(-kind.weight_top, kind.weight_top)
    return (scaled if kind.weights.is_floating_point else scaled.round()).to(kind.weights)


def quantized_linear(x: Tensor, weight: FrozenWeight, shift: Tensor | None = None) -> Tensor:
    """y = x W^T + c in 8 bits. x: (..., K); shift: c (N,) or None. Returns (..., N) in x's dtype, or in autocast's.

    Gradients flow to x, in 8 bits too, and to shift, in full. Nothing is saved for backward.
    """
    dtype = torch.get_autocast_dtype(x.device.type) if autocast_is_on(x) else x.dtype
    N, K = weight.weight.shape
    about = (weight.kind, N, K, dtype)
    columns = weight.columns
    full = (None, None, None) if columns is None else (columns.kept, columns.rest, weight.thin)
    y = _Product.apply(x.reshape(-1, K), shift, weight.key, weight.y_scales, weight.z_scales, *full, about)
    return y.view(*x.shape[:-1], N)


class _Product(torch.autograd.Function):
    """`quantized_linear` of x (T, K), with the tensors of its weight. about: (kind, N, K, dtype of y)."""

    @staticmethod
    def forward(ctx, x, shift, key, y_scales, z_scales, kept, rest, thin, about):
        """y (T, N)."""
        kind, N, _, dtype = about
        ctx.save_for_backward(key, z_scales)
        ctx.about, ctx.x_dtype, ctx.shift_dtype = about, x.dtype, None if shift is None else shift.dtype
        y = _product(x, key, y_scales, (kind, N, False), None if kept is None else (kept, rest, thin))
        y = y if shift is None else y + shift
        return y.to(dtype)

    @staticmethod
    @once
    def backward(ctx, grad):
        """The gradients of x and shift that are needed."""
        key, z_scales = ctx.saved_tensors
        kind, _, K, _ = ctx.about
        dx = d_shift = None
        if ctx.needs_input_grad[0]:
            dx = _product(grad, key, z_scales, (kind, K, True)).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            d_shift = grad.sum(0, dtype=torch.float32).to(ctx.shift_dtype)
        return dx, d_shift, *[None] * 7


def _product(
    x: Tensor,
    key: Tensor,
    scales: Tensor | None,
    about: tuple[str, int, bool],
    full: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """x (T, K) times the weight behind the key: (T, N) float32. about: (kind, N, backward).

    full: the columns in full, (kept, rest, thin), of a `FullColumns` and a `FrozenWeight`; None for none.
    """
    kind, (name, outputs, backward) = KINDS[about[0]], about
    # dynamo loses track of a tensor that a cast returns as it is
    x = x if x.dtype == torch.float32 else x.float()
    rows, row_scales = kind.quantize(x if full is None else x * full[1])
    y = torch.ops.lofit.frozen_product(rows, key, outputs, backward, name)
    # in place, since nobody else has it
    y = (y if kind.scales_weights else y * scales).mul_(row_scales)
    if full is None:
        return y
    kept, _, thin = full
    return as_written(x, torch.addmm, y, x.index_select(1, kept), thin)


_library = torch.library.Library("lofit", "FRAGMENT")
_library.define("frozen_product(Tensor rows, Tensor key, int outputs, bool backward, str kind) -> Tensor")


def _frozen_product(rows: Tensor, key: Tensor, outputs: int, backward: bool, kind: str) -> Tensor:
    packed = held_weight(key).packed(backward)
    if not len(rows):
        return rows.new_empty(0, outputs, dtype=KINDS[kind].accumulators)
    return as_written(rows, KINDS[kind].run, rows.contiguous(), *packed)


def _frozen_product_fake(rows: Tensor, key: Tensor, outputs: int, backward: bool, kind: str) -> Tensor:
    return rows.new_empty(rows.shape[0], outputs, dtype=KINDS[kind].accumulators)


# the key is on the CPU whatever the rows are on
for _device in ("CPU", "CUDA"):
    _library.impl("frozen_product", _frozen_product, _device)
torch.library.register_fake("lofit::frozen_product", _frozen_product_fake, lib=_library)
