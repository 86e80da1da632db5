"""The public functions: validate, choose a path, call the op."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from lofit_kernels import compiled_cpu, ops
from lofit_kernels.answers import Path
from lofit_kernels.compiled_cpu import is_traced
from lofit_kernels.devices import unserved
from lofit_kernels.dispatch import Constants, Plan, added, has_answers, is_many, path_for, plan, plan_on
from lofit_kernels.eager_scopes import as_written, autocast_is_on
from lofit_kernels.op_arguments import Arguments
from lofit_kernels.projection import primitives

Heads = Tensor | Sequence[int] | None
# dtype of z and W -> that of the vectors beside them
_WIDE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


def head_affine_linear(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    scale_heads: Heads = None,
    offset: Tensor | None = None,
    offset_heads: Heads = None,
    folded: Tensor | None = None,
    form: str = "auto",
    backend: str = "auto",
    gemm: str = "auto",
) -> Tensor:
    """y = ((1 + a) * z + v) W^T + b, with a and v on the selected heads (LoFiT, arXiv:2406.01563, equations 3 and 4).

    z: (..., K), any strides, any number of rows, zero included. weight: (N, K), the frozen output projection.
    bias: (N,) in z's dtype or None. scale, offset: (h, D) float32 (float64 when z is), rows by ascending head, or None.
    scale_heads, offset_heads: the heads of those rows: ascending integers, or an int64 tensor (h,) made by
    `head_index`, whose values are trusted; None means every head.
    folded: (N,), W v computed beforehand, float32 (float64 when z is): of `fold_offsets`, and the gradient goes through
    it; or of `fold_offset`, to be reused in inference. The offset itself need not be given then, and gets no gradient;
    beside a weight that is trained either the offset must be given or folded must have a graph, and not both: W v is a
    part of that weight's gradient, once.
    form, backend, gemm: see `dispatch.py`; "auto" follows its table and what was measured on this device.

    Returns (..., N) in z's dtype. Gradients flow to every float input that asks; none is computed that does not.
    Saved for backward: nothing of z for an offset alone; z itself, never a copy, for a scale.
    Raises TypeError / ValueError naming what was got and what was expected.
    """
    autocast = autocast_is_on(z)
    if autocast or not _fits(z, weight, bias, scale, scale_heads, offset, offset_heads, folded):
        z, weight, bias = _autocast(z, weight, bias)
        scale_heads, offset_heads = _checked(z, weight, bias, scale, scale_heads, offset, offset_heads, folded)
    asked = Path(form, backend, gemm) if torch.compiler.is_compiling() else None
    constants = added(bias, offset, folded)
    if asked is not None:
        # the number of tokens may be a symbol there, which no measured answer can be looked up for
        path = _default(z, weight, scale, asked, constants).path
    else:
        T = 1 if scale is None else z.shape[:-1].numel()
        path = path_for(T, weight, scale, form, backend, gemm, *constants)
    if scale is None and offset is None and folded is None:
        return linear(z, weight, bias)
    arguments = Arguments(z, weight, bias, scale, scale_heads, offset, offset_heads, folded, path)
    if asked is not None:
        return _compiled(arguments, asked)
    if not autocast:
        return ops.eager_affine_linear(arguments)
    # what is computed in float32 is meant to be
    with torch.autocast(z.device.type, enabled=False):
        return ops.eager_affine_linear(arguments)


def _fits(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    scale_heads: Heads,
    offset: Tensor | None,
    offset_heads: Heads,
    folded: Tensor | None,
) -> bool:
    """Whether these are all that `_checked` asks for, and its result: only what is usual, and cheap to see."""
    shape, dtype, device = weight.shape, z.dtype, z.device
    if len(shape) != 2 or dtype != weight.dtype or dtype not in _WIDE or device != weight.device:
        return False
    N, K = shape
    if z.dim() < 1 or z.shape[-1] != K:
        return False
    if bias is not None and (bias.shape != (N,) or bias.dtype != dtype or bias.device != device):
        return False
    # what two of them have to say to each other is left to `_checked`
    if offset is not None and (scale is not None or folded is not None):
        return False
    if folded is not None and (folded.shape != (N,) or folded.dtype != _WIDE[dtype] or folded.device != device):
        return False
    if folded is not None and weight.requires_grad and not folded.requires_grad and torch.is_grad_enabled():
        return False
    if offset is None and scale is None:
        return scale_heads is None and offset_heads is None
    if offset is None:
        return offset_heads is None and _fit(scale, scale_heads, K, dtype, device)
    return scale_heads is None and _fit(offset, offset_heads, K, dtype, device)


def _fit(vectors: Tensor, heads: Heads, K: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the vectors are (h, D), for heads of K columns that are listed in a tensor, and wide, beside `dtype`."""
    shape = vectors.shape
    if not isinstance(heads, Tensor) or vectors.dtype != _WIDE.get(dtype) or len(shape) != 2:
        return False
    h, D = shape
    if D < 1 or K % D or h * D > K or heads.shape != (h,) or heads.dtype != torch.int64:
        return False
    return vectors.device == device and heads.device == device


