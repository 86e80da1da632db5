"""A module in the place of another: what torch saves, loads, copies, moves and replicates is the other's."""

import copy
from collections.abc import Callable

from torch import Tensor, nn

from lofit_fast.patching.acting import Acting, said_for
from lofit_fast.patching.architectures import outputs_of
from lofit_fast.patching.bypass import BypassWatch, Called, weight_is_read
from lofit_fast.patching.offset_table import OffsetTable
from lofit_fast.patching.peft_layers import INNER, NameBelow, is_tuner_layer
from lofit_fast.patching.placement import at_least_float32, check_hook, computed_on, in_memory
from lofit_fast.patching.scopes import Fixed, Here, Scopes
from lofit_kernels import head_index

# where torch's parametrize keeps what it computes tensors from
PARAMETRIZED = "parametrizations"


class StandIn(nn.Module):
    """What a `LofitLinear` is to torch and to other code, beside its forward.

    Its fields, `heads` and `fold_table` are there. `state_dict` has the base layer's keys and nothing
    else: the adapter's tensors live in the adapter folder.
    """

    inner: nn.Module
    n_heads: int
    head_dim: int
    here: Here
    scopes: Scopes
    called: Called
    bypass: tuple[BypassWatch, ...]
    acting: Acting | None
    others: OffsetTable | None
    # heads by component, "scale" and "offset": ascending, None if absent
    _heads: dict[str, list[int] | None]

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, (N, K). Raises AttributeError for a base without one, as packed ones are."""
        weight_is_read(self)
        return self.inner.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias, (N,) or None: never the folded offsets. Raises AttributeError for a base without."""
        return self.inner.bias

    @property
    def in_features(self) -> int:
        """K = n_heads * head_dim."""
        return self.n_heads * self.head_dim

    @property
    def out_features(self) -> int:
        """N, the hidden size."""
        return outputs_of(self.inner)

    def state_dict(self, *args, **kwargs):
        """The base layer's state under the base layer's own names."""
        return self.inner.state_dict(*args, **kwargs)

    def named_modules(self, memo: set | None = None, prefix: str = "", remove_duplicate: bool = True):
        """As of any module; names below a layer of PEFT are formatted as the keys of `state_dict`."""
        found = super().named_modules(memo, prefix, remove_duplicate)
        if not is_tuner_layer(self.inner):
            return found
        below = f"{prefix}.{INNER}" if prefix else INNER
        return ((NameBelow(n, prefix) if n.startswith(below) else n, module) for n, module in found)

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("weight", "bias"):
            if self.scopes.folding():
                raise ValueError(f"cannot set {name} inside handle.folded(), which computes with the old one")
            setattr(self.inner, name, value)
            self.fold_table()
            return
        if name == "_hf_hook":
            check_hook(value)
        super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict) -> "StandIn":
        # what PEFT does to a module that it trains whole, and to layers that it replicates: the copy would be out of
        # the handle's reach
        handle = vars(self).get("handle")
        if not memo or (handle is not None and not handle.copied_whole(memo)):
            raise ValueError(
                "a projection with LoFiT, or a part of the model that holds one, cannot be copied or trained by itself "
                "as by PEFT's modules_to_save and layer_replication: copy the whole model, or unpatch or merge it first"
            )
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(vars(self), memo))
        return copied

    def _replicate_for_data_parallel(self) -> "StandIn":
        # threads of its own run a replica, and are in none of our scopes
        if self.here.chosen is not None:
            raise ValueError("nn.DataParallel takes a batch apart: expected no handle.rows() or set_active() around it")
        if self.acting is not None and said_for(self.acting) is not None:
            raise ValueError(
                "nn.DataParallel takes a batch apart, and leaves a mask whole: expected no handle.acting_on() around "
                "it, but labels in the batch, which say where the answers begin"
            )
        replica = super()._replicate_for_data_parallel()
        replica.here, replica.scopes = Fixed(self.here.off), Scopes()
        return replica

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # the children are filled after this call, from keys below theirs
        own = [key for key in state_dict if key.startswith(prefix)]
        if self.others is not None:
            self.others.stale = True
        for key in own:
            state_dict[f"{prefix}inner.{key[len(prefix) :]}"] = state_dict.pop(key)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        if recurse:
            self.inner._apply(fn)
            if PARAMETRIZED in self._modules:
                self._modules[PARAMETRIZED]._apply(in_memory(at_least_float32(fn)))
        super()._apply(in_memory(at_least_float32(fn)), recurse=False)
        if recurse and self.others is not None:
            self.others._apply(in_memory(at_least_float32(fn)))
        self.place_heads()
        if recurse:
            self.fold_table()
        return self

    def place_heads(self) -> None:
        """The lists of heads as indices beside the vectors: rebuilt, since to_empty() leaves buffers undefined."""
        for component, heads in self._heads.items():
            if heads is not None:
                device = computed_on(getattr(self, component))
                setattr(self, f"{component}_heads", head_index(heads, self.n_heads, device))

    def extra_repr(self) -> str:
        """What is adapted, for print(model)."""
        adapted = [f"{c}={len(self.heads(c))}/{self.n_heads} heads" for c in ("scale", "offset") if self.heads(c)]
        return ", ".join(adapted if self.acting is None else [*adapted, "on answers alone"])
