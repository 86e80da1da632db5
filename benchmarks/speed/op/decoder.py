"""One decoder layer in plain torch, with a place for a peer where its output projection stands."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from lofit_kernels.shapes import LayerShape

_LONGEST = 2048


class DecoderLayer:
    """A frozen pre-norm layer: rotary grouped-query attention, then a gated feed-forward, with random weights.

    T tokens are sequences of at most 2048. x: (batch, sequence, N).
    """

    def __init__(self, shape: LayerShape, T: int, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int, std: float) -> Tensor:
            return (torch.randn(*size, generator=generator, device=device) * std).to(dtype)

        def weight(rows: int, columns: int) -> Tensor:
            return draw(rows, columns, std=columns**-0.5)

        self.shape, self.S = shape, min(T, _LONGEST)
        self.batch = T // self.S
        self.q, self.k, self.v = (weight(h * shape.D, shape.N) for h in (shape.H, shape.H_kv, shape.H_kv))
        self.gate, self.up = weight(shape.inner, shape.N), weight(shape.inner, shape.N)
        self.down = weight(shape.N, shape.inner)
        self.norms = [torch.ones(shape.N, dtype=dtype, device=device) for _ in range(2)]
        angles = torch.outer(
            torch.arange(self.S, device=device), 10000 ** (-torch.arange(0, shape.D, 2, device=device) / shape.D)
        ).repeat(1, 2)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        self.draw = draw

    def inputs(self) -> tuple[Tensor, Tensor]:
        """(x, a gradient of the layer's output), new ones at each call."""
        size = (self.batch, self.S, self.shape.N)
        return self.draw(*size, std=1.0).requires_grad_(), self.draw(*size, std=1.0)

    def __call__(self, x: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
        """The layer's output, with project: (batch, sequence, K) -> (batch, sequence, N) as its output projection."""
        x = x + project(self._attention(rms_norm(x, (self.shape.N,), self.norms[0])))
        h = rms_norm(x, (self.shape.N,), self.norms[1])
        return x + linear(silu(linear(h, self.gate)) * linear(h, self.up), self.down)

    def _attention(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x, w).unflatten(-1, (-1, self.shape.D)).transpose(1, 2) for w in (self.q, self.k, self.v))
        grouped = self.shape.H_kv != self.shape.H
        z = scaled_dot_product_attention(self._rotate(q), self._rotate(k), v, is_causal=True, enable_gqa=grouped)
        return z.transpose(1, 2).flatten(2)

    def _rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat((-second, first), -1) * self.sin
