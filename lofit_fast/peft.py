"""LoFiT as a method of PEFT, for people whose stack is PEFT: importing this module registers it as peft_type LOFIT.

    import lofit_fast.peft
    model = peft.get_peft_model(model, lofit_fast.peft.LofitPeftConfig(offset=heads))

What is computed, drawn, merged and written is what `lofit_fast.patch` computes, draws, merges and writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from lofit_fast.config import HeadSet, LofitConfig, shown
from lofit_fast.extras import needing
from lofit_fast.patching.architectures import Fingerprint, Projection, find_projections, fingerprint, outputs_of
from lofit_fast.patching.fully_sharded import fully_sharded
from lofit_fast.patching.handle import handle_of
from lofit_fast.patching.layer import LofitLinear
from lofit_fast.patching.merge import merge_into_base, merged_tensors, plan_merge
from lofit_fast.patching.peft_layers import REFERENCE, is_tuner_layer
from lofit_fast.patching.placement import at_least_float32
from lofit_fast.patching.plain_linear import is_plain_linear
from lofit_fast.patching.seal import CONFIG_DIGEST, TENSOR_DIGEST, sealed, tensors_digest
from lofit_fast.patching.sharding import kind_of_part
from lofit_fast.patching.storage import (
    COMPONENTS,
    FORMAT_VERSION,
    PEFT_TYPE,
    check_finite,
    description_in,
    parse_tensor_name,
)
from lofit_fast.patching.vector_sync import check_seen
from lofit_fast.patching.weight_sample import base_digest, check_base
from lofit_fast.patching.wrapping import build_layers

with needing("peft", "peft", "lofit_fast.peft"):
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
    from peft.utils import PeftType, register_peft_method


@dataclass
class LofitPeftConfig(PeftConfig):
    """`LofitConfig` as a config of PEFT.

    scale, offset, init_std, seed: as of `LofitConfig`. modules_to_save: as of every PEFT method. The projections are
    found in the model: `target_modules` is filled in, not asked for. fingerprint, base_digest: shape and weights of the
    model that the adapter is for, once there is one. positions: "all", the only one that PEFT's models do.
    tensor_digest, config_digest: of the folder that the config was read from, until its tensors are loaded.
    Raises what `LofitConfig` raises, and ValueError for vectors that act on answers alone.
    """

    scale: HeadSet = None
    offset: HeadSet = None
    init_std: float = 1e-3
    seed: int = 42
    positions: str = field(default="all", repr=False)
    modules_to_save: list[str] | None = None
    target_modules: set[str] | None = field(default=None, repr=False)
    fingerprint: dict | None = field(default=None, repr=False)
    base_digest: str = field(default="", repr=False)
    format_version: int = field(default=FORMAT_VERSION, repr=False)
    tensor_digest: str | None = field(default=None, repr=False)
    config_digest: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LOFIT
        config = self.heads()
        if config.positions != "all":
            raise ValueError(
                "vectors that act on answers alone (positions='answer') are not for models of PEFT, which do not find "
                "where an answer begins: use lofit_fast.load or lofit_fast.patch"
            )
        self.scale, self.offset = config.scale, config.offset
        if not isinstance(self.base_digest, str):
            raise ValueError(f"expected base_digest to be text, got {shown(self.base_digest)}")

    def heads(self) -> LofitConfig:
        """What is adapted, for `lofit_fast`."""
        return LofitConfig(self.scale, self.offset, self.init_std, self.seed, self.positions)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs) -> dict:
        """The entries of a folder's config, or of the adapter that was last saved there, see `storage`.

        Raises ValueError for a folder that is damaged.
        """
        return description_in(Path(path_json_file).parent)

    def to_dict(self) -> dict:
        """What `adapter_config.json` holds: what `handle.save` writes, and PEFT's own entries."""
        ours = {"peft_type": PEFT_TYPE, "target_modules": None, "format_version": FORMAT_VERSION}
        entries = super().to_dict() | ours | {TENSOR_DIGEST: None, CONFIG_DIGEST: None}
        # once: the vectors may be others the next time
        digest = vars(self).pop("_to_be_written", None)
        return entries if digest is None else sealed(entries, digest)

    def expect_to_write(self, tensors: dict[tuple[str, int], Tensor]) -> None:
        """Take note of the tensors, by (component, layer), that PEFT writes beside what `to_dict` gives next."""
        whole = tensors and all(t.device.type != "meta" and kind_of_part(t) is None for t in tensors.values())
        self._to_be_written = tensors_digest(tensors) if whole else None

    def check_loaded(self, tensors: dict[tuple[str, int], Tensor]) -> None:
        """Raise ValueError unless tensors, by (component, layer), are finite, and those that the config came with."""
        check_finite(tensors, "cannot load the adapter")
        if self.tensor_digest is not None and self.tensor_digest != tensors_digest(tensors):
            raise ValueError(
                "cannot load the adapter: its tensors are damaged, or not those that its config was written with. If "
                "they are right, set tensor_digest of the LofitPeftConfig to None"
            )
        self.tensor_digest = self.config_digest = None


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
        adapter = next((name for name in self.active_adapters if name in self.lofit_heads), None)
        if self.disable_adapters or self.merged or adapter is None:
            return self.base_layer(z)
        layer = self.as_patched(adapter)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._seen = check_seen(layer.parameters(recurse=False), self._seen)
        return layer(z)

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


