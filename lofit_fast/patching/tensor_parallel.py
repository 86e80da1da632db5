"""Tensor parallelism: a projection whose weight is cut over several processes, and with it its input, by heads.

    y = sum over the processes of ((1 + a_own) z_own + v_own) W_own^T, and b once

Every process keeps all vectors, which are small, takes the rows of its own heads in each forward, and has the whole
gradient after each backward pass: what clips, penalises, steps, scores or saves sees what one process would see. A
process that has none of the chosen heads takes part all the same, since the others wait for what it says.

Told by kinds of tensors (DTensor), not tools: transformers' `tp_plan` and torch's `parallelize_module` both make them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lofit_fast.patching.fully_sharded import is_marked, is_placed, shards

# a component's rows (h, D), and the heads of these rows, ascending: as numbers, and as an index (h,) beside the rows
Rows = tuple[Tensor, list[int], Tensor]


def placed_weight(projection: nn.Module) -> Tensor | None:
    """The weight of a projection that several processes hold together; None for one that this process has whole."""
    weight = getattr(projection, "weight", None)
    return weight if is_placed(weight) else None


def is_tensor_parallel(model: nn.Module) -> bool:
    """Whether the model's weights are placed over processes, and stay so while it computes, unlike those of FSDP."""
    if any(is_marked(module) or shards(module) for module in model.modules()):
        return False
    return any(is_placed(parameter) for parameter in model.parameters())


def n_holding(model: nn.Module) -> set[int]:
    """Over how many processes the weights of a tensor-parallel model are placed: one number, where all are alike."""
    return {parameter.device_mesh.size() for _, parameter in _placed(model)}


def why_not_parallel(model: nn.Module) -> str | None:
    """What keeps a tensor-parallel model from being patched, in words; None where nothing does."""
    for name, parameter in _placed(model):
        if parameter.device_mesh.ndim != 1:
            places = tuple(map(str, parameter.placements))
            return f"found {name} placed {places} over {parameter.device_mesh.ndim} dimensions of processes, expected 1"
    return None


def check_projection(name: str, projection: nn.Module) -> None:
    """Raise ValueError for a projection whose parts are not whole columns of its weight, before it is wrapped."""
    weight = placed_weight(projection)
    if weight is not None and _cut(weight) is None and not _is_known(weight):
        raise ValueError(
            f"cannot patch a tensor-parallel model: {name}.weight is placed {weight.placements[0]}; expected a plan "
            "that cuts its columns one after another ('rowwise', RowwiseParallel), its rows, or nothing"
        )


def _placed(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if is_placed(parameter))


def _is_known(weight: Tensor) -> bool:
    """Whether the placement leaves the projection's input whole."""
    from torch.distributed.tensor import Replicate, Shard

    place = weight.placements[0]
    return isinstance(place, Replicate) or (type(place) is Shard and place.dim % weight.dim() == 0)


