"""One output projection with its adapter: ours by every path, and the peers, as rows of a table.

    y = ((1 + a) * z + v) W^T

OPERATORS is the table. A peer has the name here that it has in `benchmarks.peers.table`. A row that
cannot run on a projection says why (`missing`) instead of vanishing. This module needs torch and, for the paths on
Triton, triton; nothing else, so that it runs on any machine with a GPU.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import linear

from lofit_kernels import head_affine_linear, plan
from lofit_kernels.dispatch import BACKENDS, FORMS, GEMMS
from lofit_kernels.shapes import LayerShape

# name -> on which heads there is a scale, on which an offset
SETTINGS: dict[str, tuple[str | None, str | None]] = {
    "step 1": ("all", None),
    "step 2": (None, "few"),
    "both": ("all", "all"),
    "both few": ("few", "few"),
    "few scales": ("few", None),
}
# of LoRA, with alpha twice as large
RANK = 8


@dataclass(frozen=True)
class Projection:
    """Tensors of one projection: z (T, K) as attention hands it over, weight (N, K) frozen, grad (T, N) = dY.

    scale, offset: (h, D) float32 leaves or None, on `scale_heads` and `offset_heads`, (h,) int64. low_rank: LoRA's
    A (8, K) and B (N, 8), float32 leaves as PEFT makes them.
    """

    setting: str
    shape: LayerShape
    z: Tensor
    weight: Tensor
    grad: Tensor
    scale: Tensor | None
    scale_heads: Tensor | None
    offset: Tensor | None
    offset_heads: Tensor | None
    low_rank: tuple[Tensor, Tensor]
    # the heads again as lists, for those who loop over them: reading them off a GPU in every step would wait for it
    lists: tuple[list[int], list[int]]

    @property
    def vectors(self) -> dict[str, Tensor | None]:
        """The adapter as `head_affine_linear` takes it."""
        names = ("scale", "scale_heads", "offset", "offset_heads")
        return {name: getattr(self, name) for name in names}

    @property
    def parameters(self) -> list[Tensor]:
        """The scale and the offset, those that are there."""
        return [x for x in (self.scale, self.offset) if x is not None]


def few_heads(n_heads: int) -> list[int]:
    """A tenth of the heads, at least one, spread evenly, head 0 among them."""
    count = max(1, round(n_heads / 10))
    return [i * n_heads // count for i in range(count)]


def projection(setting: str, shape: LayerShape, T: int, dtype: torch.dtype, device: str, seed: int = 0) -> Projection:
    """Random tensors for a row of SETTINGS, with magnitudes as in a model: z and dY of order 1, y of order 1."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int, std: float = 1.0, to: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*size, generator=generator, device=device) * std).to(to)

    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def vectors(heads: list[int]) -> tuple[Tensor | None, Tensor | None]:
        if not heads:
            return None, None
        rows = draw(len(heads), shape.D, std=0.1, to=wide)
        return rows.requires_grad_(), torch.tensor(heads, device=device)

    z, weight = draw(T, shape.K).requires_grad_(), draw(shape.N, shape.K, std=shape.K**-0.5)
    by_name = {None: [], "all": list(range(shape.H)), "few": few_heads(shape.H)}
    lists = tuple(by_name[which] for which in SETTINGS[setting])
    scale, offset = (vectors(heads) for heads in lists)
    grad = draw(T, shape.N)
    sizes = ((RANK, shape.K), (shape.N, RANK))
    low_rank = tuple(draw(*size, std=size[1] ** -0.5, to=wide).requires_grad_() for size in sizes)
    return Projection(setting, shape, z, weight, grad, *scale, *offset, low_rank, lists)


def _dense(rows: Tensor, heads: Tensor, n_heads: int) -> Tensor:
    return rows if len(heads) == n_heads else rows.new_zeros(n_heads, rows.shape[1]).index_copy(0, heads, rows)


def floor(z: Tensor, p: Projection) -> Tensor:
    """The frozen projection without an adapter: a GEMM each way, what nobody can beat."""
    return linear(z, p.weight)