def _checked(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    scale_heads: Heads,
    offset: Tensor | None,
    offset_heads: Heads,
    folded: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The heads of both components as tensors. Raises TypeError or ValueError for anything that does not fit."""
    _check_projection(z, weight, bias)
    heads = _check_both(z, scale, scale_heads, offset, offset_heads)
    if folded is not None:
        _check_folded(z, weight, offset, folded)
    return heads


def _default(z: Tensor, weight: Tensor, scale: Tensor | None, asked: Path, constants: Constants) -> Plan:
    """The path where nothing was measured."""
    many = scale is not None and is_many(scale.numel(), weight.shape[1])
    case = {"has_scale": scale is not None, "many_heads": many, "dtype": z.dtype, "device_type": z.device.type}
    return plan(**case, **constants._asdict(), **asked._asdict(), refusal=unserved(z.device))


def _compiled(arguments: Arguments, asked: Path) -> Tensor:
    """y (..., N) as torch.compile traces it. arguments: with the path where nothing was measured."""
    if is_traced(arguments, asked.form):
        folded = arguments.folded
        if folded is None and arguments.offset is not None:
            (folded,) = _fold_group([arguments.weight], [arguments.offset], [arguments.offset_heads], "aten")
        return compiled_cpu.affine_linear(arguments._replace(folded=folded))
    if arguments.scale is not None and has_answers(arguments.z.device):
        arguments = arguments._replace(path=asked)
    return ops.affine_linear(*arguments.flat())[0]


def head_affine(
    z: Tensor,
    *,
    scale: Tensor | None = None,
    scale_heads: Heads = None,
    offset: Tensor | None = None,
    offset_heads: Heads = None,
    backend: str = "auto",
) -> Tensor:
    """(1 + a) * z + v: the adapter alone, for an output projection that must run by itself (hooked, quantized, ...).

    Arguments as in `head_affine_linear`. Returns z's shape and dtype, rounded once: in 16 bits a scale below half a
    unit in the last place of 1, or an offset below half of one of z, vanishes in that rounding.
    Raises TypeError / ValueError naming what was got and what was expected.
    """
    if z.dim() < 1:
        raise ValueError(f"expected z (..., K), got z {tuple(z.shape)}")
    if not z.is_floating_point():
        raise TypeError(f"expected z of a floating dtype, got {z.dtype}")
    scale_heads, offset_heads = _check_both(z, scale, scale_heads, offset, offset_heads)
    chosen = plan_on(z.device, z.dtype, backend)
    if scale is None and offset is None:
        return z
    run = ops.affine if torch.compiler.is_compiling() else ops.Affine.apply
    return run(z, scale, scale_heads, offset, offset_heads, chosen.backend)


@torch.no_grad()
def fold_offset(
    weight: Tensor, offset: Tensor, heads: Heads = None, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """b + W v, the bias that stands for the offsets in inference and in merged weights. No gradient.

    weight: (N, K), of any floating dtype; offset: (h, D) float32 (float64 beside such a weight); heads as in
    `head_affine_linear`; bias: (N,) on the weight's device, in a floating dtype no wider than the offset's, or None.
    Returns (N,) in offset's dtype: keep it there for as long as you can.
    Raises TypeError / ValueError naming what was got and what was expected.
    """
    _check_weight(weight)
    heads = _check_vectors("offset", offset, heads, weight)
    if bias is not None:
        _check_bias(bias, weight)
        if not bias.is_floating_point() or torch.promote_types(bias.dtype, offset.dtype) != offset.dtype:
            raise TypeError(f"expected a floating bias no wider than the offset's {offset.dtype}, got {bias.dtype}")
    chosen = plan_on(weight.device, weight.dtype, backend)
    return as_written(weight, primitives(chosen.backend).offset_fold, weight, offset, heads, bias)


def fold_offsets(
    weights: Sequence[Tensor], offsets: Sequence[Tensor], heads: Sequence[Heads] | None = None, *, backend: str = "auto"
) -> list[Tensor]:
    """W v of many layers, for `head_affine_linear(..., folded=...)`: differentiable in the offsets, not in the weights.

    weights: (N, K) each; offsets: (h, D) each, float32 or float64; heads: of each layer, as in `head_affine_linear`.
    Layers may differ in N, K, D and number of heads; those of one N, D, dtype and device are folded in one launch, and
    their gradients found together. Returns (N,) per layer, in the offsets' dtype.
    Raises TypeError / ValueError naming what was got and what was expected.
    """
    heads = [None] * len(weights) if heads is None else heads
    if not len(weights) == len(offsets) == len(heads):
        raise ValueError(
            f"expected one offset and one list of heads per weight, got {len(weights)} weights, {len(offsets)} "
            f"offsets, {len(heads)} lists of heads"
        )
    groups: dict[tuple, list[int]] = {}
    checked = []
    graph = torch.is_grad_enabled()
    for number, (weight, offset, listed) in enumerate(zip(weights, offsets, heads, strict=True)):
        shape, dtype, device = weight.shape, weight.dtype, weight.device
        _check_weight(weight)
        if graph and weight.requires_grad:
            raise ValueError("fold_offsets gives weights no gradient: expected frozen ones, got one that requires it")
        fits = _fit(offset, listed, shape[1], dtype, device)
        checked.append(listed if fits else _check_vectors("offset", offset, listed, weight))
        groups.setdefault((shape[0], offset.shape[1], dtype, device), []).append(number)
    if len(groups) == 1:
        # the caller's list may hold something else by the time of the backward pass
        return list(_fold_group(tuple(weights), offsets, checked, plan_on(device, dtype, backend).backend))
    folded: list[Tensor | None] = [None] * len(weights)
    for (_, _, dtype, device), members in groups.items():
        chosen = plan_on(device, dtype, backend).backend
        some_weights, some_offsets, some_heads = ([of[i] for i in members] for of in (weights, offsets, checked))
        for number, bias in zip(members, _fold_group(some_weights, some_offsets, some_heads, chosen), strict=True):
            folded[number] = bias
    return folded


def _fold_group(weights: Sequence, offsets: Sequence, heads: Sequence, backend: str) -> Sequence[Tensor]:
    if torch.compiler.is_compiling():
        return ops.grouped_fold(list(weights), list(offsets), list(heads), backend).unbind()
    return ops.GroupedFold.apply((weights, heads, backend, None), *offsets)


def head_index(heads: Sequence[int], n_heads: int, device: torch.device | str = "cpu") -> Tensor:
    """Heads as the ops take them: (h,) int64 on `device`.

    Raises ValueError when they are not strictly ascending integers in [0, n_heads).
    """
    heads = list(heads)
    in_range = all(isinstance(h, int) and 0 <= h < n_heads for h in heads)
    if not in_range or any(a >= b for a, b in zip(heads, heads[1:], strict=False)):
        raise ValueError(f"heads must be strictly ascending integers in [0, {n_heads}), got {heads}")
    return torch.tensor(heads, dtype=torch.int64, device=device)


def _autocast(z: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The casts nn.Linear would get under autocast."""
    if not autocast_is_on(z) or z.dtype == torch.float64:
        return z, weight, bias
    dtype = torch.get_autocast_dtype(z.device.type)
    return z.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _check_projection(z: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or z.dim() < 1 or z.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"expected z (..., K) and weight (N, K), got z {tuple(z.shape)} and weight {tuple(weight.shape)}"
        )
    if not z.is_floating_point() or z.dtype != weight.dtype:
        raise TypeError(f"expected z and weight of one floating dtype, got {z.dtype} and {weight.dtype}")
    if z.device != weight.device:
        raise ValueError(f"expected z and weight on one device, got {z.device} and {weight.device}")
    if bias is not None:
        _check_bias(bias, weight)
        if bias.dtype != z.dtype:
            raise TypeError(f"expected bias in {z.dtype} as z and weight are, got {bias.dtype}")


def _check_weight(weight: Tensor) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"expected floating weights (N, K), got {weight.dtype} of shape {tuple(weight.shape)}")


