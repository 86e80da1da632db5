"""Where a module computes, and in what: read off whatever it holds, since a quantized one may have no parameters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

# dtypes that a product can be computed in; narrower floats are ways to store a weight
COMPUTED_IN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def device_of(*modules: nn.Module) -> torch.device:
    """Where the first module that holds a tensor computes: its parameters say it, else its buffers and attributes.

    Raises ValueError for weights that are on the meta device, and not brought elsewhere for each forward, or brought
    together with all that is in a module around.
    """
    for module in modules:
        for tensor in _tensors(module):
            # accelerate keeps offloaded weights on meta, and brings them to this device for each forward
            if tensor.device.type == "meta":
                check_not_preloaded(modules)
                return _execution_device(module)
            return computed_on(tensor)
    return torch.device("cpu")


def computed_on(tensor: Tensor) -> torch.device:
    """Where a tensor is computed with: that of a sharded one may wait on the CPU for its next use on a device."""
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None or mesh.device_type == tensor.device.type:
        return tensor.device
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


def dtype_of(*modules: nn.Module) -> torch.dtype:
    """What the first module with such parameters computes in; float32 where no parameter says it."""
    parameters = chain.from_iterable(module.parameters() for module in modules)
    return next((p.dtype for p in parameters if p.dtype in COMPUTED_IN), torch.float32)


def is_dense(tensor: object) -> bool:
    """Whether a weight is plain numbers that a product can be computed from: no subclass, nested, sparse or packed."""
    return (
        type(tensor) in (nn.Parameter, Tensor)
        and tensor.dtype in COMPUTED_IN
        and tensor.layout == torch.strided
        and not tensor.is_nested
    )


def moving_hook(linear: nn.Linear) -> Any | None:
    """accelerate's hook, as `device_map` puts one on every module, if it does nothing to a linear but move tensors.

    Its pre_forward brings the input, and a weight that is offloaded, to the device where the module computes;
    its post_forward takes them back. None where there is no such hook, or where anything else has replaced `forward`.
    """
    own, hooks = vars(linear), sys.modules.get("accelerate.hooks")
    hook, outer, inner = (own.get(name) for name in ("_hf_hook", "forward", "_old_forward"))
    if hook is None or hooks is None or type(hook) is not hooks.AlignDevicesHook or hook.no_grad:
        return None
    of_accelerate = isinstance(outer, partial) and outer.func.__module__ == hooks.__name__ and outer.args == (linear,)
    of_torch = getattr(inner, "__func__", None) is nn.Linear.forward and inner.__self__ is linear
    return hook if of_accelerate and of_torch else None


def plain_attributes(module: nn.Module) -> dict[str, Tensor]:
    """By name the tensors that a module and its children hold as neither parameters nor buffers."""
    return {
        f"{path}.{name}" if path else name: value
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, Tensor)
    }


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """All that a module holds, parameters first."""
    yield from module.parameters()
    yield from module.buffers()
    yield from plain_attributes(module).values()


def is_offloaded(model: nn.Module) -> bool:
    """Whether some of a model's weights are brought for each forward, and are nowhere between."""
    return any(parameter.is_meta for parameter in model.parameters())


def offloads(module: nn.Module) -> bool:
    """Whether accelerate keeps what a module holds elsewhere, and brings it for each forward."""
    return _offloading(vars(module).get("_hf_hook"))


def check_not_preloaded(modules: Iterable[nn.Module]) -> None:
    """Raise ValueError where a hook brings all that is in a module at once: it looks for what it has kept, by name."""
    for module in modules:
        if offloads(module) and vars(module)["_hf_hook"].place_submodules:
            raise ValueError(
                f"cannot patch a model of which a {type(module).__name__} is offloaded as a whole: what brings it "
                "knows nothing of vectors in it. Offload without preload_module_classes, and patch then"
            )


def check_hook(hook: Any) -> None:
    """Raise ValueError for a hook of accelerate that would keep vectors elsewhere: it has no copy of them to bring."""
    if _offloading(hook):
        raise ValueError(
            "cannot offload a patched model: accelerate would lose the vectors. Unpatch it (or load it anew), offload "
            "it, and patch it then"
        )


def _offloading(hook: Any) -> bool:
    # of several hooks in a row any
    return any(getattr(one, "offload", False) for one in getattr(hook, "hooks", (hook,)))


def _execution_device(module: nn.Module) -> torch.device:
    hooks: Iterable = (getattr(part, "_hf_hook", None) for part in module.modules())
    device = next((d for hook in hooks if (d := getattr(hook, "execution_device", None)) is not None), None)
    if device is None:
        raise ValueError("cannot patch a model whose weights are on the meta device: load it first")
    return torch.device(device)


def in_memory(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """fn, except that nothing goes to the meta device: what brings a base back has no key for the vectors."""

    def apply(tensor: Tensor) -> Tensor:
        out = fn(tensor)
        return tensor if out.is_meta else out

    return apply


def at_least_float32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """fn, except that a cast below float32 leaves float32: the vectors are too small to live in 16 bits."""

    def apply(tensor: Tensor) -> Tensor:
        out = fn(tensor)
        narrow = out.is_floating_point() and out.element_size() < 4
        return tensor.to(device=out.device, dtype=torch.float32) if narrow else out

    return apply