class LofitModel(BaseTuner):
    """PEFT's tuner of LoFiT: finds the projections and wraps those that the config adapts."""

    prefix = "lofit_"
    tuner_layer_cls = LofitPeftLayer
    target_module_mapping: dict = {}

    def _prepare_adapter_config(self, peft_config: LofitPeftConfig, model_config: dict) -> LofitPeftConfig:
        # the projections are found in the model, see `_prepare_model`
        return peft_config

    def _prepare_model(self, peft_config: LofitPeftConfig, model: nn.Module) -> None:
        """Find the projections and draw the vectors. Raises ValueError for whatever does not fit, nothing changed."""
        if handle_of(model) is not None:
            raise ValueError("the model is patched by lofit_fast.patch: unpatch() or merge() its handle first")
        if fully_sharded(model) and not peft_config.inference_mode:
            raise ValueError(
                "the model is sharded (FSDP2), and nobody would average the gradients of vectors that come later: put "
                "the adapter in first and shard then, or use lofit_fast.patch, which sees to them"
            )
        projections = find_projections(model)
        layers = build_layers(model, peft_config.heads(), projections)
        adapted = [p for p in projections if p.layer in layers]
        for p in adapted:
            if is_tuner_layer(p.module) and not isinstance(p.module, LofitPeftLayer):
                raise ValueError(
                    f"{p.name} has another adapter of PEFT: merge it first, or use lofit_fast.patch, which goes around"
                )
        found = fingerprint(model, projections)
        if peft_config.fingerprint is not None and Fingerprint(**peft_config.fingerprint) != found:
            made_for = Fingerprint(**peft_config.fingerprint)
            raise ValueError(f"the adapter is for another model: it was made for {made_for}, this model is {found}")
        made_for = peft_config.base_model_name_or_path
        check_base(model, peft_config.base_digest, "the adapter", made_for, strict=False)
        peft_config.fingerprint, peft_config.base_digest = found.as_dict(), base_digest(model)
        peft_config.target_modules = {p.name for p in adapted}
        self._drawn = {p.name: (p, layers[p.layer]) for p in adapted}

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        projection, drawn = self._drawn.pop(current_key)
        wrapper = target
        if not isinstance(target, LofitPeftLayer):
            wrapper = LofitPeftLayer(target, projection.n_heads, projection.head_dim)
            wrapper.training = target.training
        if adapter_name == REFERENCE and self.peft_config.get("default") is peft_config:
            _copy_vectors(wrapper.as_patched("default"), drawn)
        wrapper.update_layer(adapter_name, drawn)
        wrapper.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        if wrapper is not target:
            self._replace_module(parent, target_name, wrapper, target)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        # our layers are made where they compute
        setattr(parent, child_name, new_module)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge the active adapter for the time being. Raises ValueError, nothing changed, where a layer cannot."""
        for layer in (m for m in self.model.modules() if isinstance(m, LofitPeftLayer)):
            names = [name for name in adapter_names or layer.active_adapters if name in layer.lofit_heads]
            if set(names) - set(layer.merged_adapters):
                layer.check_in_place(names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def add_weighted_adapter(self, *args, **kwargs) -> None:
        """Refused: scales of two adapters do not add up."""
        raise ValueError("LoFiT has no weighted sum of adapters: scales multiply. Train one, or use set_adapter")

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        for layer in (m for m in self.model.modules() if isinstance(m, LofitPeftLayer) and m.merged):
            layer.unmerge()
        if merge:
            self._merge_for_good(adapter_names or self.active_adapters, safe_merge)
        return super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )

    def _merge_for_good(self, names: list[str], safe_merge: bool) -> None:
        """What `handle.merge` does, the config included. Raises ValueError, nothing changed."""
        if len(names) > 1:
            raise ValueError(f"LoFiT merges one adapter at a time, got {names}")
        projections = find_projections(self.model)
        ours = [p for p in projections if isinstance(p.module, LofitPeftLayer)]
        layers = {p.layer: p.module.as_patched(name) for p in ours for name in names if name in p.module.lofit_heads}
        if safe_merge and not all(v.isfinite().all() for layer in layers.values() for v in layer.parameters(False)):
            raise ValueError(f"adapter {names[0]!r} has numbers that are not finite")
        with self._bases_in_place(ours):
            merge_into_base(self.model, layers, projections, plan_merge(self.model, layers, projections))

    @contextmanager
    def _bases_in_place(self, ours: list[Projection]) -> Iterator[None]:
        """The projections without our layers; an error puts these back."""
        for p in ours:
            setattr(p.parent, p.attribute, p.module.base_layer)
        try:
            yield
        except BaseException:
            for p in ours:
                setattr(p.parent, p.attribute, p.module)
            raise

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs) -> Iterator[None]:
        """Refuses an adapter per row, which PEFT would ignore."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("LoFiT has one active adapter for all rows of a batch: expected no adapter_names")
        yield

    @classmethod
    def _get_adapter_state_dict(
        cls, model, config, adapter_name, state_dict, unwanted_adapter_names
    ) -> dict[str, Tensor]:
        """The vectors by PEFT's names, of which the config that is written beside them has a digest."""
        got = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        parsed = {parse_tensor_name(cls._remove_adapter_name_from_key(key, adapter_name)): t for key, t in got.items()}
        config.expect_to_write({key: tensor for key, tensor in parsed.items() if key is not None})
        return got

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict) -> dict[str, Tensor]:
        """By (component, layer), so that a folder of `handle.save` loads into any model around the same decoder.

        Raises ValueError, nothing read yet, unless the vectors are those of the adapter's heads: into an adapter that
        is there already PEFT reads a folder without a look at its config.
        """
        wanted = {}
        for name, module in model.named_modules():
            if isinstance(module, LofitPeftLayer):
                for component in COMPONENTS:
                    if adapter_name in (table := getattr(module, f"lofit_{component}")):
                        key = f"{name}.lofit_{component}"
                        wanted[parse_tensor_name(key)] = (f"{key}.{adapter_name}", tuple(table[adapter_name].shape))
        ours = {key: parsed for key in state_dict if (parsed := parse_tensor_name(key)) is not None}
        shapes = {parsed: tuple(state_dict[key].shape) for key, parsed in ours.items()}
        expected = {parsed: shape for parsed, (_, shape) in wanted.items()}
        if wrong := sorted(key for key in shapes.keys() | expected.keys() if shapes.get(key) != expected.get(key)):
            component, layer = wrong[0]
            raise ValueError(
                f"cannot load into adapter {adapter_name!r}, which adapts other heads in {len(wrong)} places: "
                f"{component} of layer {layer} is {shapes.get(wrong[0])}, expected {expected.get(wrong[0])}. Load it "
                "under another name, or make the adapter with the heads that the folder has"
            )
        config.check_loaded({parsed: state_dict[key] for key, parsed in ours.items()})
        return {wanted[ours[key]][0] if key in ours else key: tensor for key, tensor in state_dict.items()}


@torch.no_grad()
def _copy_vectors(source: LofitLinear, target: LofitLinear) -> None:
    # TRL copies the adapter that it makes a reference of, but only parameters with ".default." inside their names
    for component in COMPONENTS:
        if (vectors := getattr(target, component)) is not None:
            vectors.copy_(getattr(source, component))


def _register() -> None:
    """Make LOFIT one of PEFT's types. A second time changes nothing."""
    if "LOFIT" not in PeftType.__members__:
        member = str.__new__(PeftType, "LOFIT")
        member._name_, member._value_, member._sort_order_ = "LOFIT", "LOFIT", len(PeftType)
        # an enumeration has no way to grow; these are the tables that it looks its members up in
        type.__setattr__(PeftType, "LOFIT", member)
        PeftType._member_names_.append("LOFIT")
        PeftType._member_map_["LOFIT"] = PeftType._value2member_map_["LOFIT"] = member
    if PeftType.LOFIT not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name="lofit", config_cls=LofitPeftConfig, model_cls=LofitModel)
    # of a module that is imported anew, the newest classes count; files hold the longer name
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LOFIT] = PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = LofitPeftConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LOFIT] = LofitModel


_register()
