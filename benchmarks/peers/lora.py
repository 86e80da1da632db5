"""LoRA (arXiv:2106.09685), by PEFT: W -> W + (alpha / r) B A on some linears of every layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from benchmarks.peers.edits import check_unedited, seeded
from benchmarks.peers.peer import Attached, Vectors
from benchmarks.peers.peft_model import peft_attached

RANK, ALPHA, QUERY_AND_VALUE = 8, 16, ("q_proj", "v_proj")
# PEFT's name for the one adapter there is
_ADAPTER = "default"


class Lora:
    """PEFT's layers in a model, and the way back. The model itself stays the object it was, not a PeftModel."""

    def __init__(self, model: nn.Module, config, seed: int) -> None:
        # peft takes seconds to import
        from peft import LoraModel
        from peft.tuners.tuners_utils import cast_adapter_dtype

        check_unedited(model)
        self.model = model
        self._frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with seeded(seed):
            self._tuner = LoraModel(model, config, _ADAPTER)
        # 16-bit matrices would lose most updates of a small learning rate
        cast_adapter_dtype(model, _ADAPTER)

    def parameters(self) -> Iterator[nn.Parameter]:
        """A and B of every adapted linear."""
        return (parameter for name, parameter in self.model.named_parameters() if ".lora_" in name)

    def n_parameters(self) -> int:
        """r (inputs + outputs) per adapted linear, in all."""
        return sum(parameter.numel() for parameter in self.parameters())

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """A scope in which the model computes what the base computes."""
        self._tuner.disable_adapter_layers()
        try:
            yield
        finally:
            self._tuner.enable_adapter_layers()

    def unpatch(self) -> nn.Module:
        """Put the very same linears back, trainable as they were. A second call changes nothing."""
        from peft.tuners.lora import LoraLayer

        for name, module in list(self.model.named_modules()):
            if isinstance(module, LoraLayer):
                parent, _, attribute = name.rpartition(".")
                setattr(self.model.get_submodule(parent), attribute, module.base_layer)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        vars(self.model).pop("peft_config", None)
        self._frozen = []
        return self.model


def make(
    model: nn.Module,
    *,
    seed: int = 42,
    rank: int = RANK,
    alpha: int = ALPHA,
    targets: str | Sequence[str] = QUERY_AND_VALUE,
) -> Lora:
    """targets: the linears' names inside a layer, or "all-linear". seed: of A; B starts at zero, the base model."""
    from peft import LoraConfig

    config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **_options(rank, alpha, targets))
    return Lora(model, config, seed)


def attach(model: nn.Module, vectors: Vectors, targets: str | Sequence[str] = QUERY_AND_VALUE) -> Attached:
    """The same, in PEFT's own wrapper around the model. targets: as for `make`. The vectors play no part."""
    return peft_attached(model, "LoraConfig", **_options(RANK, ALPHA, targets))


def _options(rank: int, alpha: int, targets: str | Sequence[str]) -> dict:
    named = targets if isinstance(targets, str) else list(targets)
    return {"r": rank, "lora_alpha": alpha, "target_modules": named}