def _check_bias(bias: Tensor, weight: Tensor) -> None:
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias of shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if bias.device != weight.device:
        raise ValueError(f"expected weight and bias on one device, got {weight.device} and {bias.device}")


def _check_folded(z: Tensor, weight: Tensor, offset: Tensor | None, folded: Tensor) -> None:
    wide = torch.promote_types(z.dtype, torch.float32)
    if folded.shape != weight.shape[:1]:
        raise ValueError(f"expected folded of shape ({weight.shape[0]},), got {tuple(folded.shape)}")
    if folded.dtype != wide:
        raise TypeError(f"expected folded in {wide} beside {z.dtype} activations, got {folded.dtype}")
    if folded.device != z.device:
        raise ValueError(f"expected z and folded on one device, got {z.device} and {folded.device}")
    if not torch.is_grad_enabled():
        return
    if offset is not None and offset.requires_grad and not folded.requires_grad:
        raise ValueError(
            "the offset would get no gradient through this folded one: expected one of fold_offsets, or torch.no_grad()"
        )
    if weight.requires_grad and offset is not None and folded.requires_grad:
        raise ValueError(
            "the weight would get its gradient through W v twice, by the offset and by the graph of the folded one: "
            "expected one of them beside a weight that requires grad, got both"
        )
    if weight.requires_grad and offset is None and not folded.requires_grad:
        raise ValueError(
            "the weight would get no gradient through this folded offset: expected a frozen weight, the offset itself, "
            "or torch.no_grad(), got a weight that requires grad and a folded offset without a graph"
        )


