"""What names a base model by its weights: a digest of a sample of every tensor, quick to compute.

Of a large tensor the sample is a diagonal that goes on at the other side, so that every row and every column has a
number in it; a small one is taken whole. What changes a few single numbers of a large tensor goes unnoticed.

A checkpoint is loaded in one dtype today and in another tomorrow, and is the same base. Rounding to bfloat16 does not
change what is rounded to it already, so the float32 weights and the bfloat16 ones of a checkpoint give one digest; a
second digest of the numbers rounded to float16 does the same for those. Two models are the same if either agrees.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from lofit_fast.patching.architectures import inputs_of, text_config
from lofit_fast.patching.fully_sharded import is_spread, reshard, spread_sample
from lofit_fast.patching.layer import LofitLinear
from lofit_fast.patching.peft_layers import is_tuner_layer
from lofit_fast.patching.placement import is_dense
from lofit_fast.patching.sharding import kind_of_part

# a tensor of at most so many numbers is taken whole, and of no tensor are more taken than MOST
WHOLE, MOST = 2**16, 2**19
ROUNDINGS = (torch.bfloat16, torch.float16)
# children by which wrappers of PEFT, FSDP and torch hold what they wrap, under its own name
_HELD = ("original_module", "token_adapter", "_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")
# a tensor's name in the base, the tensor, and whether it is plain numbers
Named = tuple[str, Tensor, bool]
# stands in a digest for tensors whose numbers are not here or not plain
_UNSEEN = "?"


@torch.no_grad()
def base_digest(model: nn.Module) -> str:
    """A digest of a base model's weights, the same with LoFiT's vectors or PEFT's adapters in the model and without.

    model: a whole model, the head and all; its decoder alone has a digest that `same_base` finds equal.
    Returns "<dtypes>:<decoder>/<rest>", the last two as "<rounded to bfloat16>.<rounded to float16>", with a "?" where
    some weights are quantized, offloaded or sharded: of these only what this process holds is looked at. Of a model
    that FSDP2 shards the processes tell each other their part of the sample: all of them must call it. Never raises for
    a model that computes.
    """
    reshard(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = _decoder_in(base)
    seen: set[int] = set()
    groups = [list(_tensors(decoder, "", seen, None)), list(_tensors(base, "", seen, decoder))]
    dtypes = {str(t.dtype).removeprefix("torch.") for group in groups for _, t, whole in group if whole and _floats(t)}
    quantized = getattr(getattr(base, "config", None), "quantization_config", None) is not None
    return f"{'+'.join(sorted(dtypes))}:{'/'.join(_digest(group, quantized) for group in groups)}"


def same_base(first: str, second: str) -> bool | None:
    """Whether two digests are of one base model. None where they cannot tell.

    They cannot where weights are quantized, offloaded or sharded, or one was rounded to bfloat16 and the other to
    float16. A model without a head is the same as one with.
    """
    if first == second:
        return True
    (dtypes, mine), (others, theirs) = (digest.partition(":")[::2] for digest in (first, second))
    parts = [_same_part(a, b) for a, b in zip(mine.split("/"), theirs.split("/"), strict=False)]
    if all(parts):
        return True
    both_16 = {"bfloat16", "float16"} <= {*dtypes.split("+"), *others.split("+")}
    return False if False in parts and not both_16 else None


def check_base(model: nn.Module, digest: str, what: str, made_for: str, strict: bool) -> None:
    """Warn, or with strict raise ValueError, where an adapter was trained on other weights than the model has.

    digest: of the base that it was trained on, "" where no file says it. what: the adapter, in words. made_for: its
    base's name.
    """
    if not digest or same_base(digest, found := base_digest(model)) is not False:
        return
    message = (
        f"{what} was trained on other weights than this model has: on those of {made_for or 'a model'} ({digest}); "
        f"this is {base_name(model) or 'a model'} ({found})"
    )
    if strict:
        raise ValueError(message)
    # who has called `load`
    warnings.warn(message, stacklevel=4)


def base_name(model: nn.Module) -> str:
    """Where a model was loaded from, "" for one that does not say it."""
    # a wrapper's text part has no name of its own
    names = (getattr(config, "_name_or_path", "") for config in (model.config, text_config(model)))
    return next(filter(None, names), "")


def _same_part(first: str, second: str) -> bool | None:
    if not first or not second or first == second:
        return True
    if first.endswith(_UNSEEN) or second.endswith(_UNSEEN):
        return None
    return any(a == b for a, b in zip(first.split("."), second.split("."), strict=False))


def _decoder_in(model: nn.Module) -> nn.Module:
    """What the model calls its decoder, or the part of it that has no head; the model itself where it says nothing."""
    find = getattr(model, "get_decoder", None)
    found = None if find is None else find()
    if found is None or found is model:
        found = getattr(model, "base_model", model)
    return found if any(found is module for module in model.modules()) else model


def _tensors(module: nn.Module, path: str, seen: set[int], skip: nn.Module | None) -> Iterator[Named]:
    """Every weight, each once, but for those of `skip`."""
    if module is skip:
        return
    inside = _wrapped(module)
    if inside is not None:
        yield from _tensors(inside, path, seen, skip)
        return
    own = dict(module._parameters)
    own |= {name: t for name, t in module._buffers.items() if name not in module._non_persistent_buffers_set}
    packed = _is_packed(module)
    if packed:
        own |= {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
    for name, tensor in own.items():
        if tensor is not None and id(tensor) not in seen:
            seen.add(id(tensor))
            yield path + name, tensor, not packed and _is_plain(tensor)
    for name, child in module._modules.items():
        if child is not None:
            yield from _tensors(child, f"{path}{name}.", seen, skip)


def _wrapped(module: nn.Module) -> nn.Module | None:
    """The module of the base that a wrapper holds; None for a module of the base itself."""
    if isinstance(module, LofitLinear):
        return module.inner
    if is_tuner_layer(module) and "base_layer" in module._modules:
        return module.base_layer
    return next((module._modules[name] for name in _HELD if module._modules.get(name) is not None), None)


def _is_packed(module: nn.Module) -> bool:
    """Whether a module is a linear that keeps its weight in a form of its own."""
    weight = module._parameters.get("weight")
    return inputs_of(module) is not None and (weight is None or not (is_dense(weight) or is_spread(weight)))


def _is_plain(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are here, in a form in which they can be rounded."""
    if is_spread(tensor):
        return True
    if tensor.device.type == "meta" or kind_of_part(tensor) is not None:
        return False
    # whole numbers that stand beside the weights: positions, counters
    return is_dense(tensor) or (type(tensor) in (nn.Parameter, Tensor) and not tensor.is_floating_point())


