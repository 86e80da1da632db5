"""LoRA (arXiv:2106.09685), by PEFT: W -> W + (alpha / r) B A on some linears of every layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from benchmarks.peers.peer import Attached, Vectors
from benchmarks.peers.peft_model import PeftLayers, peft_attached

RANK, QUERY_AND_VALUE = 8, ("q_proj", "v_proj")
# alpha / r: the same at every rank, so that a learning rate serves all of them
STRENGTH = 2


def make(
    model: nn.Module,
    *,
    seed: int = 42,
    rank: int = RANK,
    alpha: int | None = None,
    targets: str | Sequence[str] = QUERY_AND_VALUE,
    layers: Sequence[int] | None = None,
) -> PeftLayers:
    """r (inputs + outputs) numbers per adapted linear.

    alpha: None means `STRENGTH` times the rank. targets: the linears' names inside a layer, or "all-linear". layers:
    the decoder layers that are adapted; None means all. seed: of A; B starts at zero, the base model.
    """
    chosen = {} if layers is None else {"layers_to_transform": sorted(layers)}
    return PeftLayers(model, "LoraConfig", seed=seed, lora_dropout=0.0, **_options(rank, alpha, targets), **chosen)


def attach(model: nn.Module, vectors: Vectors, targets: str | Sequence[str] = QUERY_AND_VALUE) -> Attached:
    """The same, in PEFT's own wrapper around the model. targets: as for `make`. The vectors play no part."""
    return peft_attached(model, "LoraConfig", **_options(RANK, None, targets))


def _options(rank: int, alpha: int | None, targets: str | Sequence[str]) -> dict:
    named = targets if isinstance(targets, str) else list(targets)
    return {"r": rank, "lora_alpha": STRENGTH * rank if alpha is None else alpha, "target_modules": named}
