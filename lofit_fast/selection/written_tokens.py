"""What an offset writes: which next tokens one head's W v makes likelier and less likely, read through the model's end.

The residual stream is where a layer adds its part and the model's head reads its tokens (the "logit lens",
nostalgebraist 2020). Of head h with the offset v, the part is W_h v, W_h the D columns of the output projection that
belong to h. Some families normalise what the projection gives before they add it; then the part is what that changes
there. It is added to the stream after the last layer, and the model's own norm and head make logits of both: what the
layers in between make of it is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lofit_fast.config import Head
from lofit_fast.patching.architectures import Projection, decoder_layers
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.patched import evaluating
from lofit_fast.patching.placement import device_of
from lofit_fast.selection.adapter_overlap import offsets_in

# heads that go through the model at once
_AT_ONCE = 8


@dataclass(frozen=True)
class Written:
    """What one head's offset writes where an answer would begin.

    norm: the length of v. part: the length of what it adds, as a share of the stream's own length in its layer.
    promoted, suppressed: (token, change of its logit), the largest change first, as far as changes are more than what
    the model's dtype rounds off its largest logit.
    """

    head: Head
    norm: float
    part: float
    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]


def written_tokens(handle: LofitHandle, tokenizer, ids: Sequence[int], tokens: int = 8) -> list[Written]:
    """What every head with an offset writes, the longest offset first.

    Args:
        handle: of an adapter with offsets.
        tokenizer: of its model, which names the tokens.
        ids: the tokens of a prompt, at whose last one the stream is read.
        tokens: how many tokens are named at most, of either kind.

    Raises:
        ValueError: an adapter without offsets, a prompt without tokens, no tokens asked for.
    """
    offsets = offsets_in(handle.adapter())
    if not ids or tokens < 1:
        raise ValueError(f"expected a prompt of one token or more, and tokens from 1, got {len(ids)} and {tokens}")
    prompt = torch.tensor([list(ids)], device=device_of(handle.model))
    projections = {p.layer: p for p in handle.projections}
    with handle.disabled(), evaluating(handle.model):
        end = decoder_layers(handle.model)[-1]
        streams, parts = _parts(handle, prompt, offsets, projections)
        plain = _logits(handle.model, end, prompt, streams["end"].new_zeros(1, streams["end"].shape[-1]))
        # in 16 bits that is a good part of what one head does
        kind = torch.finfo(handle.model.dtype)
        # some models mask tokens by the least number there is
        largest = plain[plain.isfinite() & (plain.abs() < kind.max / 2)].abs().max().item()
        least = kind.eps * largest
        found = []
        heads = sorted(offsets, key=lambda head: -offsets[head].norm().item())
        for at in range(0, len(heads), _AT_ONCE):
            some = heads[at : at + _AT_ONCE]
            added = torch.stack([parts[head].to(streams["end"].device) for head in some])
            changes = _logits(handle.model, end, prompt, added) - plain
            for head, change in zip(some, changes, strict=True):
                part = parts[head].norm().item() / streams[head[0]].norm().item()
                found.append(_written(head, offsets[head], part, change.nan_to_num(), tokenizer, tokens, least))
    return found


def _written(head: Head, offset: Tensor, part: float, change: Tensor, tokenizer, tokens: int, least: float) -> Written:
    count = min(tokens, len(change))

    def named(signed: Tensor, sign: int) -> list[tuple[str, float]]:
        values, ids = signed.topk(count)
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        return [(tokenizer.decode([token]), sign * value) for token, value in pairs if value > least]

    return Written(head, offset.norm().item(), part, named(change, 1), named(-change, -1))


def _parts(
    handle: LofitHandle, prompt: Tensor, offsets: dict[Head, Tensor], projections: dict[int, Projection]
) -> tuple[dict[int | str, Tensor], dict[Head, Tensor]]:
    """(layer -> the stream (N,) that leaves it, and "end" of the last; head -> what its offset adds to it, (N,))."""
    layers, streams, norms = decoder_layers(handle.model), {}, {}
    with ExitStack() as hooks:
        for number in {number for number, _ in offsets}:
            hooks.enter_context(_seen(layers[number], streams, number))
            hooks.enter_context(_norm_behind(layers[number], projections[number], norms, number))
        hooks.enter_context(_seen(layers[-1], streams, "end"))
        handle.model(input_ids=prompt, use_cache=False)
    parts = {head: _part(head, v, handle, norms.get(head[0])) for head, v in offsets.items()}
    return streams, parts


def _part(head: Head, offset: Tensor, handle: LofitHandle, norm: tuple[nn.Module, Tensor] | None) -> Tensor:
    """W_h v, (N,) in float32 at least, or what it changes behind the norm that takes it."""
    layer = handle.layers[head[0]]
    z = offset.new_zeros(2, layer.in_features)
    z[1, head[1] * layer.head_dim : (head[1] + 1) * layer.head_dim] = offset
    # any kind of projection can be asked so: its bias, if it has one, is in both rows
    dtype = handle.model.dtype
    nothing, something = layer.inner(z.to(dtype)).to(offset.dtype)
    part = something - nothing
    if norm is None:
        return part
    module, before = norm
    before = before.to(offset.dtype)
    both = torch.stack([before, before + part]).to(dtype)
    base, changed = module(both).to(offset.dtype)
    return changed - base


@contextmanager
def _seen(layer: nn.Module, streams: dict, name: int | str) -> Iterator[None]:
    """A scope that keeps what a decoder layer gives at the last token, (N,)."""

    def look(_module, _inputs, output) -> None:
        streams[name] = _states(output)[0, -1].float()

    handle = layer.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _norm_behind(layer: nn.Module, projection: Projection, norms: dict, number: int) -> Iterator[None]:
    """A scope that keeps the module that takes the projection's very output, if one does, and that at the last token.

    Found by running: families call it by names that elsewhere stand for a norm behind the sum.
    """
    given: list[Tensor] = []
    wrapper = getattr(projection.parent, projection.attribute)
    inside = {id(module) for module in wrapper.modules()} | {id(m) for m in _holders(layer, wrapper)}

    def note(_module, _inputs, output) -> None:
        given[:] = [output]

    def look(module, inputs) -> None:
        taken = inputs[0] if inputs else None
        if given and isinstance(taken, Tensor) and taken is given[0] and any(True for _ in module.parameters()):
            norms.setdefault(number, (module, taken[0, -1]))

    handles = [wrapper.register_forward_hook(note)]
    handles += [m.register_forward_pre_hook(look) for m in layer.modules() if id(m) not in inside]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _holders(layer: nn.Module, module: nn.Module) -> Iterator[nn.Module]:
    """The modules in a layer that hold another, the layer too."""
    return (holder for holder in layer.modules() if any(one is module for one in holder.modules()))


def _logits(model: nn.Module, end: nn.Module, prompt: Tensor, added: Tensor) -> Tensor:
    """(A, vocabulary) float32: the next token's, with a row of `added` (A, N) each behind the last layer."""

    def add(_module, _inputs, output):
        return _changed(output, lambda states: states + added.to(states.device, states.dtype).unsqueeze(1))

    handle = end.register_forward_hook(add)
    try:
        return model(input_ids=prompt.expand(len(added), -1), use_cache=False).logits[:, -1].float()
    finally:
        handle.remove()


def _states(output) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _changed(output, change: Callable[[Tensor], Tensor]):
    return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])
