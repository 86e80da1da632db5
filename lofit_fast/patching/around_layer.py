"""What others have put around a layer of ours: hooks, or a forward of their own. None of it outlives the layer.

A patched model shows our layer under the projection's name, so that hooks on "the projection" are hooks on our layer.
The base layer that stays after a merge, or in an exported folder, knows nothing of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from lofit_fast.patching.prepacked import is_replaced

# where a module keeps its hooks -> what they are
_HOOKS = {
    "_forward_pre_hooks": "forward pre-hooks",
    "_forward_hooks": "forward hooks",
    "_backward_pre_hooks": "backward pre-hooks",
    "_backward_hooks": "backward hooks",
}
# hooks of FSDP2 and tensor parallelism, which change no numbers and are no user's
_OF_TORCH = "torch.distributed."
_ACCELERATE = "accelerate.hooks"


def around_layer(layer: nn.Module) -> str | None:
    """What stands around a layer of ours and may change what it computes, as a phrase; None where nothing does.

    What moves tensors between devices or processes does not count: accelerate's hooks, and those of torch.distributed.
    """
    if _is_replaced(layer):
        return "a forward of its own"
    own = vars(layer)
    found = [what for name, what in _HOOKS.items() if not all(map(_is_of_torch, own[name].values()))]
    return f"{' and '.join(found)} on it" if found else None


def all_around(layers: Mapping[int, nn.Module]) -> dict[int, str]:
    """`around_layer` of the layers that have something around them, by number."""
    return {number: what for number, layer in layers.items() if (what := around_layer(layer)) is not None}


def check_nothing_around(layers: Mapping[int, nn.Module], action: str) -> None:
    """Raise ValueError where anything stands around a layer. action: what would drop it."""
    for number, what in all_around(layers).items():
        raise ValueError(
            f"cannot {action} layer {number}: its projection, LoFiT's module, has {what}, which the merged model would "
            "lose: remove it first, or put it on the base's projection, before lofit_fast.patch"
        )


def _is_replaced(layer: nn.Module) -> bool:
    own = vars(layer)
    outer = own.get("forward")
    # accelerate's moves inputs between devices; what it was put around is kept beside it
    if isinstance(outer, partial) and outer.func.__module__ == _ACCELERATE:
        kept = own.get("_old_forward")
        return getattr(kept, "__func__", None) is not type(layer).forward or kept.__self__ is not layer
    return is_replaced(layer)


def _is_of_torch(hook: Callable) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    return (getattr(hook, "__module__", None) or "").startswith(_OF_TORCH)
