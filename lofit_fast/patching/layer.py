"""LofitLinear: one output projection with scales and offsets on some of its heads."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lofit_fast.patching.acting import UNKNOWN, Acting, laid_like
from lofit_fast.patching.bypass import BypassWatch, Called
from lofit_fast.patching.chosen_adapters import folded_with, projected_with
from lofit_fast.patching.early_fold import EarlyFold
from lofit_fast.patching.frozen_linear import PRODUCTS, own_products
from lofit_fast.patching.fully_sharded import is_placed
from lofit_fast.patching.offset_table import OffsetTable
from lofit_fast.patching.placement import device_of, dtype_of, moving_hook
from lofit_fast.patching.plain_linear import plain_tensors
from lofit_fast.patching.row_parallel import row_parallel_tensors
from lofit_fast.patching.scopes import Here, Scopes
from lofit_fast.patching.stand_in import PARAMETRIZED, StandIn
from lofit_fast.patching.tensor_parallel import own_input, own_vectors, placed_weight, rejoined, share_of, summed
from lofit_kernels import fold_offset, fold_offsets, head_affine, head_affine_linear
from lofit_kernels.dispatch import folds_beforehand, is_many
from lofit_kernels.layer_fold import folded_linear
from lofit_kernels.made_of import MadeOf
from lofit_kernels.quantized_linear import FrozenWeight, quantized_linear

_HEADS = {"scale": "scale_heads", "offset": "offset_heads"}
CUT_OFF = (
    "that gives no gradient to its inputs, as kernels made for inference alone do: load the base in a format that can "
    "be trained through (bitsandbytes, weight-only torchao), or run it under torch.no_grad()"
)


class LofitLinear(StandIn):
    """y = ((1 + a) * z + v) W^T + b around a base projection that stays as it is.

    inner: the module that computes z W^T + b, with in_features = n_heads * head_dim.
    scale, offset: parameters (h, D), float32 (float64 after `.double()`), rows by ascending head; None if absent.

    The fused path runs only where it can see everything: an exact, unhooked nn.Linear with a dense weight, or one
    that accelerate moves from device to device. Otherwise `inner` is called on the affine heads, so that hooks, LoRA
    and quantized weights are never bypassed.
    around: modules that tell where and in what an inner module without parameters computes, the nearest first.
    """

    def __init__(
        self,
        inner: nn.Module,
        n_heads: int,
        head_dim: int,
        scale_heads: list[int] | None,
        offset_heads: list[int] | None,
        around: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.inner = inner
        self.n_heads, self.head_dim = n_heads, head_dim
        # what scopes and forwards say to this layer, for each thread apart; a handle's layers share its scopes
        self.here = Here()
        self.scopes = Scopes((self.here,))
        # whether it was called, and who wants to know if its weight was read instead
        self.called = Called()
        self.bypass: tuple[BypassWatch, ...] = ()
        # one of PEFT's layers in the model, see `peft_layers.PeftWatch`
        self.peft: tuple[nn.Module, ...] = ()
        # how a scale is computed, see `lofit_kernels.dispatch`: "pass", "delta" or "dither" insists
        self.form = "auto"
        # where vectors for answers alone act in the forward that is running; None for vectors that act everywhere
        self.acting: Acting | None = None
        # the offsets of adapters beside the handle's own
        self.others: OffsetTable | None = None
        dtype = torch.promote_types(dtype_of(inner, *around), torch.float32)
        device = device_of(inner, *around)
        self._heads = {"scale": scale_heads, "offset": offset_heads}
        for component, heads in (("scale", scale_heads), ("offset", offset_heads)):
            shape = None if heads is None else (len(heads), head_dim)
            rows = None if shape is None else torch.zeros(shape, dtype=dtype, device=device)
            self.register_parameter(component, None if rows is None else nn.Parameter(rows))
            self.register_buffer(f"{component}_heads", None, persistent=False)
        self.place_heads()
        self.register_load_state_dict_post_hook(_loaded)

    def forward(self, z: Tensor) -> Tensor:
        """z: (..., K), attention output before the projection. Returns (..., N)."""
        inner = self._modules["inner"]
        self.called.once = True
        if self.scopes.asks:
            self.scopes.look()
        if self.here.off or (self.peft and not self.active):
            return inner(z)
        chosen = self.here.chosen
        if chosen is not None and chosen.base:
            return inner(z)
        mask = None if self.acting is None else self._mask(z)
        plain = plain_tensors(inner)
        if chosen is not None:
            return projected_with(self, z, plain, mask, _through)
        if plain is not None:
            # looked up without a call: this is asked in every forward
            if PRODUCTS in inner.__dict__ and torch.is_grad_enabled() and not plain[0].requires_grad:
                return self._in_8_bits(z, plain, own_products(inner), mask)
            return self._fused(z, plain) if mask is None else self._fused_where(mask, z, plain)
        hook = moving_hook(inner) if plain_tensors(inner, moved=True) is not None else None
        if hook is None:
            placed = placed_weight(inner)
            if placed is not None:
                return self._in_share(z, placed, mask)
            vectors = {}
            for component, heads in self._heads.items():
                if heads is not None:
                    vectors[component], vectors[_HEADS[component]] = self._vectors(component)
            affine = head_affine(z, **vectors)
            return _through(inner, affine if mask is None else torch.where(mask, affine, z))
        (z,), _ = hook.pre_forward(inner, z)
        # an offloaded weight is there only now
        plain = plain_tensors(inner, moved=True)
        y = self._fused(z, plain) if mask is None else self._fused_where(mask.to(z.device), z, plain)
        return hook.post_forward(inner, y)

    def _in_share(self, z: Tensor, placed: Tensor, mask: Tensor | None) -> Tensor:
        """y of a projection that several processes compute together: this one's heads alone have vectors here.

        The projection adds up what the processes have, W v among it, and adds its bias once.
        placed: its weight. mask: where the vectors act, (..., 1); None for everywhere.
        """
        inner = self._modules["inner"]
        share = share_of(placed, z, self.n_heads, self.head_dim)
        known = None if is_placed(z) else row_parallel_tensors(inner)
        cut = None if known is None else own_input(share, placed, self.head_dim)
        share = cut or share
        rows = {}
        for component, heads in self._heads.items():
            if heads is not None:
                vectors, index = self._vectors(component)
                rows[component] = (vectors, heads, index)
        vectors = {}
        for component, (own, index) in own_vectors(share, rows).items():
            vectors[component], vectors[_HEADS[component]] = own, index
        if cut is None:
            affine = head_affine(share.z, **vectors)
            affine = affine if mask is None else torch.where(mask, affine, share.z)
            return _through(inner, rejoined(affine, z))
        weight, bias = known
        # where few of all heads have a scale, small scales act, even if those are many of this process's heads
        few = self._heads["scale"] is not None and not is_many(len(self._heads["scale"]), self.n_heads)
        form = "delta" if few and self.form == "auto" and weight.element_size() < 4 else self.form
        y = head_affine_linear(share.z, weight, **vectors, form=form)
        if mask is not None:
            y = torch.where(mask, y, nn.functional.linear(share.z, weight))
        return summed(y, placed, bias)

    def _mask(self, z: Tensor) -> Tensor | None:
        """(..., 1) bool, true where the vectors act; None for everywhere. Raises ValueError where nobody has said."""
        mask = self.acting.mask
        if mask is None:
            raise ValueError(UNKNOWN)
        return laid_like(mask, z) if isinstance(mask, Tensor) else None

    def _fused_where(self, mask: Tensor, z: Tensor, plain: tuple[Tensor, Tensor | None]) -> Tensor:
        """y (..., N) with the vectors where the mask (..., 1) is true, and the base's elsewhere.

        y = z W^T + b + mask (W v). An offset by itself takes one product. A scale takes two: where it acts, y has the
        very numbers that a scale on every token gives.
        """
        weight, bias = plain
        y = nn.functional.linear(z, weight, bias)
        if self._heads["scale"] is None and self._heads["offset"] is None:
            # adapters beside the handle's own alone have vectors here
            return y
        if self._heads["scale"] is not None or (weight.requires_grad and torch.is_grad_enabled()):
            return torch.where(mask, self._fused(z, plain), y)
        offset, heads = self._vectors("offset")
        if torch.is_grad_enabled() and offset.requires_grad:
            early = self._counting(self.here.folded, weight)
            folded = fold_offsets([weight], [offset], [heads])[0] if early is None else early.exact
        else:
            kept = self._counting(self.here.kept, weight)
            folded = fold_offset(weight, offset, heads) if kept is None else kept.exact
        # in float32 at least, and rounded once more
        return (y + mask * folded).to(y.dtype)

    def _fused(self, z: Tensor, plain: tuple[Tensor, Tensor | None]) -> Tensor:
        """y (..., N) beside the weight and the bias of a plain linear."""
        weight, bias = plain
        listed, early = self._heads, self.here.folded
        if (
            early is not None
            and early.ready is not None
            and listed["scale"] is None
            and bias is None
            and torch.is_grad_enabled()
            and early.counts(weight, self.own("offset"))
        ):
            return folded_linear(z, early.ready)
        scale = scale_heads = offset = offset_heads = folded = None
        if listed["scale"] is not None:
            scale, scale_heads = self._vectors("scale")
        if listed["offset"] is not None:
            offset, offset_heads = self._vectors("offset")
            folded = self._folded_offset(weight, offset, offset_heads)
            if folded is not None:
                offset = offset_heads = None
        return head_affine_linear(
            z,
            weight,
            bias,
            scale=scale,
            scale_heads=scale_heads,
            offset=offset,
            offset_heads=offset_heads,
            folded=folded,
            form=self.form,
        )

    def _in_8_bits(
        self, z: Tensor, plain: tuple[Tensor, Tensor | None], products: FrozenWeight, mask: Tensor | None
    ) -> Tensor:
        """y (..., N) with the product of z alone in 8 bits: the offsets are folded with the weight itself, and added.

        mask: where the vectors act, (..., 1); None for everywhere.
        """
        weight, bias = plain
        vectors, shift = {}, None
        if self._heads["scale"] is not None:
            vectors["scale"], vectors["scale_heads"] = self._vectors("scale")
        if self._heads["offset"] is not None:
            offset, heads = self._vectors("offset")
            shift = self._folded_offset(weight, offset, heads)
            if shift is None:
                shift = fold_offsets([weight], [offset], [heads])[0]
        affine = head_affine(z, **vectors)
        if mask is None:
            both = shift if bias is None or shift is None else shift + bias
            return quantized_linear(affine, products, bias if both is None else both)
        y = quantized_linear(torch.where(mask, affine, z), products, bias)
        return y if shift is None else (y + mask * shift).to(y.dtype)

    @property
    def active(self) -> bool:
        """Whether the vectors are applied: neither a scope here nor PEFT, for everybody, has switched them off."""
        if self.scopes.asks or not torch.compiler.is_compiling():
            self.scopes.look()
        chosen = self.here.chosen
        if self.here.off or (chosen is not None and chosen.base):
            return False
        return not any(layer.disable_adapters for layer in self.peft)

    def foldable(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """(weight, offset, heads) where a forward that builds a graph needs one through W v alone; None elsewhere."""
        if self.here.off or self.here.chosen is not None or (self.peft and not self.active):
            return None
        # a hook of the projection's own, as pruning has one, or a parametrization may change the vectors until then
        if self._heads["offset"] is None or self._forward_pre_hooks or PARAMETRIZED in self._modules:
            return None
        offset, heads = self._vectors("offset")
        plain = self._readable() if offset.requires_grad else None
        if plain is None or plain[0].requires_grad:
            return None
        # an offset by itself always does
        alone = plain[1] is None and self._heads["scale"] is None and self.form == "auto"
        return (plain[0], offset, heads) if alone or self._takes_folded(*plain) else None

    def _readable(self) -> tuple[Tensor, Tensor | None] | None:
        """(weight, bias) of a projection that is plain, but for a hook that moves tensors; None of any other."""
        inner = self._modules["inner"]
        plain = plain_tensors(inner)
        if plain is None and (moved := plain_tensors(inner, moved=True)) is not None and moving_hook(inner) is not None:
            return moved
        return plain

    def _vectors(self, component: str) -> tuple[Tensor, Tensor]:
        """The vectors of a component that is there, in float32 at least, and their heads."""
        own = self._parameters
        # `own`, without its call
        vectors = own[component] if component in own else getattr(self, component)
        # FSDP's mixed precision hands a layer its parameters in 16 bits
        return vectors if vectors.element_size() >= 4 else vectors.float(), self._buffers[_HEADS[component]]

    def own(self, component: str) -> Tensor | None:
        """The vectors of a component as they are, None where there are none."""
        own = self._parameters
        # a parameter's name is looked up elsewhere first; what shards a model makes it a plain attribute
        return own[component] if component in own else getattr(self, component)

    def _counting(self, early: EarlyFold | None, weight: Tensor) -> EarlyFold | None:
        """What was folded before this forward; None where nothing was, or a tensor has changed since."""
        return early if early is not None and early.counts(weight, self.own("offset")) else None

    def _takes_folded(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether the projection takes W v, and not the offset itself."""
        return self.form in ("pass", "delta") or (self.form == "auto" and folds_beforehand(weight, self.scale, bias))

    def _folded_offset(self, weight: Tensor, offset: Tensor, heads: Tensor) -> Tensor | None:
        """W v for this call, (N,); None where the op is to fold the offset."""
        if not torch.is_grad_enabled():
            kept = self._counting(self.here.kept, weight)
            return None if kept is None else kept.exact
        if weight.requires_grad or not offset.requires_grad or not self._takes_folded(weight, self.inner.bias):
            return None
        # a hook of the layer may have put the weight there, or written to it or to the vectors, after the model's fold
        early = self._counting(self.here.folded, weight)
        return fold_offsets([weight], [offset], [heads])[0] if early is None else early.exact

    def fold(self) -> EarlyFold | None:
        """W v as it is now, for forwards without gradients; None where they take the offset itself."""
        plain = self._readable() if self.offset is not None else None
        # one that is offloaded comes with its forward
        if plain is None or plain[0].is_meta or not self._takes_folded(*plain):
            return None
        exact = fold_offset(plain[0], *self._vectors("offset"))
        return EarlyFold(exact, plain[0], MadeOf(plain[0], self.own("offset")))

    def fold_table(self, room: int = 0) -> None:
        """Fold the table of other adapters, if there is one and its weight has changed. room: slots that it must have.

        A model that is compiled whole has nobody else who looks.
        """
        if self.others is not None:
            plain = plain_tensors(self._modules["inner"])
            # one that is offloaded comes with its forward
            self.others.ready(None if plain is None or plain[0].is_meta else plain[0], room)

    def freshen(self) -> None:
        """Fold anew what forwards here reuse, if a tensor has changed: a layer that is compiled does not look."""
        kept, chosen = self.here.kept, self.here.chosen
        if kept is not None:
            weight = self.inner._parameters.get("weight")
            if weight is None or not kept.counts(weight, self.own("offset")):
                with torch.no_grad():
                    self.here.kept = self.fold()
        if self.others is not None and chosen is not None and not chosen.base:
            weight = folded_with(plain_tensors(self._modules["inner"]))
            if weight is None or not weight.is_meta:
                self.others.ready(weight, chosen.room)

    def heads(self, component: str) -> list[int]:
        """The heads that carry a component ("scale" or "offset"), ascending; empty if it is absent."""
        return list(self._heads[component] or [])


def _loaded(layer: LofitLinear, incompatible_keys: object) -> None:
    """Fold what a layer reuses with the weight that a state_dict has brought."""
    layer.freshen()
    layer.fold_table()


def _through(base: nn.Module, affine: Tensor) -> Tensor:
    """The base module's output. Raises ValueError where it would cut the gradient off without a word."""
    output = base(affine)
    if affine.requires_grad and torch.is_grad_enabled() and not output.requires_grad:
        raise ValueError(f"cannot train through a {type(base).__name__} {CUT_OFF}")
    return output