def _cut(weight: Tensor) -> tuple[int, int] | None:
    """The columns [first, last) of a weight (N, K) that this process has; None where they are not cut."""
    from torch.distributed.tensor import Shard

    place = weight.placements[0]
    if type(place) is not Shard or weight.dim() != 2 or place.dim % 2 != 1:
        return None
    # as torch.chunk has it: the last process may have fewer, and one after it none
    columns, mesh = weight.shape[1], weight.device_mesh
    size = -(-columns // mesh.size())
    first = min(mesh.get_local_rank() * size, columns)
    return first, min(first + size, columns)


@dataclass(frozen=True)
class Share:
    """What this process computes of a projection with the vectors.

    z: (..., K_own), its part of the input. heads: [first, last), those that this part is of. group: the processes.
    gives: whether it is this process that knows the gradients of these heads; of what all compute alike the first is.
    """

    z: Tensor
    heads: tuple[int, int]
    group: Any
    gives: bool


def share_of(weight: Tensor, z: Tensor, n_heads: int, head_dim: int) -> Share:
    """What this process has of a projection's input, as whole heads.

    weight: (N, K), placed. z: (..., K), placed likewise or whole on every process; or (..., K_own), this process's
    part, as a plain tensor.
    Raises ValueError for an input that is cut in another way than the weight, or inside a head.
    """
    mesh = weight.device_mesh
    own = z
    if is_placed(z):
        from torch.distributed.tensor import Replicate, Shard

        place = z.placements[0] if len(z.placements) == 1 else None
        last = type(place) is Shard and place.dim % z.dim() == z.dim() - 1
        if z.device_mesh != mesh or not (last or isinstance(place, Replicate)):
            raise ValueError(
                f"the output projection's input is placed {tuple(map(str, z.placements))}: with LoFiT expected one "
                "that is cut by heads over the weight's processes, or whole on each"
            )
        own = z.to_local()
    width, columns = own.shape[-1], n_heads * head_dim
    if width == columns:
        return Share(own, (0, n_heads), mesh.get_group(), mesh.get_local_rank() == 0)
    cut = _cut(weight)
    if cut is None or cut[1] - cut[0] != width or cut[0] % head_dim or cut[1] % head_dim or not width:
        kept = "all columns" if cut is None else f"the columns {cut[0]} to {cut[1]}"
        raise ValueError(
            f"this process has {width} of the {columns} inputs of an output projection and {kept} of its weight; with "
            f"LoFiT expected the same of both, as whole heads of {head_dim}"
        )
    return Share(own, (cut[0] // head_dim, cut[1] // head_dim), mesh.get_group(), True)


def rejoined(own: Tensor, z: Tensor) -> Tensor:
    """A part of a projection's input in the form in which z came: placed over the processes, or plain."""
    if not is_placed(z):
        return own
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(own, z.device_mesh, z.placements, run_check=False, shape=z.shape, stride=z.stride())


def own_vectors(share: Share, rows: dict[str, Rows]) -> dict[str, tuple[Tensor, Tensor]]:
    """The rows of each component that are of the share's heads, and these heads as an index among the share's.

    A component without any has one row of zeros, which changes nothing, so that all processes compute alike.
    Gradients of the result become those of all rows, in every process.
    """
    first, last = share.heads
    bounds = [(bisect_left(heads, first), bisect_left(heads, last)) for _, heads, _ in rows.values()]
    own = _OwnRows.apply(share.group, share.gives, bounds, *(vectors for vectors, _, _ in rows.values()))
    return {
        component: (vectors, index[begin:end] - first if begin < end else index.new_zeros(1))
        for (component, (_, _, index)), vectors, (begin, end) in zip(rows.items(), own, bounds, strict=True)
    }


def own_input(share: Share, weight: Tensor, head_dim: int) -> Share | None:
    """The share of the columns of the weight that this process has, also of an input that is whole on every process.

    None where these columns are not whole heads.
    """
    first, last = _cut(weight) or (0, 0)
    if not last - first or first % head_dim or last % head_dim:
        return None
    if share.z.shape[-1] == last - first:
        return replace(share, gives=True)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    # the processes put the gradient of their parts together again
    whole = DTensor.from_local(share.z, weight.device_mesh, [Replicate()], run_check=False)
    z = whole.redistribute(placements=[Shard(-1)]).to_local()
    return Share(z, (first // head_dim, last // head_dim), share.group, True)


def summed(part: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the processes' parts (..., N) of a projection's output add up to, and its bias, in every process."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = weight.device_mesh
    if part.requires_grad:
        placed = DTensor.from_local(part, mesh, [Partial()], run_check=False)
        y = placed.redistribute(placements=[Replicate()]).to_local()
    else:
        y = part.clone() if part.is_inference() and not torch.is_inference_mode_enabled() else part
        dist.all_reduce(y, group=mesh.get_group())
    if bias is None:
        return y
    return y + (bias.to_local() if is_placed(bias) else bias).to(y.dtype)


class _OwnRows(torch.autograd.Function):
    """Some rows of each tensor; backward, the gradient of every row, from the process that has it."""

    @staticmethod
    def forward(ctx: Any, group: Any, gives: bool, bounds: list[tuple[int, int]], *tensors: Tensor) -> tuple:
        ctx.group, ctx.gives, ctx.bounds = group, gives, bounds
        ctx.shapes = [tensor.shape for tensor in tensors]
        parts = (tensor[begin:end] for tensor, (begin, end) in zip(tensors, bounds, strict=True))
        return tuple(part.clone() if len(part) else part.new_zeros(1, part.shape[1]) for part in parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        whole: list[Tensor | None] = []
        wanted = ctx.needs_input_grad[3:]
        for gradient, shape, (begin, end), asked in zip(gradients, ctx.shapes, ctx.bounds, wanted, strict=True):
            rows = gradient.new_zeros(shape) if asked else None
            if asked and ctx.gives:
                rows[begin:end] = gradient[: end - begin]
            whole.append(rows)
        # zeros but for one process's numbers: the sum rounds nothing, and is the same everywhere
        flat = torch.cat([rows.flatten() for rows in whole if rows is not None])
        dist.all_reduce(flat, group=ctx.group)
        parts = iter(flat.split([rows.numel() for rows in whole if rows is not None]))
        return (None, None, None, *(None if rows is None else next(parts).view_as(rows) for rows in whole))
