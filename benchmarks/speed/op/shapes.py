"""Layer shapes of real models, as published in their configurations."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One decoder layer: H heads and H_kv key-value heads of D elements, N hidden and `inner` feed-forward columns."""

    H: int
    H_kv: int
    D: int
    N: int
    inner: int

    @property
    def K(self) -> int:
        """Columns of z: the input of the output projection."""
        return self.H * self.D

    @property
    def projection(self) -> tuple[int, int, int]:
        """(H, D, N): equal for models whose output projections are alike."""
        return self.H, self.D, self.N


SHAPES: dict[str, Shape] = {
    "llama-2-7b": Shape(H=32, H_kv=32, D=128, N=4096, inner=11008),
    "llama-3-8b": Shape(H=32, H_kv=8, D=128, N=4096, inner=14336),
    "gemma-7b": Shape(H=16, H_kv=16, D=256, N=3072, inner=24576),
    "llama-3.2-1b": Shape(H=32, H_kv=8, D=64, N=2048, inner=8192),
    "smollm2-135m": Shape(H=9, H_kv=3, D=64, N=576, inner=1536),
    # not a model: small enough for Triton's interpreter, with grouped heads and N no multiple of a tile
    "toy": Shape(H=4, H_kv=2, D=16, N=72, inner=96),
}
