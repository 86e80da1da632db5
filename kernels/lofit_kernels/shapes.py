"""Layer shapes of real models, as published in their configurations."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """One of a model's equal decoder layers.

    H heads and H_kv key-value heads of D elements each, N hidden and `inner` feed-forward columns. layers: how many.
    """

    layers: int
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


SHAPES: dict[str, LayerShape] = {
    "SmolLM2-135M": LayerShape(layers=30, H=9, H_kv=3, D=64, N=576, inner=1536),
    "Gemma-3-270M": LayerShape(layers=18, H=4, H_kv=1, D=256, N=640, inner=2048),
    "Llama-3.2-1B": LayerShape(layers=16, H=32, H_kv=8, D=64, N=2048, inner=8192),
    "Llama-2-7B": LayerShape(layers=32, H=32, H_kv=32, D=128, N=4096, inner=11008),
    "Llama-3-8B": LayerShape(layers=32, H=32, H_kv=8, D=128, N=4096, inner=14336),
    "Gemma-7B": LayerShape(layers=28, H=16, H_kv=16, D=256, N=3072, inner=24576),
    "Gemma-2-9B": LayerShape(layers=42, H=16, H_kv=8, D=256, N=3584, inner=14336),
    "Llama-2-13B": LayerShape(layers=40, H=40, H_kv=40, D=128, N=5120, inner=13824),
    "Llama-3-70B": LayerShape(layers=80, H=64, H_kv=8, D=128, N=8192, inner=28672),
    # not a model: small enough for Triton's interpreter, with grouped heads and N no multiple of a tile
    "toy": LayerShape(layers=2, H=4, H_kv=2, D=16, N=72, inner=96),
}
