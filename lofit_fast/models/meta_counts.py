"""What a model would keep on a device in training, counted on the meta device: from its config, with no weights.

Parameters are counted as they are. What backward needs is counted by running the model's own forward on tensors without
numbers, under hooks that see every saved tensor. Attention is stood in for by a function that saves what flash
attention saves.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lofit_fast.models.load import auto_classes, naming_broken_files, resolve
from lofit_fast.patching.architectures import find_projections, text_config
from lofit_kernels.shapes import SHAPES

_ATTENTION = "lofit_fast_counted"
# what a name of `SHAPES` does not say of a Llama: (vocabulary, whether the output head is the embedding)
_LLAMAS = {
    "Llama-3.2-1B": (128256, True),
    "Llama-2-7B": (32000, False),
    "Llama-3-8B": (128256, False),
    "Llama-2-13B": (32000, False),
    "Llama-3-70B": (128256, False),
}


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's parameters, of each decoder layer and of what is outside of them; and of all buffers."""

    layers: tuple[int, ...]
    outside: int
    buffers: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.outside + sum(self.layers) + self.buffers


@dataclass(frozen=True)
class Saved:
    """Bytes that forward keeps for backward: of each decoder layer, and outside of them without logits."""

    layers: tuple[int, ...]
    outside: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.outside + sum(self.layers)


def meta_model(name: str, dtype: torch.dtype) -> nn.Module:
    """A language model without weights: an alias, a folder, a .gguf file, a hub id, or a Llama's name in `SHAPES`.

    Raises ValueError for a model that transformers does not know or a broken config, OSError where there is none.
    """
    from transformers import AutoConfig, LlamaConfig

    if name in _LLAMAS:
        shape, (vocabulary, tied) = SHAPES[name], _LLAMAS[name]
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=shape.N,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.H,
            num_key_value_heads=shape.H_kv,
            head_dim=shape.D,
            tie_word_embeddings=tied,
        )
    elif name in SHAPES:
        raise ValueError(
            f"of {name} only the projections are known: expected a folder, a hub id, or one of {', '.join(_LLAMAS)}"
        )
    else:
        with naming_broken_files(name):
            config = AutoConfig.from_pretrained(resolve(name), trust_remote_code=False)
    with naming_broken_files(name), torch.device("meta"), _counted_attention():
        try:
            # which is left in the config, also where a family does not take it
            given = copy.deepcopy(config)
            model = auto_classes(config)[0].from_config(given, dtype=dtype, attn_implementation=_ATTENTION)
        # of families that take only attentions of their own, and say so in many ways; others fail again
        except Exception:
            model = auto_classes(config)[0].from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def attention_of(model: nn.Module) -> str | None:
    """What a meta model computes attention by; None for what stands for flash attention."""
    said = getattr(text_config(model), "_attn_implementation", None)
    return None if said == _ATTENTION else said


@dataclass(frozen=True)
class Lowest:
    """Where the vectors begin: the index of the decoder layer, and the projection in it."""

    index: int
    projection: nn.Module


