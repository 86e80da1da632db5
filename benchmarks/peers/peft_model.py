"""PEFT's adapters in a model: wrapped as PEFT's users have them, or in place, as an Attachment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from benchmarks.peers.edits import check_unedited, seeded
from benchmarks.peers.peer import Absent, Attached

# PEFT's name for the one adapter there is
_ADAPTER = "default"


def peft_attached(model: nn.Module, config: str, **options) -> Attached:
    """The model with one of PEFT's adapters in it, wrapped.

    config: the name of a config class of PEFT. options: its arguments. Raises Absent where PEFT, or that class, is not
    installed.
    """
    made = _config(config, options)
    import peft

    adapted = peft.get_peft_model(model, made)
    return Attached(adapted, [p for p in adapted.parameters() if p.requires_grad])


class PeftLayers:
    """PEFT's layers in a model, and the way back. The model itself stays the object it was, not a PeftModel.

    config: the name of a config class of PEFT. options: its arguments. seed: of what the adapter starts from.
    Raises Absent where PEFT, or that class, is not installed; ValueError for a model that is edited already.
    """

    def __init__(self, model: nn.Module, config: str, *, seed: int, **options) -> None:
        made = _config(config, options)
        # peft takes seconds to import
        from peft import PEFT_TYPE_TO_TUNER_MAPPING
        from peft.tuners.tuners_utils import cast_adapter_dtype

        check_unedited(model)
        self.model = model
        self._frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with seeded(seed):
            self._tuner = PEFT_TYPE_TO_TUNER_MAPPING[made.peft_type](model, made, _ADAPTER)
        # 16-bit vectors would lose most updates of a small learning rate
        cast_adapter_dtype(model, _ADAPTER)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The adapter's, of every adapted linear."""
        return (parameter for name, parameter in self.model.named_parameters() if f".{self._tuner.prefix}" in name)

    def n_parameters(self) -> int:
        """The adapter's numbers, in all."""
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
        for name, module in list(self.model.named_modules()):
            if isinstance(module, self._tuner.tuner_layer_cls):
                parent, _, attribute = name.rpartition(".")
                setattr(self.model.get_submodule(parent), attribute, module.base_layer)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        vars(self.model).pop("peft_config", None)
        self._frozen = []
        return self.model


def _config(name: str, options: dict):
    try:
        import peft

        return getattr(peft, name)(task_type="CAUSAL_LM", **options)
    except (ImportError, AttributeError) as error:
        raise Absent(f"PEFT's {name} is not installed here: {error}") from error
