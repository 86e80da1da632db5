"""The handle of a patched model: its vectors, its switches, and the way out again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lofit_fast import ranks
from lofit_fast.config import LofitConfig
from lofit_fast.patching.acting import Mask, said
from lofit_fast.patching.architectures import Projection, decoder_layers, fingerprint
from lofit_fast.patching.around_layer import all_around, check_nothing_around
from lofit_fast.patching.fully_sharded import held, is_marked, is_placed, reshard, whole
from lofit_fast.patching.hub_push import push_adapter
from lofit_fast.patching.layer_vectors import is_computed, named_vectors
from lofit_fast.patching.merge import merge_into_base, plan_merge
from lofit_fast.patching.named_adapters import FIRST, SeveralAdapters
from lofit_fast.patching.one_at_a_time import one_at_a_time
from lofit_fast.patching.sharding import check_no_merge, check_whole_vectors, is_shared
from lofit_fast.patching.storage import COMPONENTS, Adapter, check_heads, fill, save_adapter
from lofit_fast.patching.watches import Watches
from lofit_fast.patching.weight_sample import base_digest, base_name
from lofit_fast.patching.wrapping import build_layers


class LofitHandle(SeveralAdapters):
    """A patched model's adapter: its parameters, its switches, and the way back. Others may be added beside it.

    model: the patched model. config: what is adapted. projections: every output projection of the decoder.
    layers: the LofitLinear of each adapted decoder layer, by ascending layer. fingerprint: the base model's shape.
    watches: what is hooked into the model, once it is patched.
    own_name: what the adapter is called among several.
    """

    def __init__(self, model: nn.Module, config: LofitConfig, projections: list[Projection], name: str = FIRST) -> None:
        self.model, self.config, self.projections = model, config, projections
        self.own_name, self._others = name, {}
        self.fingerprint = fingerprint(model, projections)
        self.layers = build_layers(model, config, projections)
        # names, since a parameter may be another object by the time it is given back
        self._frozen = [name for name, p in model.named_parameters() if p.requires_grad]
        self.watches: Watches | None = None
        # of weights in parts each process knows some: all are here now, and need not be when one saves
        self._digest = base_digest(model) if is_shared(model) else ""
        self._live = self._merged = False

    def parameters(self, name: str | None = None) -> Iterator[nn.Parameter]:
        """The adapter's parameters, one per component per adapted layer, by ascending layer.

        name: of one that was added, whose vectors are parameters if it is trained; None for the handle's own.
        """
        if name is not None and self._named(name) is not None:
            return (vectors for vectors in self.other_vectors(name).values() if isinstance(vectors, nn.Parameter))
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """("<layer>.<component>", parameter) of every component, by ascending layer.

        Of one that torch's parametrize or prune computes it is what that is computed from, by its path in the layer.
        """
        self._show_parts()
        for number, layer in self.layers.items():
            for name, parameter in named_vectors(layer):
                yield f"{number}.{name}", parameter

    def n_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    def requires_grad_(self, requires_grad: bool = True) -> LofitHandle:
        """Let the vectors be trained, or freeze them on purpose, whatever another tool has done to them."""
        self.check_live()
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        self.watches.peft.told = True
        return self

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """A scope in which the model computes what the base computes, for the thread, or task, that has entered it.

        Threads that are started inside begin outside of it, as context variables have it: run their work in
        `contextvars.copy_context()`, as `asyncio.to_thread` does by itself. A forward that checkpoints its layers keeps
        its scopes for their second run. Scopes may be nested, and left in any order.
        """
        self.check_live()
        with self.scopes.disabled():
            yield

    @contextmanager
    def folded(self) -> Iterator[None]:
        """A no-grad scope, for evaluation and generation, in which every W v is computed once and reused.

        A weight or vectors that change inside it are folded anew, unless they are written to through `.data`; in a
        model compiled whole nothing but a loaded state_dict is seen. It holds where `disabled` would; that gradients
        are off is torch's part, which knows threads alone: a task that waits inside leaves them off for the others of
        its thread.
        """
        self.check_live()
        with torch.no_grad(), self.scopes.folded(list(self.layers.values())):
            yield

    @contextmanager
    def acting_on(self, mask: Mask) -> Iterator[None]:
        """A scope that says on which tokens the vectors act, for forwards that do not say where their answers begin.

        mask: (B, S) bool for the forwards inside, true where the vectors act, or "all" for every token. It holds in
        the thread, or task, that has entered the scope.
        Raises TypeError / ValueError for anything else, and ValueError for vectors that act everywhere in any case.
        """
        self.check_live()
        if self.acting is None:
            raise ValueError(
                "the vectors act on every token (positions='all'): acting_on is for LofitConfig(positions='answer')"
            )
        with said(self.acting, mask):
            yield

    def check_everywhere(self, action: str) -> None:
        """Raise ValueError for vectors that act on answers alone. action: what a plain model is wanted for."""
        if self.config.positions != "all":
            raise ValueError(
                f"cannot {action}: the vectors act on answers alone (positions='answer'), and a plain model cannot "
                "tell a prompt from an answer. Keep the adapter folder, which lofit_fast.load puts into the base"
            )

    def vectors(self) -> dict[tuple[str, int], nn.Parameter]:
        """The adapter's parameters by (component, layer), where component is "scale" or "offset": (h, D) each.

        Where FSDP2 shards them each process has some of their rows: see `whole_vectors`.
        """
        self._show_parts()
        return {
            (component, number): vectors
            for number, layer in self.layers.items()
            for component in COMPONENTS
            if (vectors := getattr(layer, component)) is not None
        }

    @property
    def in_parts(self) -> bool:
        """Whether each process has some rows of the vectors alone, as FSDP2 shards those of a model patched before."""
        return any(map(is_placed, self.vectors().values()))

    def whole_vectors(self) -> dict[tuple[str, int], torch.Tensor]:
        """As `vectors`, with all their rows, detached: where FSDP2 shards them, all processes must call it."""
        return {key: whole(vectors) for key, vectors in self.vectors().items()}

    def adapter(self, name: str | None = None) -> Adapter:
        """What `save` writes; the tensors are the handle's own, but for those that FSDP2 shards.

        name: of several; None for the one active here. Where FSDP2 shards the vectors (`in_parts`) all processes must
        call it, and each gets the whole adapter. Raises ValueError for vectors that are in parts otherwise, and after
        `merge`, whose model has them already. After `unpatch` it is for the base with the weights that it has then.
        """
        self.check_unmerged()
        if (name := self.active if name is None else name) is None:
            raise ValueError("cannot save the base, which is active (set_active(None)): name the adapter")
        if self._named(name) is not None:
            return self.other_adapter(name)
        self.check_vectors("save")
        if self.watches is not None:
            self.watches.load.remind()
        base = base_name(self.model)
        # a PeftModel's own level is none of the base model
        modules = {
            p.layer: p.name.removeprefix("base_model.model.") for p in self.projections if p.layer in self.layers
        }
        tensors = {key: whole(v) if is_placed(v) else v for key, v in self.vectors().items()}
        digest = self._digest or base_digest(self.model)
        return Adapter(self.config, tensors, self.fingerprint, base, modules, digest)

    def take(self, adapter: Adapter) -> None:
        """Copy an adapter of the same heads into the handle's own, which must be active.

        Raises ValueError where a tensor does not fit or is not finite, for vectors of other heads or that act on other
        positions, where the handle's own are computed from other parameters, and while any thread is inside `folded`,
        which would go on with the old vectors. The handle keeps its vectors then.
        """
        self.check_own("load vectors")
        self.check_vectors("load")
        check_heads(adapter, self.config)
        if adapter.config.positions != self.config.positions:
            raise ValueError(
                f"cannot load vectors with positions={adapter.config.positions!r} into a handle with "
                f"positions={self.config.positions!r}: lofit_fast.load patches as the folder says"
            )
        for number, layer in self.layers.items():
            if computed := [component for component in COMPONENTS if is_computed(layer, component)]:
                raise ValueError(
                    f"cannot load vectors into layer {number}, whose {computed[0]} is computed from other parameters "
                    "(parametrize, prune, weight_norm): undo that first"
                )
        if self.scopes.folding():
            raise ValueError(
                "cannot load vectors inside handle.folded(), of this thread or another, which computes with the old "
                "ones: leave it first"
            )
        fill(self.vectors(), adapter)
        if self.watches is not None:
            self.watches.load.settled()

    def save(self, folder: Path | str, name: str | None = None) -> Path:
        """Write the adapter folder; see `storage.save_adapter`. name: of several; None for the one active here.

        Raises as `adapter` does, after `merge` among others; a handle that has ended with `unpatch` still saves.
        Of a model that FSDP2 shards, and of a tensor-parallel one, the first process writes. Where the vectors are
        sharded too (`in_parts`) all must call it, and what the first one raises all raise.
        """
        adapter = self.adapter(name)
        if self.in_parts:
            return ranks.told(lambda: save_adapter(adapter, folder))
        if ranks.first() or not is_shared(self.model):
            return save_adapter(adapter, folder)
        return Path(folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Put the active adapter on the hub, with a model card; see `hub_push.push_adapter` for options and errors.

        Of a model that several processes hold together the first one pushes, as `save` writes. Where the vectors are in
        parts all get the address of the commit; elsewhere the others get repo_id. Raises as `adapter` does too.
        """
        adapter = self.adapter()
        if self.in_parts:
            return ranks.told(lambda: push_adapter(adapter, repo_id, **options))
        if ranks.first() or not is_shared(self.model):
            return push_adapter(adapter, repo_id, **options)
        return repo_id

    @one_at_a_time
    def unpatch(self) -> nn.Module:
        """Put the base layers back, the very same objects, trainable as they were. Ends the handle.

        `save` and `push_to_hub` go on, for the base as it is: call them before anything changes its weights.
        A base layer that something else has wrapped since (LoRA, say) comes back with its wrapping. Hooks and a forward
        that somebody has put on ours go with it, and a warning names the layers. Raises ValueError,
        before anything is changed, when something else has wrapped ours, or another thread or task is inside a scope.
        """
        self.check_live()
        self.scopes.check_alone("unpatch")
        adapted = [p for p in self.projections if p.layer in self.layers]
        for p in adapted:
            if getattr(p.parent, p.attribute) is not self.layers[p.layer]:
                raise ValueError(f"cannot unpatch: {p.name} has been replaced since; undo that first")
        if lost := all_around(self.layers):
            number, what = next(iter(lost.items()))
            warnings.warn(
                f"unpatching drops what was put on LoFiT's module after lofit_fast.patch: in {len(lost)} of "
                f"{len(self.layers)} layers, {what} in layer {number}. Put it on the base's projection now",
                stacklevel=3,
            )
        reshard(self.model)
        # then it is PEFT that holds the base frozen
        peft_entered = self.watches.peft.entered_since()
        for p in adapted:
            setattr(p.parent, p.attribute, self.layers[p.layer].inner)
        parameters = {} if peft_entered else dict(self.model.named_parameters())
        for name in self._frozen:
            if name in parameters:
                parameters[name].requires_grad_(True)
        self.watches.remove()
        self._live = False
        return self.model

    @one_at_a_time
    def merge(self) -> nn.Module:
        """Write the adapter, of several the one active here, into the base weights; ends the handle.

        Save before, where the adapter is wanted too: the merged model is another base, and saving is refused then.
        W' = W diag(1 + a), b' = b + W v, rounded once to the base dtype. Returns the plain model. Its config is set so
        that it saves and reloads with its biases, where its family can (else use `export`).
        Raises ValueError, before anything is changed, when a tuned projection is not plain (quantized, sharded,
        offloaded, hooked, under another adapter), when hooks or another forward were put on it since, when its weights
        are used elsewhere in the model too, for vectors that act on answers alone, and while another thread or task is
        inside a scope.
        """
        self.check_live()
        self.scopes.check_alone("merge")
        self.check_everywhere("merge")
        check_no_merge(self.model)
        check_nothing_around(self.layers, "merge")
        layers = self.layers_with(self.active, "merge")
        plan = plan_merge(self.model, layers, self.projections)
        self.unpatch()
        # before: a merge that fails has written some of it
        self._merged = True
        merge_into_base(self.model, layers, self.projections, plan)
        return self.model

    def copied_whole(self, memo: Mapping[int, Any]) -> bool:
        """Whether a copy that goes on is one of the whole model, its decoder or this handle, and not of a part of it.

        memo: of `copy.deepcopy`, what is being copied and what was, by id.
        """
        if id(self) in memo or id(self.model) in memo:
            return True
        layers = decoder_layers(self.model)
        parts = {id(module) for layer in layers for module in layer.modules()}
        around = (m for m in self.watches.ancestors if not isinstance(m, nn.ModuleList | nn.ModuleDict))
        return any(id(module) in memo and id(module) not in parts for module in around)

    def _show_parts(self) -> None:
        """Put the trained parts back into the layers: some forwards of FSDP leave gathered vectors in their place."""
        if any(map(is_marked, self.layers.values())):
            reshard(self.model)

    def attach(self) -> None:
        """Put the layers into the model, and freeze the rest of it: what `patch` does last."""
        self.model.requires_grad_(False)
        for projection in self.projections:
            if layer := self.layers.get(projection.layer):
                layer.handle = self
                # not train(), which would reach into the base
                layer.training = projection.module.training
                setattr(projection.parent, projection.attribute, layer)
        self.watches = Watches(self.model, self.projections, self.layers, list(self.parameters()))
        self._live = True

    def check_vectors(self, action: str) -> None:
        """Raise ValueError when the vectors are not whole in this process, nor can be gathered.

        action: what they are for.
        """
        self._show_parts()
        known = held(self.model)
        vectors = (
            (f"layer {number}'s {component}", getattr(layer, component, None), (len(heads), layer.head_dim))
            for number, layer in self.layers.items()
            for component in COMPONENTS
            if (heads := layer.heads(component)) and (id(layer), component) not in known
        )
        check_whole_vectors(vectors, action)