@dataclass(frozen=True)
class Decoder:
    """A model as it is counted.

    layers: the list in which the layers with heads to tune are. projections: the modules of their output projections,
    in the same order.
    """

    model: nn.Module
    layers: tuple[nn.Module, ...]
    projections: tuple[nn.Module, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Decoder:
        """Raises ValueError for a model without a list of decoder layers."""
        found = tuple(p.module for p in find_projections(model))
        for module in model.modules():
            if isinstance(module, nn.ModuleList) and found[0] in set(module.modules()):
                return cls(model, tuple(module), found)
        raise ValueError(f"a {type(model).__name__} has no list of decoder layers to count")

    def lowest(self, counts: Sequence[int]) -> Lowest:
        """Where vectors begin. counts: of vectors, by projection, not all 0."""
        projection = next(module for module, count in zip(self.projections, counts, strict=True) if count)
        for index, layer in enumerate(self.layers):
            if projection in set(layer.modules()):
                return Lowest(index, projection)
        raise ValueError(f"a projection of a {type(self.model).__name__} is in none of its decoder layers")


def weights_of(decoder: Decoder) -> Weights:
    """Bytes of parameters, shared ones once, and of buffers."""
    return _weights(decoder, lambda parameter: parameter.numel() * parameter.itemsize)


def shard_of(decoder: Decoder, n: int) -> Weights:
    """Bytes of the largest of n shards where every parameter is cut along its first dimension; buffers stay whole.

    Source: torch.distributed.fsdp.fully_shard, which "shards each parameter on dim-0" and pads what n does not divide.
    """

    def shard(parameter: Tensor) -> int:
        rows = parameter.shape[0] if parameter.dim() else 1
        return math.ceil(rows / n) * (parameter.numel() // max(rows, 1)) * parameter.itemsize

    return _weights(decoder, shard)


def _weights(decoder: Decoder, size: Callable[[Tensor], int]) -> Weights:
    seen: set[int] = set()

    def of(module: nn.Module) -> int:
        total = 0
        for parameter in module.parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                total += size(parameter)
        return total

    layers = tuple(of(layer) for layer in decoder.layers)
    buffers = sum(buffer.numel() * buffer.itemsize for buffer in decoder.model.buffers())
    return Weights(layers, of(decoder.model), buffers)


class _Attended(torch.autograd.Function):
    """Attention without numbers. Saves q, k, v, the output and a float32 number per token and head.

    These are what FlashAttention's backward reads (Dao 2023, algorithm 2: Q, K, V, O, L).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, _ = q.shape
        out = q.new_empty(batch, length, heads, v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(batch, heads, length, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


@contextmanager
def _counted_attention() -> Iterator[None]:
    """A scope in which transformers knows the attention that is counted."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, **options: object):
        return _Attended.apply(q, k, v), None

    if _ATTENTION in ALL_ATTENTION_FUNCTIONS:
        yield
        return
    ALL_ATTENTION_FUNCTIONS[_ATTENTION] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[_ATTENTION]


def saved_for_backward(decoder: Decoder, tokens: int, lowest: Lowest, scaled: bool = False) -> Saved:
    """What forward keeps for backward in eager PyTorch, for one sequence, without logits and what the loss keeps.

    decoder: of the meta device. tokens: of the sequence. lowest: where vectors begin; below, nothing is kept. scaled:
    whether they are scales there, whose gradients need its z.
    Raises ValueError where the model's forward does not run without numbers, with the reason.
    """
    model, layers, projection = decoder.model, decoder.layers, lowest.projection
    vector = nn.Parameter(torch.empty((), device=next(model.parameters()).device))
    frozen = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers(), vector)}
    # the storages themselves: an address is used again once one is gone
    found: dict[int, tuple[Any, int]] = {}
    where = [len(layers)]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in frozen:
            found.setdefault(storage._cdata, (storage, where[0]))
        return tensor

    def enter(index: int) -> Callable[..., None]:
        return lambda *_: where.__setitem__(0, index)

    hooks = [layer.register_forward_pre_hook(enter(index)) for index, layer in enumerate(layers)]
    hooks += [layer.register_forward_hook(enter(len(layers))) for layer in layers]
    if scaled:
        hooks.append(projection.register_forward_pre_hook(lambda _, args: (args[0] * vector.to(args[0].dtype),)))
    hooks.append(projection.register_forward_hook(lambda _, args, out: out + vector.to(out.dtype)))
    ids = torch.zeros(1, tokens, dtype=torch.long, device=vector.device)
    try:
        with _counted_attention(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.base_model(input_ids=ids, use_cache=False)
    # each family has reasons of its own: experts that are looked up by numbers, towers that want images
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the forward of a {type(model).__name__} does not run without numbers: {reason}") from error
    finally:
        for hook in hooks:
            hook.remove()
    sums = [0] * (len(layers) + 1)
    for storage, index in found.values():
        sums[index] += storage.nbytes()
    return Saved(tuple(sums[:-1]), sums[-1])
