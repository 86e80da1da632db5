"""LofitPeftLayer: one output projection with the vectors of several of PEFT's adapters."""

from __future__ import annotations

from itertools import chain

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from lofit_fast.patching.architectures import outputs_of
from lofit_fast.patching.bypass import BypassWatch, Called, weight_is_read
from lofit_fast.patching.layer import LofitLinear
from lofit_fast.patching.merge import merged_tensors
from lofit_fast.patching.placement import at_least_float32
from lofit_fast.patching.plain_linear import is_plain_linear
from lofit_fast.patching.storage import COMPONENTS
from lofit_fast.patching.vector_sync import check_seen


class LofitPeftLayer(nn.Module, BaseTunerLayer):
    """A projection with the scales and offsets of some adapters, of which one at a time is active.

    base_layer: the projection. lofit_scale, lofit_offset: parameters (h, D) by adapter, float32 (float64 in a float64
    model), rows by ascending head. lofit_heads: by adapter the heads of the two, None where there is no such component.
    """

    adapter_layer_names = ("lofit_scale", "lofit_offset")
    other_param_names = ("lofit_heads",)

    def __init__(self, base_layer: nn.Module, n_heads: int, head_dim: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.n_heads, self.head_dim = n_heads, head_dim
        self.in_features, self.out_features = n_heads * head_dim, outputs_of(base_layer)
        self.lofit_scale, self.lofit_offset = nn.ParameterDict(), nn.ParameterDict()
        self.lofit_heads: dict[str, tuple[list[int] | None, list[int] | None]] = {}
        self._disable_adapters, self.merged_adapters, self._active_adapter = False, [], []
        # what computes, by adapter; in a dict, so that it is no child
        self._patched: dict[str, LofitLinear] = {}
        # weight and bias as they were, while an adapter is merged
        self._unmerged: tuple[Tensor | None, Tensor | None] = (None, None)
        # see `check_seen`
        self._seen: tuple[int, ...] = ()
        # whether the vectors have acted here, and who wants to know if the weight was read instead
        self.called = Called()
        self.bypass: tuple[BypassWatch, ...] = ()

    @property
    def weight(self) -> Tensor:
        """The projection's weight. Raises AttributeError for a projection without one, as packed ones are."""
        if self._acting() is not None:
            weight_is_read(self)
        return super().weight

    def _replicate_for_data_parallel(self) -> LofitPeftLayer:
        replica = super()._replicate_for_data_parallel()
        # in a thread of its own, with vectors of its own
        replica._patched = {}
        return replica

    def update_layer(self, adapter: str, made: LofitLinear) -> None:
        """Take an adapter's vectors and heads from what `patch` would have put here."""
        for component in COMPONENTS:
            if (vectors := getattr(made, component)) is not None:
                getattr(self, f"lofit_{component}")[adapter] = vectors
        self.lofit_heads[adapter] = tuple(made.heads(component) or None for component in COMPONENTS)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter the active one. Raises ValueError for several."""
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise ValueError(f"LoFiT has one active adapter at a time, got {list(adapter_names)}")
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def forward(self, z: Tensor) -> Tensor:
        """z: (..., K), attention output before the projection. Returns (..., N)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapter = self._acting()
        if adapter is None:
            return self.base_layer(z)
        self.called.once = True
        layer = self.as_patched(adapter)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._seen = check_seen(layer.parameters(recurse=False), self._seen)
        return layer(z)

    def _acting(self) -> str | None:
        """The adapter whose vectors act; None where the projection has its own weights, or merged ones, alone."""
        if self.disable_adapters or self.merged:
            return None
        return next((name for name in self.active_adapters if name in self.lofit_heads), None)

    def as_patched(self, adapter: str) -> LofitLinear:
        """What `lofit_fast.patch` would put here, with the adapter's own vectors; attached to nothing."""
        vectors = {c: table[adapter] for c in COMPONENTS if adapter in (table := getattr(self, f"lofit_{c}"))}
        layer = self._patched.get(adapter)
        fits = layer is not None and layer.inner is self.base_layer
        if not fits or any(getattr(layer, c) is not vectors.get(c) for c in COMPONENTS):
            layer = LofitLinear(self.base_layer, self.n_heads, self.head_dim, *self.lofit_heads[adapter])
            for component, parameter in vectors.items():
                # a replica's are plain tensors
                if not isinstance(parameter, nn.Parameter):
                    layer._parameters.pop(component)
                setattr(layer, component, parameter)
            self._patched[adapter] = layer
        if any(getattr(layer, f"{c}_heads").device != parameter.device for c, parameter in vectors.items()):
            layer.place_heads()
        return layer

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge the active adapter into the projection, where that takes no new parameter; `unmerge` undoes it.

        Raises ValueError as `check_in_place` does.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lofit_heads]
        if not names:
            return
        self.check_in_place(names)
        base, layer = self.base_layer, self.as_patched(names[0])
        weight, bias = merged_tensors(layer)
        if safe_merge and not all(tensor.isfinite().all() for tensor in (weight, bias) if tensor is not None):
            raise ValueError(f"merging adapter {names[0]!r} gives numbers that are not finite")
        self._unmerged = (
            None if layer.scale is None else base.weight.detach().clone(),
            None if layer.offset is None else base.bias.detach().clone(),
        )
        self._write(weight if layer.scale is not None else None, bias if layer.offset is not None else None)
        self.merged_adapters.append(names[0])

    def check_in_place(self, names: list[str]) -> None:
        """Raise ValueError unless the adapters, one at most, merge into the parameters that the projection has."""
        if len(names) > 1 or self.merged:
            raise ValueError(f"LoFiT merges one adapter at a time, got {[*self.merged_adapters, *names]}")
        if not is_plain_linear(self.base_layer):
            raise ValueError(f"cannot merge into a {type(self.base_layer).__name__}: expected a plain nn.Linear")
        if any(name in self.lofit_offset for name in names) and self.base_layer.bias is None:
            raise ValueError(
                "cannot merge offsets in place: the projection has no bias to take them. merge_and_unload() gives the "
                "model its biases, and sets the config so that it reloads with them"
            )

    def unmerge(self) -> None:
        """Put back the weight and the bias as they were, bit for bit."""
        self._write(*self._unmerged)
        self._unmerged, self.merged_adapters = (None, None), []

    @torch.no_grad()
    def _write(self, weight: Tensor | None, bias: Tensor | None) -> None:
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None:
                getattr(self.base_layer, name).copy_(tensor)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To where the projection computes. The dtype stays: the vectors are too small for 16 bits."""
        device = device or next(chain(self.base_layer.parameters(), self.base_layer.buffers())).device
        for name in self.adapter_layer_names:
            if adapter_name in (table := getattr(self, name)) and not table[adapter_name].is_meta:
                table[adapter_name] = table[adapter_name].to(device)

    def _apply(self, fn, recurse: bool = True):
        for name, child in self.named_children():
            child._apply(at_least_float32(fn) if name in self.adapter_layer_names else fn)
        return self
