"""A check of training itself: what the fused layers give for a batch, beside plain products of the same vectors.

On the first batch of every shape a loss and the gradients of all vectors are computed twice: by the layers as they are,
and by z -> (1 + a) * z + v in float32 at least, rounded once, and the base projection. Where the two differ by more
than rounding explains, the layers compute plainly from there on, and that is said.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lofit_fast.patching.frozen_linear import products_of
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.layer import LofitLinear
from lofit_fast.patching.placement import dtype_of
from lofit_fast.training.engine.device_queue import devices_of

# how far a loss, and the gradients taken together, may be off, as a share of their size. Rounding of a whole model's
# gradients reaches a tenth of it; what a wrong kernel gives is off by far more
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 3e-2}
# the same where products are in 8 bits: what is rounded has a vector added on one way, and not on the other
_IN_8_BITS = 1e-1
_TINY = 1e-12
Loss = Callable[[], Tensor]


class StepCheck:
    """Compares batches of a training until one differs. fell_back: whether the layers compute plainly since.

    handle: whose vectors are trained. say: with a line, when that happens; None means stderr.
    """

    def __init__(self, handle: LofitHandle, say: Callable[[str], None] | None = None) -> None:
        self.handle, self.fell_back = handle, False
        self.say = say or (lambda line: print(line, file=sys.stderr))
        self.batches = 0
        self._seen: set[tuple] = set()
        self._scopes = ExitStack()

    def look(self, batch: Mapping[str, object], loss: Loss) -> None:
        """Compare, where no batch of this shape has been. loss: computes it, with a graph, as often as it is called.

        What is drawn at random and what gradients there are is afterwards as it was.
        """
        shapes = tuple(sorted((name, tuple(x.shape)) for name, x in batch.items() if isinstance(x, Tensor)))
        if self.fell_back or shapes in self._seen:
            return
        self._seen.add(shapes)
        self.batches += 1
        vectors = list(self.handle.parameters())
        fused = self._computed(loss, vectors)
        with plain_layers(self.handle), torch.compiler.set_stance("force_eager"):
            plain = self._computed(loss, vectors)
        off, allowed = _differences(fused, plain), self._allowed()
        # what is not finite either way is a training that diverges, which others look for
        if math.isfinite(plain[0]) and not all(share <= allowed for share in off.values()):
            self.fell_back = True
            self._scopes.enter_context(plain_layers(self.handle))
            # a graph that is compiled already has the fused ones in it
            self._scopes.enter_context(torch.compiler.set_stance("force_eager"))
            shown = ", ".join(f"{name} by {share:.2g}" for name, share in off.items())
            self.say(
                f"warning: the fused layers differ from plain ones on a batch of shape {dict(shapes)}: {shown} of its "
                f"size, where rounding explains {allowed:g}. The layers compute plainly from here on"
            )

    def close(self) -> None:
        """The layers compute as ever again."""
        self._scopes.close()

    def _allowed(self) -> float:
        """What rounding explains of the difference."""
        in_8_bits = any(products_of(layer.inner) is not None for layer in self.handle.layers.values())
        return max(TOLERANCE[dtype_of(self.handle.model)], _IN_8_BITS if in_8_bits else 0.0)

    def _computed(self, loss: Loss, vectors: Sequence[nn.Parameter]) -> tuple[float, Tensor]:
        """(loss, all gradients in one row of float64)."""
        devices = [device for device in devices_of(self.handle.model) if device.type == "cuda"]
        had = [vector.grad for vector in vectors]
        try:
            for vector in vectors:
                vector.grad = None
            with torch.random.fork_rng(devices):
                value = loss()
                value.backward()
            gradients = [torch.zeros_like(v) if v.grad is None else v.grad for v in vectors]
            return value.item(), torch.cat([g.detach().double().cpu().flatten() for g in gradients])
        finally:
            for vector, gradient in zip(vectors, had, strict=True):
                vector.grad = gradient


@contextmanager
def plain_layers(handle: LofitHandle) -> Iterator[None]:
    """A scope in which a handle's layers compute without any of the op's kernels."""
    layers = list(handle.layers.values())
    for layer in layers:
        layer.forward = partial(plain_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def plain_forward(layer: LofitLinear, z: Tensor) -> Tensor:
    """y (..., N) of z (..., K): z -> (1 + a) * z + v where the vectors act, and the base projection of that."""
    if not layer.active:
        return layer.inner(z)
    wide = torch.promote_types(z.dtype, torch.float32)
    heads = z.to(wide).unflatten(-1, (layer.n_heads, layer.head_dim))
    if layer.scale is not None:
        heads = heads * (1 + _on_all(layer, "scale", wide))
    if layer.offset is not None:
        heads = heads + _on_all(layer, "offset", wide)
    affine = heads.flatten(-2).to(z.dtype)
    mask = None if layer.acting is None else layer._mask(z)
    return layer.inner(affine if mask is None else torch.where(mask, affine, z))


def _on_all(layer: LofitLinear, component: str, dtype: torch.dtype) -> Tensor:
    """The vectors of a component on every head, (H, D): zero on those that have none."""
    rows = getattr(layer, component).to(dtype)
    index = torch.tensor(layer.heads(component), device=rows.device)
    return rows.new_zeros(layer.n_heads, layer.head_dim).index_copy(0, index, rows)


def _differences(fused: tuple[float, Tensor], plain: tuple[float, Tensor]) -> dict[str, float]:
    """By how much a loss and gradients are off, as shares of their size."""
    size = max(plain[1].norm().item(), _TINY)
    return {
        "loss": abs(fused[0] - plain[0]) / max(abs(plain[0]), 1.0),
        "gradient": (fused[1] - plain[1]).norm().item() / size,
    }
