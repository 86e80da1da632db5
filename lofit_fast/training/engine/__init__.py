"""How a step is run: attention, compiled layers, packed or grouped batches. Speed and rounding change, no result."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import nn

from lofit_fast.data.collate import Batch, CompletionCollator, Logits
from lofit_fast.data.encode import Encoded
from lofit_fast.data.pack import GROUPED, PackedCollator
from lofit_fast.patching.architectures import decoder_layers
from lofit_fast.patching.placement import device_of
from lofit_fast.training.engine.attention_scope import attending
from lofit_fast.training.engine.compiled_layers import compiled
from lofit_fast.training.engine.cpu_extras import held_in_large_pages, prepacked
from lofit_fast.training.engine.frozen_products import quantized
from lofit_fast.training.engine.last_layer import narrowed

Choice = bool | Literal["auto"]
FrozenProducts = Literal["full", "int8", "fp8", "auto"]
# what `Engine.fast` has instead of the defaults
FAST_ENGINE: dict[str, object] = {"prefix_cache_gb": "auto", "frozen_products": "auto"}
# the knobs that are True, False or "auto"
SWITCHES = ("compile", "packing", "narrow", "large_pages", "prepack")
# those that say how much disk a run may take, in 10^9 bytes
ON_DISK = ("prefix_cache_gb", "prompt_cache_gb")
# those that a run may be gone on with otherwise than it began
CHANGEABLE = (*ON_DISK, "verify", "prepack")


@dataclass(frozen=True)
class Engine:
    """The knobs of speed. None changes a result beyond rounding, but frozen_products, and grouping picks other batches.

    Args:
        attention: transformers' attn_implementation ("sdpa", "flash_attention_2", ...), our "lofit_grouped" or
            "lofit_causal", or "auto".
        compile: torch.compile each decoder layer, one graph for all batch lengths; True, False or "auto".
        group_by_length: draw batches of examples of like length, in random order; False shuffles plainly.
        packing: lay a batch's examples end to end in one row instead of padding them, see `collator_of`; True, False
            or "auto".
        prefix_cache_gb: disk for the activations below the lowest tuned layer, in 10^9 bytes; 0 keeps none. "auto": a
            tenth of the disk's room where a count says that it pays, see `prefix_cache.worth`; else 0.
        prompt_cache_gb: disk for the prompts' keys and values where vectors act on answers alone, in 10^9 bytes, see
            `prompt_store.prompts_kept`; 0 takes prompts through the model in every step; a number or "auto".
        narrow: run the last layer's MLP on the rows whose logits are kept only, see `last_layer.narrowed`; False for a
            model whose last layer somebody listens to; True, False or "auto".
        frozen_products: how products with frozen weights are computed in training: "full", or quantized to "int8" or
            "fp8", see `frozen_products.quantized`; "auto" is int8 where a float32 model is on a CPU that is known to
            be faster so. Other than "full" changes results beyond rounding.
        large_pages: on a CPU, hold the heap in large pages between steps, see `cpu.heap`; True, False or "auto".
        prepack: of a float32 model on a CPU, keep the frozen weights in the layout that oneDNN multiplies by, for each
            direction as many bytes as they have, see `cpu.prepacked_weights`; True, False or "auto".
        verify: compute the first batch of every shape twice more, by the fused layers and by plain products; where the
            two differ by more than rounding, go on with plain ones, and say so. See `verify_steps`.

    "auto" is settled before a run by rules on the device, the model and the amount of work, see `auto.settle`.

    Raises:
        TypeError, ValueError: a value of another kind.
    """

    attention: str = "auto"
    compile: Choice = "auto"
    group_by_length: bool = True
    packing: Choice = "auto"
    # what is written stays on a disk after the run, so it waits to be asked for
    prefix_cache_gb: float | Literal["auto"] = 0.0
    prompt_cache_gb: float | Literal["auto"] = "auto"
    narrow: Choice = "auto"
    large_pages: Choice = "auto"
    prepack: Choice = "auto"
    frozen_products: FrozenProducts = "full"
    verify: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.attention, str) or not self.attention:
            raise TypeError(f"expected attention to be 'auto' or the name of an implementation, got {self.attention!r}")
        for name in SWITCHES:
            value = getattr(self, name)
            if not isinstance(value, bool) and value != "auto":
                raise TypeError(f"expected {name} to be True, False or 'auto', got {value!r}")
        for name in ("group_by_length", "verify"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"expected {name} to be True or False, got {getattr(self, name)!r}")
        if self.frozen_products not in get_args(FrozenProducts):
            known = ", ".join(map(repr, get_args(FrozenProducts)))
            raise ValueError(f"expected frozen_products to be one of {known}, got {self.frozen_products!r}")
        for name in ON_DISK:
            gb = getattr(self, name)
            if gb == "auto":
                continue
            if isinstance(gb, bool) or not isinstance(gb, int | float):
                raise TypeError(f"expected {name} to be a number or 'auto', got {gb!r}")
            if not 0 <= gb <= sys.float_info.max:
                raise ValueError(f"expected 'auto' or a finite {name} >= 0, got {gb}")

    @classmethod
    def fast(cls, **knobs: Any) -> Engine:
        """The preset of fast runs, FAST_ENGINE, with `knobs` instead: the engine's half of `Recipe.fast()`.

        Raises what `Engine` raises.
        """
        return cls(**{**FAST_ENGINE, **knobs})

    def with_plain(self, plain: Mapping[str, object], why: str) -> Engine:
        """This one with other values of some knobs, where nothing else is to be had.

        plain: knob -> its value there; "auto" is taken for it. why: a clause for the error.
        Raises ValueError, naming the knob and both values, where something else was asked for.
        """
        for name, value in plain.items():
            if (asked := getattr(self, name)) not in ("auto", value):
                raise ValueError(f"{name}={asked} was asked for, but {why}: expected {value}")
        return replace(self, **plain)


@contextmanager
def prepared(model: nn.Module, engine: Engine) -> Iterator[None]:
    """A scope in which the model runs as `engine` says; afterwards everything is as it was.

    model: the one that is called with the batches. "auto" leaves attention, layers, heap and products as they are.
    Raises ValueError, before anything is changed, for an attention or products the model or the machine does not have.
    """
    with ExitStack() as scopes:
        if engine.attention != "auto":
            scopes.enter_context(attending(model, engine.attention))
        # before the layers are compiled, which then see it
        if engine.frozen_products in ("int8", "fp8"):
            scopes.enter_context(quantized(model, engine.frozen_products))
        # those that are not in 8 bits
        if engine.prepack is True:
            scopes.enter_context(prepacked(model))
        if engine.narrow is True:
            scopes.enter_context(narrowed(model))
        if engine.compile is True:
            scopes.enter_context(compiled(decoder_layers(model)))
        if engine.large_pages is True and device_of(model).type == "cpu":
            scopes.enter_context(held_in_large_pages(model))
        yield


def collator_of(engine: Engine, pad_token_id: int, logits: Logits = "rows") -> Callable[[Sequence[Encoded]], Batch]:
    """The collator of a settled engine: one row and shared beginnings with GROUPED attention, one row, or padding.

    logits: what the model can be asked for, see `models.logit_rows`.
    """
    if engine.packing is True and engine.attention == GROUPED:
        return PackedCollator(pad_token_id, logits=logits)
    flash = engine.attention.startswith("flash_attention")
    return CompletionCollator(pad_token_id, packed=engine.packing is True, logits=logits, boundaries=flash)