def hook(z: Tensor, p: Projection) -> Tensor:
    """As a forward pre-hook does it: float32 vectors, plain autograd, cast back to z's dtype."""
    x = z.unflatten(-1, (p.shape.H, p.shape.D))
    if p.scale is not None:
        x = x * (1 + _dense(p.scale, p.scale_heads, p.shape.H))
    if p.offset is not None:
        x = x + _dense(p.offset, p.offset_heads, p.shape.H)
    return linear(x.flatten(-2).to(z.dtype), p.weight)


def original(z: Tensor, p: Projection) -> Tensor:
    """As the authors' release does it: each head's slice cloned, scaled, shifted and assigned back, one after another.

    It repeats the edit of `benchmarks.peers.original`: that file belongs to hooks and to a table of peers that import
    transformers and PEFT, and this module must run with torch and Triton alone.
    """
    absent = torch.zeros(p.shape.D, device=z.device)
    scales = {} if p.scale is None else dict(zip(p.lists[0], p.scale, strict=True))
    offsets = {} if p.offset is None else dict(zip(p.lists[1], p.offset, strict=True))
    x = z.clone()
    for head in range(p.shape.H):
        columns = slice(head * p.shape.D, (head + 1) * p.shape.D)
        a, v = scales.get(head, absent), offsets.get(head, absent)
        x[..., columns] = ((1 + a) * x[..., columns].clone() + v).to(x.dtype)
    return linear(x, p.weight)


def fold_eager(z: Tensor, p: Projection) -> Tensor:
    """b = W_S v_S in plain autograd, then the projection with a bias."""
    columns = (p.offset_heads[:, None] * p.shape.D + torch.arange(p.shape.D, device=z.device)).flatten()
    bias = p.weight[:, columns].to(p.offset.dtype) @ p.offset.flatten()
    return linear(z, p.weight, bias.to(z.dtype))


def lora(z: Tensor, p: Projection) -> Tensor:
    """What PEFT's LoRA makes of this projection: y = z W^T + 2 (z A^T) B^T, with z cast to A's float32 and back."""
    a, b = p.low_rank
    return (linear(z, p.weight) + 2 * linear(linear(z.to(a.dtype), a), b)).to(z.dtype)


def ours(z: Tensor, p: Projection, **path: str) -> Tensor:
    """The op of this project, by the path that dispatch chooses or by the one that is insisted on."""
    return head_affine_linear(z, p.weight, **p.vectors, **path)


@cache
def _compiled() -> Callable[[Tensor, Projection], Tensor]:
    step = torch.compile(_plain_hook)
    return lambda z, p: step(z, p.weight, p.scale, p.scale_heads, p.offset, p.offset_heads, p.shape.H)


def _plain_hook(z, weight, scale, scale_heads, offset, offset_heads, n_heads):
    x = z.unflatten(-1, (n_heads, -1))
    if scale is not None:
        x = x * (1 + _dense(scale, scale_heads, n_heads))
    if offset is not None:
        x = x + _dense(offset, offset_heads, n_heads)
    return linear(x.flatten(-2).to(z.dtype), weight)


def compiled_hook(z: Tensor, p: Projection) -> Tensor:
    """The hook and its projection under torch.compile."""
    return _compiled()(z, p)


def no_triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on `device`, None when they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    import triton

    from lofit_kernels.gpu.tiles import architecture

    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        return "no GPU, and Triton does not interpret in this process"
    try:
        architecture(device)
    except ValueError as unknown:
        return str(unknown)
    return None


def no_compiler(device: torch.device) -> str | None:
    """Why torch.compile cannot work for `device`, None when it can."""
    wanted = ("CC", "gcc", "cc", "clang") if device.type == "cuda" else ("CXX", "g++", "c++", "clang++")
    if os.environ.get(wanted[0]) is None and not any(shutil.which(name) for name in wanted[1:]):
        return f"torch.compile needs a compiler: none of {', '.join(wanted[1:])} is installed"
    return no_triton(device) if device.type == "cuda" else None