def _floats(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _digest(tensors: Iterable[Named], quantized: bool) -> str:
    """The digest of a part of a model, in each of ROUNDINGS; "" for no tensors."""
    sums = [hashlib.sha256() for _ in ROUNDINGS]
    tensors = sorted(tensors, key=lambda named: named[0])
    for name, tensor, whole in tensors:
        for rounding, total in zip(ROUNDINGS, sums, strict=True):
            total.update(f"{name} {tuple(tensor.shape)}\n".encode())
            for part in _rounded(tensor, rounding) if whole else _stored(tensor):
                total.update(part)
    if not tensors:
        return ""
    unseen = _UNSEEN if quantized or not all(whole for _, _, whole in tensors) else ""
    return ".".join(total.hexdigest()[:16] for total in sums) + unseen


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Iterator[bytes]:
    sample = spread_sample(tensor.detach(), sample_places) if is_spread(tensor) else _sample(tensor.detach())
    # a float64 model of a float32 checkpoint is rounded as that is
    yield _bytes(sample.float().to(dtype) if _floats(sample) else sample)


def _sample(tensor: Tensor) -> Tensor:
    """(n,) numbers of a tensor: all, or of a large one a diagonal over all rows and columns."""
    if (places := sample_places(tensor)) is None:
        return tensor.reshape(-1)
    return tensor.reshape(-1, tensor.shape[-1])[places]


def sample_places(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """(rows, columns) of a tensor's sample, in its matrix of as many columns as it has; None for all of a small one."""
    if tensor.numel() <= WHOLE:
        return None
    rows, columns = tensor.shape[:-1].numel(), tensor.shape[-1]
    longer = max(rows, columns)
    # of what is packed into one column, or is one flat row, not all
    steps = torch.arange(0, longer, -(-longer // MOST), device=tensor.device)
    return steps % rows, steps % columns


def _stored(tensor: Tensor) -> Iterator[bytes]:
    """What a process holds of a tensor that is not plain, as bytes; nothing of one that no bytes can be had of."""
    if hasattr(tensor, "_local_tensor"):
        yield from _stored(tensor._local_tensor)
    elif hasattr(tensor, "__tensor_flatten__"):
        inner, _ = tensor.__tensor_flatten__()
        for attribute in inner:
            if isinstance(part := getattr(tensor, attribute), Tensor):
                yield from _stored(part)
    elif tensor.device.type != "meta" and tensor.layout == torch.strided and not tensor.is_quantized:
        # packers' own kinds of tensors pack again when they are moved
        yield _bytes(_sample(tensor.detach().as_subclass(Tensor)))


def _bytes(tensor: Tensor) -> bytes:
    # a copy: numpy takes hold of a tensor's memory, which FSDP could not free then
    return tensor.cpu().contiguous().clone().view(torch.uint8).numpy().tobytes()