def _check_both(
    z: Tensor, scale: Tensor | None, scale_heads: Heads, offset: Tensor | None, offset_heads: Heads
) -> tuple[Tensor | None, Tensor | None]:
    """The heads of both components as int64 tensors; None for an absent one."""
    heads = (_check_vectors("scale", scale, scale_heads, z), _check_vectors("offset", offset, offset_heads, z))
    if scale is not None and offset is not None and scale.shape[1] != offset.shape[1]:
        raise ValueError(
            f"expected scale and offset of one head_dim D, got {tuple(scale.shape)} and {tuple(offset.shape)}"
        )
    return heads


def _check_vectors(name: str, vectors: Tensor | None, heads: Heads, like: Tensor) -> Tensor | None:
    """The heads of `vectors` as an int64 tensor; None when there are no vectors."""
    if vectors is None:
        if heads is not None:
            raise ValueError(f"{name}_heads were given without {name}")
        return None
    expected = torch.float64 if like.dtype == torch.float64 else torch.float32
    if vectors.dtype != expected:
        raise TypeError(f"expected {name} in {expected} beside {like.dtype} activations, got {vectors.dtype}")
    width = like.shape[-1]
    if vectors.dim() != 2 or vectors.shape[1] == 0 or width % vectors.shape[1]:
        raise ValueError(f"expected {name} of shape (h, D) with D dividing K = {width}, got {tuple(vectors.shape)}")
    n_heads = width // vectors.shape[1]
    if heads is None:
        heads = torch.arange(n_heads, device=vectors.device)
    elif not isinstance(heads, Tensor):
        heads = head_index(heads, n_heads, vectors.device)
    if vectors.device != like.device or heads.device != like.device:
        raise ValueError(
            f"expected {name} and its heads on {like.device}, got {vectors.device} and {heads.device}: a kernel would "
            "read another device's memory"
        )
    if heads.dtype != torch.int64 or heads.shape != vectors.shape[:1] or heads.shape[0] > n_heads:
        raise ValueError(
            f"expected {name}_heads to be int64, one per row of {name} ({vectors.shape[0]}), at most {n_heads}; "
            f"got {heads.dtype} of shape {tuple(heads.shape)}"
        )
    return heads