NEEDS: dict[str, Callable[[torch.device], str | None]] = {"triton": no_triton, "compiler": no_compiler}


def _path_refusal(p: Projection, form: str, **path: str) -> str | None:
    """Why this path of ours cannot be taken, in dispatch's own words."""
    case = {"has_scale": p.scale is not None, "has_offset": p.offset is not None}
    try:
        chosen = plan(**case, dtype=p.z.dtype, device_type=p.z.device.type, form=form, **path)
    except ValueError as refused:
        return str(refused)
    return None if chosen.form == form else f"without a scale this is the {chosen.form}"


def _fold_eager_refusal(p: Projection) -> str | None:
    return None if p.scale is None else "a fold of the offset cannot express a scale"


@dataclass(frozen=True)
class Operator:
    """A row: `forward(z, projection) -> y`, differentiable. ours: held to the accuracy rule before it is timed.

    name: of a path of ours, or the peer's name in `benchmarks.peers.table.PEERS`.

    refusal(projection): why it cannot express that projection anywhere, None when it can. needs: a key of NEEDS.
    trained(projection): the leaves whose gradients it computes. rounds_sums: whether a sum over tokens passes through
    z's dtype on its way to dv.
    """

    name: str
    forward: Callable[[Tensor, Projection], Tensor]
    ours: bool = False
    refusal: Callable[[Projection], str | None] = lambda p: None
    needs: str | None = None
    trained: Callable[[Projection], Sequence[Tensor]] = lambda p: p.parameters
    rounds_sums: bool = False

    def missing(self, p: Projection) -> str | None:
        """Why it cannot run on that projection here, None when it can."""
        why = self.refusal(p)
        return NEEDS[self.needs](p.z.device) if why is None and self.needs else why


def _exists(path: dict[str, str]) -> bool:
    """Whether dispatch takes this very path for anything."""
    for has_scale in (True, False):
        try:
            chosen = plan(has_scale=has_scale, dtype=torch.bfloat16, device_type="cuda", **path)
        except ValueError:
            continue
        if path == {"form": chosen.form, "backend": chosen.backend, "gemm": chosen.gemm}:
            return True
    return False


def _paths() -> Iterator[Operator]:
    """Every path that dispatch knows: a new one appears here by itself."""
    for form, backend, gemm in product(FORMS, BACKENDS, GEMMS):
        path = {"form": form, "backend": backend, "gemm": gemm}
        if _exists(path):
            name = f"{form} {backend}" + ("" if gemm == "vendor" else f" {gemm}")
            needs = "triton" if backend == "triton" else None
            yield Operator(name, partial(ours, **path), True, partial(_path_refusal, **path), needs)


OPERATORS: dict[str, Operator] = {
    row.name: row
    for row in (
        Operator("floor", floor, trained=lambda p: ()),
        Operator("ours", ours, True),
        Operator("hook", hook),
        Operator("compiled_hook", compiled_hook, needs="compiler"),
        Operator("original", original),
        Operator("fold_eager", fold_eager, refusal=_fold_eager_refusal, rounds_sums=True),
        *_paths(),
    )
}


_ELSEWHERE = "adapts other projections than this one: see the step level"
# adapters that compute another function: timed beside OPERATORS, with nothing to be checked against
OTHERS: dict[str, Operator] = {
    "lora_all": Operator("lora_all", lora, trained=lambda p: p.low_rank),
    **{name: Operator(name, floor, refusal=lambda p: _ELSEWHERE) for name in ("lora", "ia3", "beft")},
}
EVERYONE = {**OPERATORS, **OTHERS}


def step(operator: Operator, p: Projection) -> tuple[Tensor, ...]:
    """One forward and backward: (y, dz, and the gradients of the parameters, for peers that have any)."""
    y = operator.forward(p.z, p)
    return (y.detach(), *torch.autograd.grad(y, [p.z, *operator.trained(p)], p.grad))
