"""LofitModel: what PEFT calls to put adapters of LoFiT into a model, to read and write them, and to merge them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from lofit_fast.patching.architectures import Fingerprint, Projection, find_projections, fingerprint
from lofit_fast.patching.around_layer import check_nothing_around
from lofit_fast.patching.bypass import BypassWatch
from lofit_fast.patching.fold import decoder_of
from lofit_fast.patching.fully_sharded import sharded_from_outside
from lofit_fast.patching.layer import LofitLinear
from lofit_fast.patching.merge import merge_into_base, plan_merge
from lofit_fast.patching.patched import handle_of
from lofit_fast.patching.peft_layers import REFERENCE, is_tuner_layer
from lofit_fast.patching.sharding import gathers_weights
from lofit_fast.patching.storage import COMPONENTS, parse_tensor_name
from lofit_fast.patching.weight_sample import base_digest, check_base
from lofit_fast.patching.wrapping import build_layers
from lofit_fast.peft.lofit_peft_config import LofitPeftConfig
from lofit_fast.peft.lofit_peft_layer import LofitPeftLayer


class LofitModel(BaseTuner):
    """PEFT's tuner of LoFiT: finds the projections and wraps those that the config adapts."""

    prefix = "lofit_"
    tuner_layer_cls = LofitPeftLayer
    target_module_mapping: dict = {}
    # of all layers, from the first adapter to `unload`
    _watch: BypassWatch | None = None

    def _prepare_adapter_config(self, peft_config: LofitPeftConfig, model_config: dict) -> LofitPeftConfig:
        # the projections are found in the model, see `_prepare_model`
        return peft_config

    def _prepare_model(self, peft_config: LofitPeftConfig, model: nn.Module) -> None:
        """Find the projections and draw the vectors. Raises ValueError for whatever does not fit, nothing changed."""
        if handle_of(model) is not None:
            raise ValueError("the model is patched by lofit_fast.patch: unpatch() or merge() its handle first")
        if not peft_config.inference_mode and (gathers_weights(model) or sharded_from_outside(model) is not None):
            raise ValueError(
                "the model is sharded (FSDP), and nobody would average the gradients of vectors that come later: put "
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
        if self._watch is None:
            self._watch = BypassWatch(decoder_of(model, [p.name for p in projections]))

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
            self._watch.add(wrapper, parent, current_key)

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
        self._watch.remove()
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
        check_nothing_around({p.layer: p.module for p in ours}, "merge")
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
